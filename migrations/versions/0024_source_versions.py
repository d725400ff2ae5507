"""An imported file has the version that it was read in: its source may have another one later.

Revision: 0024
"""

import sqlalchemy as sa
from alembic import op

revision = "0024"
down_revision = "0023"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Apply."""
    op.add_column("upload_files", sa.Column("source_version", sa.Text()))


def downgrade() -> None:
    """Revert."""
    op.drop_column("upload_files", "source_version")
