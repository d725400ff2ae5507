"""The index of deltas by fine-tune holds the deleted ones too: a collection asks for those.

Revision: 0023
"""

import sqlalchemy as sa
from alembic import op

revision = "0023"
down_revision = "0022"
branch_labels = None
depends_on = None

NAME = "ix_deltas_checkpoint_digest_tenant_id"
COLUMNS = ["checkpoint_digest", "tenant_id"]
NOT_DELETED = sa.text("deleted_at IS NULL")


def upgrade() -> None:
    """Apply."""
    op.drop_index(NAME, "deltas")
    op.create_index(NAME, "deltas", COLUMNS)


def downgrade() -> None:
    """Revert."""
    op.drop_index(NAME, "deltas")
    op.create_index(NAME, "deltas", COLUMNS, sqlite_where=NOT_DELETED, postgresql_where=NOT_DELETED)
