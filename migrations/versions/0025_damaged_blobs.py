"""Blobs that were found damaged are not taken for stored when files are announced.

Revision: 0025
"""

import sqlalchemy as sa
from alembic import op

revision = "0025"
down_revision = "0024"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Apply."""
    op.create_table(
        "damaged_blobs",
        sa.Column("digest", sa.String(64), nullable=False),
        sa.PrimaryKeyConstraint("digest", name="pk_damaged_blobs"),
    )


def downgrade() -> None:
    """Revert."""
    op.drop_table("damaged_blobs")
