"""Nodes register with the api and report the deltas they hold.

Revision: 0003
"""

import sqlalchemy as sa
from alembic import op

from deltadock.storage.tables import UtcDateTime

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Apply."""
    op.create_table(
        "nodes",
        sa.Column("id", sa.String(40), nullable=False),
        sa.Column("url", sa.String(255), nullable=False),
        sa.Column("base_digest", sa.String(64), nullable=True),
        sa.Column("adopts", sa.Boolean(), nullable=False),
        sa.Column("draining", sa.Boolean(), nullable=False),
        sa.Column("capacity", sa.Integer(), nullable=False),
        sa.Column("admitted", sa.Integer(), nullable=False),
        sa.Column("delta_slots", sa.Integer(), nullable=False),
        sa.Column("deltas", sa.JSON(none_as_null=True), nullable=False),
        sa.Column("started_at", UtcDateTime(), nullable=False),
        sa.Column("seen_at", UtcDateTime(), nullable=False),
        sa.Column("expires_at", UtcDateTime(), nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_nodes"),
    )
    op.create_index("ix_nodes_url", "nodes", ["url"])


def downgrade() -> None:
    """Revert."""
    op.drop_table("nodes")
