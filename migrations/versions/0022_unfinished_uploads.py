"""The index of uploads by state holds unfinished ones only: SQLite read all others by it.

Revision: 0022
"""

import sqlalchemy as sa
from alembic import op

revision = "0022"
down_revision = "0021"
branch_labels = None
depends_on = None

UNFINISHED = sa.text("state IN ('open', 'completing')")


def upgrade() -> None:
    """Apply."""
    op.create_index(
        "ix_uploads_unfinished_updated_at",
        "uploads",
        ["updated_at"],
        sqlite_where=UNFINISHED,
        postgresql_where=UNFINISHED,
    )
    op.drop_index("ix_uploads_state_updated_at", "uploads")


def downgrade() -> None:
    """Revert."""
    op.create_index("ix_uploads_state_updated_at", "uploads", ["state", "updated_at"])
    op.drop_index("ix_uploads_unfinished_updated_at", "uploads")
