"""The audit log, which triggers keep append-only.

Revision: 0012
"""

from typing import Final

import sqlalchemy as sa
from alembic import op

from deltadock.storage.tables import UtcDateTime

revision = "0012"
down_revision = "0011"
branch_labels = None
depends_on = None

INDEXES = (
    ("tenant_id", "id"),
    ("tenant_id", "action", "id"),
    ("tenant_id", "object_id", "id"),
    ("tenant_id", "by_key_id", "id"),
)
REFUSAL: Final = "The audit log is append-only."
REFUSE: Final = f"BEGIN SELECT RAISE(ABORT, '{REFUSAL}'); END"
SQLITE = [
    "CREATE TRIGGER audit_log_no_update BEFORE UPDATE ON audit_log " + REFUSE,
    "CREATE TRIGGER audit_log_no_delete BEFORE DELETE ON audit_log " + REFUSE,
    # INSERT OR REPLACE removes a row without a DELETE.
    "CREATE TRIGGER audit_log_no_replace BEFORE INSERT ON audit_log "
    "WHEN EXISTS (SELECT 1 FROM audit_log WHERE id = NEW.id) " + REFUSE,
]
POSTGRES = [
    "CREATE FUNCTION refuse_audit_log_change() RETURNS trigger LANGUAGE plpgsql AS "
    f"$$ BEGIN RAISE EXCEPTION '{REFUSAL}'; END $$",
    "CREATE TRIGGER audit_log_append_only BEFORE UPDATE OR DELETE OR TRUNCATE ON audit_log "
    "FOR EACH STATEMENT EXECUTE FUNCTION refuse_audit_log_change()",
]


def _is_postgres() -> bool:
    return op.get_bind().dialect.name == "postgresql"


def upgrade() -> None:
    """Apply."""
    op.create_table(
        "audit_log",
        sa.Column(
            "id",
            sa.BigInteger().with_variant(sa.Integer(), "sqlite"),
            autoincrement=True,
            nullable=False,
        ),
        sa.Column("at", UtcDateTime(), nullable=False),
        sa.Column("tenant_id", sa.String(40), nullable=False),
        sa.Column("origin", sa.String(16), nullable=False),
        sa.Column("by_tenant_id", sa.String(40), nullable=True),
        sa.Column("by_key_id", sa.String(40), nullable=True),
        sa.Column("request_id", sa.String(64), nullable=True),
        sa.Column("action", sa.String(16), nullable=False),
        sa.Column("object_id", sa.String(255), nullable=False),
        sa.Column("outcome", sa.String(64), nullable=False),
        sa.Column("details", sa.JSON(none_as_null=True), nullable=True),
        sa.PrimaryKeyConstraint("id", name="pk_audit_log"),
    )
    for columns in INDEXES:
        op.create_index(f"ix_audit_log_{'_'.join(columns)}", "audit_log", list(columns))
    for statement in POSTGRES if _is_postgres() else SQLITE:
        op.execute(statement)


def downgrade() -> None:
    """Revert: the records are lost."""
    op.drop_table("audit_log")
    if _is_postgres():
        op.execute("DROP FUNCTION refuse_audit_log_change()")
