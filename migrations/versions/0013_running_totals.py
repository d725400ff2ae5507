"""Running totals of what counts towards quotas; indexes of the queue and of deleted deltas.

Revision: 0013
"""

import sqlalchemy as sa
from alembic import op

revision = "0013"
down_revision = "0012"
branch_labels = None
depends_on = None

FILL_USES = """
INSERT INTO blob_uses (tenant_id, digest, size, uses)
SELECT tenant_id, digest, size, count(*) FROM (
    SELECT uploads.tenant_id, upload_files.sha256 AS digest, upload_files.size
        FROM upload_files JOIN uploads ON uploads.id = upload_files.upload_id
        WHERE uploads.state NOT IN ('aborted', 'dropped')
    UNION ALL
    SELECT tenant_id, artifact_digest, artifact_bytes FROM deltas
        WHERE deleted_at IS NULL AND artifact_digest IS NOT NULL
) AS used GROUP BY tenant_id, digest, size
"""
ADD_TENANTS = """
INSERT INTO totals (tenant_id, deltas, artifact_bytes, checkpoint_bytes, base_bytes)
SELECT id, 0, 0, 0, 0 FROM tenants WHERE id NOT IN (SELECT tenant_id FROM totals)
"""
FILL_TOTALS = """
UPDATE totals SET
    all_deltas = (SELECT count(*) FROM deltas
        WHERE deltas.tenant_id = totals.tenant_id AND deleted_at IS NULL),
    stored_bytes = (SELECT coalesce(sum(size), 0) FROM blob_uses
        WHERE blob_uses.tenant_id = totals.tenant_id)
"""
DELETED = sa.text("deleted_at IS NOT NULL AND collected_at IS NULL")


def upgrade() -> None:
    """Apply."""
    op.create_table(
        "blob_uses",
        sa.Column("tenant_id", sa.String(40), nullable=False),
        sa.Column("digest", sa.String(64), nullable=False),
        sa.Column("size", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("uses", sa.Integer(), nullable=False),
        sa.ForeignKeyConstraint(["tenant_id"], ["tenants.id"], name="fk_blob_uses_tenant_id"),
        sa.PrimaryKeyConstraint("tenant_id", "digest", "size", name="pk_blob_uses"),
    )
    for name, kind in (("all_deltas", sa.Integer()), ("stored_bytes", sa.BigInteger())):
        op.add_column("totals", sa.Column(name, kind, nullable=False, server_default="0"))
    for statement in (FILL_USES, ADD_TENANTS, FILL_TOTALS):
        op.execute(statement)
    op.drop_index("ix_jobs_state", "jobs")
    op.create_index(
        "ix_jobs_state_priority_sent_at_id", "jobs", ["state", "priority", "sent_at", "id"]
    )
    op.create_index(
        "ix_deltas_deleted_at",
        "deltas",
        ["deleted_at"],
        sqlite_where=DELETED,
        postgresql_where=DELETED,
    )


def downgrade() -> None:
    """Revert."""
    op.drop_index("ix_deltas_deleted_at", "deltas")
    op.drop_index("ix_jobs_state_priority_sent_at_id", "jobs")
    op.create_index("ix_jobs_state", "jobs", ["state"])
    op.drop_column("totals", "stored_bytes")
    op.drop_column("totals", "all_deltas")
    op.drop_table("blob_uses")
