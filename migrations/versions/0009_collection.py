"""Deleted deltas are collected after some days; projects have rules for uploaded fine-tunes.

Revision: 0009
"""

import sqlalchemy as sa
from alembic import op

from deltadock.storage.tables import UtcDateTime

revision = "0009"
down_revision = "0008"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Apply."""
    op.add_column("deltas", sa.Column("collected_at", UtcDateTime(), nullable=True))
    op.create_index("ix_deltas_artifact_digest", "deltas", ["artifact_digest"])
    op.create_index("ix_uploads_checkpoint_digest", "uploads", ["checkpoint_digest"])
    op.create_table(
        "retention_rules",
        sa.Column("tenant_id", sa.String(40), nullable=False),
        sa.Column("project", sa.String(96), nullable=False),
        sa.Column("rule", sa.String(16), nullable=False),
        sa.ForeignKeyConstraint(["tenant_id"], ["tenants.id"], name="fk_retention_rules_tenant_id"),
        sa.PrimaryKeyConstraint("tenant_id", "project", name="pk_retention_rules"),
    )


def downgrade() -> None:
    """Revert."""
    op.drop_table("retention_rules")
    op.drop_index("ix_uploads_checkpoint_digest", "uploads")
    op.drop_index("ix_deltas_artifact_digest", "deltas")
    op.drop_column("deltas", "collected_at")
