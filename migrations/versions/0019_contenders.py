"""Which versions a model's first default is still compared with.

Revision: 0019
"""

import sqlalchemy as sa
from alembic import op

revision = "0019"
down_revision = "0018"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Apply."""
    op.add_column("aliases", sa.Column("last_contender", sa.Integer(), nullable=True))


def downgrade() -> None:
    """Revert."""
    op.drop_column("aliases", "last_contender")
