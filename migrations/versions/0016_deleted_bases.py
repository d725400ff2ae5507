"""Bases can be deleted, and restored for some days.

Revision: 0016
"""

import sqlalchemy as sa
from alembic import op

from deltadock.storage.tables import UtcDateTime

revision = "0016"
down_revision = "0015"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Apply."""
    op.add_column("bases", sa.Column("deleted_at", UtcDateTime(), nullable=True))


def downgrade() -> None:
    """Revert: deleted bases are back."""
    op.drop_column("bases", "deleted_at")
