"""The first tables: checkpoints, bases, uploads, deltas and their jobs.

Revision: 0001
"""

import sqlalchemy as sa
from alembic import op

from deltadock.storage.tables import UtcDateTime

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Apply."""
    op.create_table(
        "checkpoints",
        sa.Column("digest", sa.String(64), nullable=False),
        sa.Column("weights_digest", sa.String(64), nullable=False),
        sa.Column("model_type", sa.String(64), nullable=False),
        sa.Column("total_bytes", sa.BigInteger(), nullable=False),
        sa.Column("created_at", UtcDateTime(), nullable=False),
        sa.PrimaryKeyConstraint("digest", name="pk_checkpoints"),
    )
    op.create_index("ix_checkpoints_weights_digest", "checkpoints", ["weights_digest"])

    op.create_table(
        "bases",
        sa.Column("id", sa.String(40), nullable=False),
        sa.Column("name", sa.String(96), nullable=False),
        sa.Column("checkpoint_digest", sa.String(64), nullable=False),
        sa.Column("created_at", UtcDateTime(), nullable=False),
        sa.ForeignKeyConstraint(
            ["checkpoint_digest"], ["checkpoints.digest"], name="fk_bases_checkpoint_digest"
        ),
        sa.PrimaryKeyConstraint("id", name="pk_bases"),
        sa.UniqueConstraint("name", name="uq_bases_name"),
    )

    op.create_table(
        "uploads",
        sa.Column("id", sa.String(40), nullable=False),
        sa.Column("kind", sa.String(16), nullable=False),
        sa.Column("state", sa.String(16), nullable=False),
        sa.Column("checkpoint_digest", sa.String(64), nullable=True),
        sa.Column("calibration_digest", sa.String(64), nullable=True),
        sa.Column("created_at", UtcDateTime(), nullable=False),
        sa.Column("updated_at", UtcDateTime(), nullable=False),
        sa.ForeignKeyConstraint(
            ["checkpoint_digest"], ["checkpoints.digest"], name="fk_uploads_checkpoint_digest"
        ),
        sa.PrimaryKeyConstraint("id", name="pk_uploads"),
    )
    op.create_index("ix_uploads_calibration_digest", "uploads", ["calibration_digest"])

    op.create_table(
        "upload_files",
        sa.Column("upload_id", sa.String(40), nullable=False),
        sa.Column("path", sa.String(255), nullable=False),
        sa.Column("size", sa.BigInteger(), nullable=False),
        sa.Column("sha256", sa.String(64), nullable=False),
        sa.Column("tensors", sa.JSON(), nullable=False),
        sa.ForeignKeyConstraint(
            ["upload_id"], ["uploads.id"], name="fk_upload_files_upload_id", ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("upload_id", "path", name="pk_upload_files"),
    )

    op.create_table(
        "deltas",
        sa.Column("id", sa.String(40), nullable=False),
        sa.Column("name", sa.String(200), nullable=False),
        sa.Column("version", sa.Integer(), nullable=False),
        sa.Column("base_id", sa.String(40), nullable=False),
        sa.Column("checkpoint_digest", sa.String(64), nullable=False),
        sa.Column("method", sa.String(32), nullable=False),
        sa.Column("bits", sa.Double(), nullable=True),
        sa.Column("options", sa.JSON(), nullable=False),
        sa.Column("fingerprint", sa.String(64), nullable=False),
        sa.Column("artifact_digest", sa.String(64), nullable=True),
        sa.Column("artifact_bytes", sa.BigInteger(), nullable=True),
        sa.Column("report", sa.JSON(), nullable=True),
        sa.Column("created_at", UtcDateTime(), nullable=False),
        sa.Column("deleted_at", UtcDateTime(), nullable=True),
        sa.ForeignKeyConstraint(["base_id"], ["bases.id"], name="fk_deltas_base_id"),
        sa.ForeignKeyConstraint(
            ["checkpoint_digest"], ["checkpoints.digest"], name="fk_deltas_checkpoint_digest"
        ),
        sa.PrimaryKeyConstraint("id", name="pk_deltas"),
        sa.UniqueConstraint("name", "version", name="uq_deltas_name_version"),
    )
    op.create_index("ix_deltas_base_id", "deltas", ["base_id"])
    op.create_index("ix_deltas_fingerprint", "deltas", ["fingerprint"])
    op.create_index("ix_deltas_created_at_id", "deltas", ["created_at", "id"])

    op.create_table(
        "jobs",
        sa.Column("id", sa.String(40), nullable=False),
        sa.Column("delta_id", sa.String(40), nullable=False),
        sa.Column("state", sa.String(16), nullable=False),
        sa.Column("stage_block", sa.Integer(), nullable=False),
        sa.Column("stage_blocks", sa.Integer(), nullable=False),
        sa.Column("percent", sa.Double(), nullable=False),
        sa.Column("message", sa.Text(), nullable=False),
        sa.Column("error_code", sa.String(64), nullable=True),
        sa.Column("error_message", sa.Text(), nullable=True),
        sa.Column("cancel_requested", sa.Boolean(), nullable=False),
        sa.Column("lease_owner", sa.String(128), nullable=True),
        sa.Column("lease_expires_at", UtcDateTime(), nullable=True),
        sa.Column("attempt", sa.Integer(), nullable=False),
        sa.Column("sent_at", UtcDateTime(), nullable=False),
        sa.Column("created_at", UtcDateTime(), nullable=False),
        sa.Column("updated_at", UtcDateTime(), nullable=False),
        sa.Column("finished_at", UtcDateTime(), nullable=True),
        sa.ForeignKeyConstraint(["delta_id"], ["deltas.id"], name="fk_jobs_delta_id"),
        sa.PrimaryKeyConstraint("id", name="pk_jobs"),
        sa.UniqueConstraint("delta_id", name="uq_jobs_delta_id"),
    )
    op.create_index("ix_jobs_state", "jobs", ["state"])


def downgrade() -> None:
    """Revert."""
    for table in ("jobs", "deltas", "upload_files", "uploads", "bases", "checkpoints"):
        op.drop_table(table)
