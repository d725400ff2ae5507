"""Jobs that have begun and not ended have an index: they are first in the queue.

Revision: 0021
"""

import sqlalchemy as sa
from alembic import op

revision = "0021"
down_revision = "0020"
branch_labels = None
depends_on = None

BEGUN = sa.text("started_at IS NOT NULL AND finished_at IS NULL")


def upgrade() -> None:
    """Apply."""
    op.create_index(
        "ix_jobs_begun_sent_at_id",
        "jobs",
        ["sent_at", "id"],
        sqlite_where=BEGUN,
        postgresql_where=BEGUN,
    )


def downgrade() -> None:
    """Revert."""
    op.drop_index("ix_jobs_begun_sent_at_id", "jobs")
