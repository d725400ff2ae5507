"""Lists: figures in columns of their own, indexes per sort and filter, jobs' tenant, totals.

Revision: 0010
"""

from typing import Any

import sqlalchemy as sa
from alembic import op

revision = "0010"
down_revision = "0009"
branch_labels = None
depends_on = None

LOCAL = "ten_local"
FIGURES = ("ratio", "true_bits", "kl", "agreement", "nll", "nll_finetuned", "nll_base")
SORTED = (
    ("method", "created_at", "id"),
    ("created_by", "created_at", "id"),
    ("artifact_bytes", "id"),
    ("kl", "id"),
)
SHARED = ("artifact_digest", "checkpoint_digest")

READY = """
    FROM deltas JOIN jobs ON jobs.delta_id = deltas.id
    WHERE deltas.deleted_at IS NULL AND jobs.state = 'ready' AND deltas.tenant_id = tenants.id
"""
FILL_TOTALS = f"""
INSERT INTO totals (tenant_id, deltas, artifact_bytes, checkpoint_bytes, base_bytes)
SELECT tenants.id,
    (SELECT count(*) {READY}),
    (SELECT coalesce(sum(artifact_bytes), 0) FROM
        (SELECT DISTINCT artifact_digest, artifact_bytes {READY}) AS artifacts),
    (SELECT coalesce(sum(total_bytes), 0) FROM checkpoints
        WHERE digest IN (SELECT checkpoint_digest {READY})),
    (SELECT coalesce(sum(total_bytes), 0) FROM checkpoints
        WHERE digest IN (SELECT checkpoint_digest FROM bases WHERE tenant_id = tenants.id))
FROM tenants
"""


def _only(condition: str) -> dict[str, Any]:
    return {"sqlite_where": sa.text(condition), "postgresql_where": sa.text(condition)}


def _figure(name: str) -> str:
    if op.get_bind().dialect.name == "postgresql":
        return f"(report ->> '{name}')::double precision"
    return f"json_extract(report, '$.{name}')"


def upgrade() -> None:
    """Apply."""
    for name in FIGURES:
        op.add_column("deltas", sa.Column(name, sa.Double(), nullable=True))
    op.add_column("deltas", sa.Column("created_by", sa.String(40), nullable=True))
    figures = ", ".join(f"{name} = {_figure(name)}" for name in FIGURES)
    op.execute(f"UPDATE deltas SET {figures} WHERE report IS NOT NULL")
    with op.batch_alter_table("jobs") as batch:
        batch.add_column(
            sa.Column("tenant_id", sa.String(40), nullable=False, server_default=LOCAL)
        )
        batch.create_foreign_key("fk_jobs_tenant_id", "tenants", ["tenant_id"], ["id"])
        batch.drop_index("ix_jobs_created_at_id")
    op.execute(
        "UPDATE jobs SET tenant_id = (SELECT tenant_id FROM deltas WHERE deltas.id = delta_id)"
    )
    for columns in (("created_at", "delta_id"), ("state", "created_at", "delta_id")):
        op.create_index(f"ix_jobs_tenant_id_{'_'.join(columns)}", "jobs", ["tenant_id", *columns])
    op.drop_index("ix_deltas_base_id", "deltas")
    op.drop_index("ix_deltas_tenant_id_created_at_id", "deltas")
    not_deleted = _only("deleted_at IS NULL")
    for columns in (("created_at", "id"), *SORTED):
        name = f"ix_deltas_tenant_id_{'_'.join(columns)}"
        op.create_index(name, "deltas", ["tenant_id", *columns], **not_deleted)
    base = ["tenant_id", "base_id", "created_at", "id"]
    op.create_index("ix_deltas_tenant_id_base_id_created_at_id", "deltas", base)
    for column in SHARED:
        op.create_index(
            f"ix_deltas_{column}_tenant_id", "deltas", [column, "tenant_id"], **not_deleted
        )
    op.create_index("ix_bases_shared_name_id", "bases", ["shared", "name", "id"])
    op.create_index(
        "ix_bases_checkpoint_digest_tenant_id", "bases", ["checkpoint_digest", "tenant_id"]
    )
    op.create_table(
        "totals",
        sa.Column("tenant_id", sa.String(40), nullable=False),
        sa.Column("deltas", sa.Integer(), nullable=False),
        sa.Column("artifact_bytes", sa.BigInteger(), nullable=False),
        sa.Column("checkpoint_bytes", sa.BigInteger(), nullable=False),
        sa.Column("base_bytes", sa.BigInteger(), nullable=False),
        sa.ForeignKeyConstraint(["tenant_id"], ["tenants.id"], name="fk_totals_tenant_id"),
        sa.PrimaryKeyConstraint("tenant_id", name="pk_totals"),
    )
    op.execute(FILL_TOTALS)


def downgrade() -> None:
    """Revert."""
    op.drop_table("totals")
    op.drop_index("ix_bases_checkpoint_digest_tenant_id", "bases")
    op.drop_index("ix_bases_shared_name_id", "bases")
    op.drop_index("ix_deltas_tenant_id_base_id_created_at_id", "deltas")
    for column in SHARED:
        op.drop_index(f"ix_deltas_{column}_tenant_id", "deltas")
    for columns in (("created_at", "id"), *SORTED):
        op.drop_index(f"ix_deltas_tenant_id_{'_'.join(columns)}", "deltas")
    op.create_index(
        "ix_deltas_tenant_id_created_at_id", "deltas", ["tenant_id", "created_at", "id"]
    )
    op.create_index("ix_deltas_base_id", "deltas", ["base_id"])
    for columns in (("created_at", "delta_id"), ("state", "created_at", "delta_id")):
        op.drop_index(f"ix_jobs_tenant_id_{'_'.join(columns)}", "jobs")
    with op.batch_alter_table("jobs") as batch:
        batch.drop_constraint("fk_jobs_tenant_id", type_="foreignkey")
        batch.drop_column("tenant_id")
        batch.create_index("ix_jobs_created_at_id", ["created_at", "id"])
    op.drop_column("deltas", "created_by")
    for name in FIGURES:
        op.drop_column("deltas", name)
