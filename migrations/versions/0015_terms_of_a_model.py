"""Whether a model has a term is answered by the index alone.

Revision: 0015
"""

from alembic import op

revision = "0015"
down_revision = "0014"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Apply."""
    op.create_index(
        "ix_model_terms_model_id_kind_term", "model_terms", ["model_id", "kind", "term"]
    )
    op.drop_index("ix_model_terms_model_id", "model_terms")


def downgrade() -> None:
    """Revert."""
    op.create_index("ix_model_terms_model_id", "model_terms", ["model_id"])
    op.drop_index("ix_model_terms_model_id_kind_term", "model_terms")
