"""Nodes report the longest sequence that they serve.

Revision: 0029
"""

import sqlalchemy as sa
from alembic import op

revision = "0029"
down_revision = "0028"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Apply."""
    op.add_column("nodes", sa.Column("context_tokens", sa.Integer(), nullable=True))


def downgrade() -> None:
    """Revert."""
    op.drop_column("nodes", "context_tokens")
