"""Checkpoints say whether they have a chat template.

Revision: 0018
"""

import sqlalchemy as sa
from alembic import op

revision = "0018"
down_revision = "0017"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Apply."""
    op.add_column("checkpoints", sa.Column("has_chat_template", sa.Boolean(), nullable=True))


def downgrade() -> None:
    """Revert."""
    op.drop_column("checkpoints", "has_chat_template")
