"""The queue has an index by tenant and priority of the jobs that no worker has begun.

Revision: 0028
"""

import sqlalchemy as sa
from alembic import op

revision = "0028"
down_revision = "0027"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Apply."""
    waiting = sa.text("started_at IS NULL AND finished_at IS NULL")
    op.create_index(
        "ix_jobs_waiting_tenant_id_priority_sent_at_id",
        "jobs",
        ["tenant_id", "priority", "sent_at", "id"],
        sqlite_where=waiting,
        postgresql_where=waiting,
    )


def downgrade() -> None:
    """Revert."""
    op.drop_index("ix_jobs_waiting_tenant_id_priority_sent_at_id", "jobs")
