"""Tenants take turns in the queue of jobs: a tenant's queue and its last start have indexes.

Revision: 0027
"""

from alembic import op

revision = "0027"
down_revision = "0026"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Apply."""
    op.drop_index("ix_jobs_state_priority_sent_at_id", "jobs")
    op.create_index("ix_jobs_state_priority", "jobs", ["state", "priority"])
    columns = ["tenant_id", "state", "priority", "sent_at", "id"]
    op.create_index("ix_jobs_tenant_id_state_priority_sent_at_id", "jobs", columns)
    op.create_index("ix_jobs_tenant_id_started_at", "jobs", ["tenant_id", "started_at"])


def downgrade() -> None:
    """Revert."""
    op.drop_index("ix_jobs_tenant_id_started_at", "jobs")
    op.drop_index("ix_jobs_tenant_id_state_priority_sent_at_id", "jobs")
    op.drop_index("ix_jobs_state_priority", "jobs")
    columns = ["state", "priority", "sent_at", "id"]
    op.create_index("ix_jobs_state_priority_sent_at_id", "jobs", columns)
