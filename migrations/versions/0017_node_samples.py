"""Nodes report throughput, latency and memory; samples of the last hour are kept.

Revision: 0017
"""

import sqlalchemy as sa
from alembic import op

from deltadock.storage.tables import UtcDateTime

revision = "0017"
down_revision = "0016"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Apply."""
    op.add_column("nodes", sa.Column("usage", sa.JSON(none_as_null=True), nullable=True))
    op.add_column("nodes", sa.Column("sampled_at", UtcDateTime(), nullable=True))
    op.create_table(
        "node_samples",
        sa.Column("node_id", sa.String(40), nullable=False),
        sa.Column("at", UtcDateTime(), nullable=False),
        sa.Column("admitted", sa.Integer(), nullable=False),
        sa.Column("device", sa.Integer(), nullable=False),
        sa.Column("host", sa.Integer(), nullable=False),
        sa.Column("disk", sa.Integer(), nullable=False),
        sa.Column("tokens_per_second", sa.Double(), nullable=False),
        sa.Column("first_token_seconds", sa.Double(), nullable=True),
        sa.Column("inter_token_seconds", sa.Double(), nullable=True),
        sa.Column("memory_bytes", sa.BigInteger(), nullable=True),
        sa.Column("memory_limit", sa.BigInteger(), nullable=True),
        sa.PrimaryKeyConstraint("node_id", "at", name="pk_node_samples"),
    )
    op.create_index("ix_node_samples_at", "node_samples", ["at"])


def downgrade() -> None:
    """Revert."""
    op.drop_table("node_samples")
    op.drop_column("nodes", "sampled_at")
    op.drop_column("nodes", "usage")
