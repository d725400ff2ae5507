"""Jobs have a priority, a log, and times of their start and expected end.

Revision: 0004
"""

import sqlalchemy as sa
from alembic import op

from deltadock.storage.tables import UtcDateTime

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Apply."""
    op.add_column(
        "jobs", sa.Column("priority", sa.String(16), nullable=False, server_default="normal")
    )
    op.add_column("jobs", sa.Column("started_at", UtcDateTime(), nullable=True))
    op.add_column("jobs", sa.Column("expected_at", UtcDateTime(), nullable=True))
    op.create_index("ix_jobs_created_at_id", "jobs", ["created_at", "id"])
    op.create_table(
        "job_log",
        sa.Column(
            "id",
            sa.BigInteger().with_variant(sa.Integer(), "sqlite"),
            autoincrement=True,
            nullable=False,
        ),
        sa.Column("job_id", sa.String(40), nullable=False),
        sa.Column("at", UtcDateTime(), nullable=False),
        sa.Column("message", sa.Text(), nullable=False),
        sa.ForeignKeyConstraint(
            ["job_id"], ["jobs.id"], name="fk_job_log_job_id", ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("id", name="pk_job_log"),
    )
    op.create_index("ix_job_log_job_id_id", "job_log", ["job_id", "id"])


def downgrade() -> None:
    """Revert."""
    op.drop_table("job_log")
    op.drop_index("ix_jobs_created_at_id", "jobs")
    for column in ("expected_at", "started_at", "priority"):
        op.drop_column("jobs", column)
