"""Uploads announce their files, which arrive in parts and are hashed in the background.

Revision: 0006
"""

import sqlalchemy as sa
from alembic import op

from deltadock.storage.tables import UtcDateTime

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Apply."""
    with op.batch_alter_table("uploads") as batch:
        batch.add_column(sa.Column("ignored", sa.JSON(none_as_null=True), nullable=True))
        batch.add_column(
            sa.Column("done_bytes", sa.BigInteger(), nullable=False, server_default="0")
        )
        batch.add_column(sa.Column("error", sa.JSON(none_as_null=True), nullable=True))
        batch.add_column(sa.Column("lease_owner", sa.String(128), nullable=True))
        batch.add_column(sa.Column("lease_expires_at", UtcDateTime(), nullable=True))
    op.create_index(
        "ix_uploads_tenant_id_created_at_id", "uploads", ["tenant_id", "created_at", "id"]
    )
    op.create_index("ix_uploads_state_updated_at", "uploads", ["state", "updated_at"])
    with op.batch_alter_table("upload_files") as batch:
        # Until now a file had a row only once it was stored.
        batch.add_column(
            sa.Column("stored", sa.Boolean(), nullable=False, server_default=sa.true())
        )
        batch.add_column(sa.Column("parts_token", sa.Text(), nullable=True))
    op.create_index("ix_upload_files_sha256", "upload_files", ["sha256"])


def downgrade() -> None:
    """Revert; files that are not stored, and uploads that are completing, are lost."""
    op.execute("DELETE FROM upload_files WHERE NOT stored")
    op.execute("UPDATE uploads SET state = 'open' WHERE state = 'completing'")
    op.drop_index("ix_upload_files_sha256", "upload_files")
    with op.batch_alter_table("upload_files") as batch:
        batch.drop_column("parts_token")
        batch.drop_column("stored")
    op.drop_index("ix_uploads_state_updated_at", "uploads")
    op.drop_index("ix_uploads_tenant_id_created_at_id", "uploads")
    with op.batch_alter_table("uploads") as batch:
        for column in ("lease_expires_at", "lease_owner", "error", "done_bytes", "ignored"):
            batch.drop_column(column)
