"""Tenants own bases, uploads and deltas; API keys belong to tenants.

What is stored already belongs to the operator's tenant. The columns keep a default, so that an
api of the version before can still insert rows while processes are replaced.

Revision: 0005
"""

from datetime import UTC, datetime

import sqlalchemy as sa
from alembic import op

from deltadock.storage.tables import UtcDateTime

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None

LOCAL = "ten_local"


def upgrade() -> None:
    """Apply."""
    tenants = op.create_table(
        "tenants",
        sa.Column("id", sa.String(40), nullable=False),
        sa.Column("name", sa.String(96), nullable=False),
        sa.Column("is_operator", sa.Boolean(), nullable=False),
        sa.Column("max_bytes", sa.BigInteger(), nullable=True),
        sa.Column("max_deltas", sa.Integer(), nullable=True),
        sa.Column("max_jobs", sa.Integer(), nullable=True),
        sa.Column("requests_per_minute", sa.Integer(), nullable=True),
        sa.Column("tokens_per_minute", sa.Integer(), nullable=True),
        sa.Column("created_at", UtcDateTime(), nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_tenants"),
        sa.UniqueConstraint("name", name="uq_tenants_name"),
    )
    now = datetime.now(UTC)
    op.bulk_insert(
        tenants, [{"id": LOCAL, "name": "local", "is_operator": True, "created_at": now}]
    )
    op.create_table(
        "api_keys",
        sa.Column("id", sa.String(40), nullable=False),
        sa.Column("tenant_id", sa.String(40), nullable=False),
        sa.Column("name", sa.String(96), nullable=False),
        sa.Column("prefix", sa.String(16), nullable=False),
        sa.Column("hmac", sa.String(64), nullable=False),
        sa.Column("scopes", sa.JSON(none_as_null=True), nullable=False),
        sa.Column("created_at", UtcDateTime(), nullable=False),
        sa.Column("expires_at", UtcDateTime(), nullable=True),
        sa.Column("revoked_at", UtcDateTime(), nullable=True),
        sa.Column("last_used_at", UtcDateTime(), nullable=True),
        sa.ForeignKeyConstraint(["tenant_id"], ["tenants.id"], name="fk_api_keys_tenant_id"),
        sa.PrimaryKeyConstraint("id", name="pk_api_keys"),
        sa.UniqueConstraint("prefix", name="uq_api_keys_prefix"),
    )
    op.create_index("ix_api_keys_tenant_id", "api_keys", ["tenant_id"])
    for table in ("bases", "uploads", "deltas"):
        with op.batch_alter_table(table) as batch:
            batch.add_column(
                sa.Column("tenant_id", sa.String(40), nullable=False, server_default=LOCAL)
            )
            batch.create_foreign_key(f"fk_{table}_tenant_id", "tenants", ["tenant_id"], ["id"])
    with op.batch_alter_table("bases") as batch:
        batch.add_column(
            sa.Column("shared", sa.Boolean(), nullable=False, server_default=sa.false())
        )
        batch.drop_constraint("uq_bases_name", type_="unique")
        batch.create_unique_constraint("uq_bases_tenant_id_name", ["tenant_id", "name"])
    op.create_index(
        "ix_uploads_tenant_id_checkpoint_digest", "uploads", ["tenant_id", "checkpoint_digest"]
    )
    with op.batch_alter_table("deltas") as batch:
        batch.drop_constraint("uq_deltas_name_version", type_="unique")
        batch.create_unique_constraint(
            "uq_deltas_tenant_id_name_version", ["tenant_id", "name", "version"]
        )
        batch.drop_index("ix_deltas_created_at_id")
        batch.create_index("ix_deltas_tenant_id_created_at_id", ["tenant_id", "created_at", "id"])


def downgrade() -> None:
    """Revert: fails if two tenants use one name."""
    with op.batch_alter_table("deltas") as batch:
        batch.drop_index("ix_deltas_tenant_id_created_at_id")
        batch.create_index("ix_deltas_created_at_id", ["created_at", "id"])
        batch.drop_constraint("uq_deltas_tenant_id_name_version", type_="unique")
        batch.create_unique_constraint("uq_deltas_name_version", ["name", "version"])
    op.drop_index("ix_uploads_tenant_id_checkpoint_digest", "uploads")
    with op.batch_alter_table("bases") as batch:
        batch.drop_constraint("uq_bases_tenant_id_name", type_="unique")
        batch.create_unique_constraint("uq_bases_name", ["name"])
        batch.drop_column("shared")
    for table in ("bases", "uploads", "deltas"):
        with op.batch_alter_table(table) as batch:
            batch.drop_constraint(f"fk_{table}_tenant_id", type_="foreignkey")
            batch.drop_column("tenant_id")
    op.drop_table("api_keys")
    op.drop_table("tenants")
