"""How long a job had no worker does not count towards the time that it took.

Revision: 0026
"""

import sqlalchemy as sa
from alembic import op

revision = "0026"
down_revision = "0025"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Apply."""
    op.add_column(
        "jobs", sa.Column("idle_seconds", sa.Double(), nullable=False, server_default="0")
    )


def downgrade() -> None:
    """Revert."""
    op.drop_column("jobs", "idle_seconds")
