"""Models with versions, aliases and their history; lineage of deltas.

What a bare name means stays as it is now: the alias `default` is its highest ready version.

Revision: 0011
"""

import sqlalchemy as sa
from alembic import op

from deltadock.storage.ids import new_id
from deltadock.storage.repositories.terms import words_of
from deltadock.storage.tables import UtcDateTime

revision = "0011"
down_revision = "0010"
branch_labels = None
depends_on = None

IDS_PER_INSERT = 1000
DEFAULTS = """
INSERT INTO aliases (model_id, alias, delta_id, version, moved_at)
SELECT deltas.model_id, 'default', deltas.id, deltas.version, deltas.created_at
FROM deltas JOIN (
    SELECT model_id, max(version) AS version FROM deltas
    WHERE deleted_at IS NULL AND artifact_digest IS NOT NULL GROUP BY model_id
) AS latest ON latest.model_id = deltas.model_id AND latest.version = deltas.version
"""
MOVES = """
INSERT INTO alias_moves (model_id, alias, to_version, reason, at)
SELECT model_id, alias, version, 'The highest ready version, when aliases were introduced.',
    moved_at FROM aliases
"""


def upgrade() -> None:
    """Apply."""
    models = op.create_table(
        "models",
        sa.Column("id", sa.String(40), nullable=False),
        sa.Column("tenant_id", sa.String(40), nullable=False),
        sa.Column("name", sa.String(200), nullable=False),
        sa.Column("description", sa.Text(), nullable=False),
        sa.Column("tags", sa.JSON(none_as_null=True), nullable=False),
        sa.Column("rule", sa.JSON(none_as_null=True), nullable=True),
        sa.Column("last_version", sa.Integer(), nullable=False),
        sa.Column("created_at", UtcDateTime(), nullable=False),
        sa.Column("deleted_at", UtcDateTime(), nullable=True),
        sa.ForeignKeyConstraint(["tenant_id"], ["tenants.id"], name="fk_models_tenant_id"),
        sa.PrimaryKeyConstraint("id", name="pk_models"),
        sa.UniqueConstraint("tenant_id", "name", name="uq_models_tenant_id_name"),
    )
    terms = op.create_table(
        "model_terms",
        sa.Column("tenant_id", sa.String(40), nullable=False),
        sa.Column("kind", sa.String(16), nullable=False),
        sa.Column("term", sa.String(64), nullable=False),
        sa.Column("model_id", sa.String(40), nullable=False),
        sa.ForeignKeyConstraint(["tenant_id"], ["tenants.id"], name="fk_model_terms_tenant_id"),
        sa.ForeignKeyConstraint(["model_id"], ["models.id"], name="fk_model_terms_model_id"),
        sa.PrimaryKeyConstraint("tenant_id", "kind", "term", "model_id", name="pk_model_terms"),
    )
    op.create_index("ix_model_terms_model_id", "model_terms", ["model_id"])
    connection = op.get_bind()
    names = connection.execute(
        sa.text(
            "SELECT tenant_id, name, max(version) AS version, min(created_at) AS created_at "
            "FROM deltas GROUP BY tenant_id, name"
        ).columns(
            sa.column("tenant_id", sa.String),
            sa.column("name", sa.String),
            sa.column("version", sa.Integer),
            sa.column("created_at", UtcDateTime()),
        )
    ).all()
    for start in range(0, len(names), IDS_PER_INSERT):
        some = [(new_id("mdl"), *row) for row in names[start : start + IDS_PER_INSERT]]
        op.bulk_insert(
            models,
            [
                {"id": model_id, "tenant_id": tenant, "name": name, "description": "", "tags": [],
                 "last_version": version, "created_at": created_at}
                for model_id, tenant, name, version, created_at in some
            ],
        )  # fmt: skip
        op.bulk_insert(
            terms,
            [
                {"tenant_id": tenant, "kind": "word", "term": word, "model_id": model_id}
                for model_id, tenant, name, *_ in some
                for word in words_of(name)
            ],
        )
    with op.batch_alter_table("deltas") as batch:
        batch.add_column(sa.Column("model_id", sa.String(40), nullable=True))
        batch.add_column(sa.Column("parent_id", sa.String(40), nullable=True))
        batch.add_column(sa.Column("recipe", sa.JSON(none_as_null=True), nullable=True))
        batch.add_column(sa.Column("code_version", sa.String(32), nullable=True))
        batch.add_column(sa.Column("code_commit", sa.String(64), nullable=True))
    op.execute(
        "UPDATE deltas SET model_id = (SELECT models.id FROM models "
        "WHERE models.tenant_id = deltas.tenant_id AND models.name = deltas.name)"
    )
    with op.batch_alter_table("deltas") as batch:
        batch.alter_column("model_id", existing_type=sa.String(40), nullable=False)
        batch.create_foreign_key("fk_deltas_model_id", "models", ["model_id"], ["id"])
        batch.create_foreign_key("fk_deltas_parent_id", "deltas", ["parent_id"], ["id"])
    op.create_index("ix_deltas_model_id", "deltas", ["model_id"])
    op.create_table(
        "aliases",
        sa.Column("model_id", sa.String(40), nullable=False),
        sa.Column("alias", sa.String(64), nullable=False),
        sa.Column("delta_id", sa.String(40), nullable=False),
        sa.Column("version", sa.Integer(), nullable=False),
        sa.Column("moved_at", UtcDateTime(), nullable=False),
        sa.ForeignKeyConstraint(["model_id"], ["models.id"], name="fk_aliases_model_id"),
        sa.ForeignKeyConstraint(["delta_id"], ["deltas.id"], name="fk_aliases_delta_id"),
        sa.PrimaryKeyConstraint("model_id", "alias", name="pk_aliases"),
    )
    op.create_index("ix_aliases_delta_id", "aliases", ["delta_id"])
    op.create_table(
        "alias_moves",
        sa.Column(
            "id",
            sa.BigInteger().with_variant(sa.Integer(), "sqlite"),
            autoincrement=True,
            nullable=False,
        ),
        sa.Column("model_id", sa.String(40), nullable=False),
        sa.Column("alias", sa.String(64), nullable=False),
        sa.Column("from_version", sa.Integer(), nullable=True),
        sa.Column("to_version", sa.Integer(), nullable=True),
        sa.Column("reason", sa.Text(), nullable=False),
        sa.Column("moved_by", sa.String(40), nullable=True),
        sa.Column("at", UtcDateTime(), nullable=False),
        sa.ForeignKeyConstraint(["model_id"], ["models.id"], name="fk_alias_moves_model_id"),
        sa.PrimaryKeyConstraint("id", name="pk_alias_moves"),
    )
    op.create_index("ix_alias_moves_model_id_id", "alias_moves", ["model_id", "id"])
    op.execute(DEFAULTS)
    op.execute(MOVES)


def downgrade() -> None:
    """Revert: a bare name means its highest ready version again."""
    op.drop_table("alias_moves")
    op.drop_table("aliases")
    op.drop_index("ix_deltas_model_id", "deltas")
    with op.batch_alter_table("deltas") as batch:
        batch.drop_constraint("fk_deltas_parent_id", type_="foreignkey")
        batch.drop_constraint("fk_deltas_model_id", type_="foreignkey")
        for column in ("code_commit", "code_version", "recipe", "parent_id", "model_id"):
            batch.drop_column(column)
    op.drop_table("model_terms")
    op.drop_table("models")
