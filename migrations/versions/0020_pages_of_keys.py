"""Keys are listed in pages.

Revision: 0020
"""

from alembic import op

revision = "0020"
down_revision = "0019"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Apply."""
    op.create_index(
        "ix_api_keys_tenant_id_created_at_id", "api_keys", ["tenant_id", "created_at", "id"]
    )
    op.drop_index("ix_api_keys_tenant_id", "api_keys")


def downgrade() -> None:
    """Revert."""
    op.create_index("ix_api_keys_tenant_id", "api_keys", ["tenant_id"])
    op.drop_index("ix_api_keys_tenant_id_created_at_id", "api_keys")
