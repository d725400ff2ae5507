"""Deltas store a goal, and calibrate on a mixture of sources.

Revision: 0002
"""

from typing import Any

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None

deltas = sa.table(
    "deltas",
    sa.column("id", sa.String),
    sa.column("bits", sa.Double),
    sa.column("options", sa.JSON),
)


def upgrade() -> None:
    """Apply: a digest becomes a mixture of one source, with the previously fixed size."""
    for delta_id, bits, options in _rows():
        digest = options["calibration"]
        _store(
            delta_id,
            {
                **options,
                "goal": None if bits is None else {"kind": "bits", "value": bits},
                "calibration": None
                if digest is None
                else {
                    "sources": [{"digest": digest, "weight": 1.0}],
                    "tokens": 262144,
                    "length": 2048,
                },
            },
        )


def downgrade() -> None:
    """Revert: only the first text of a mixture is kept."""
    for delta_id, _bits, options in _rows():
        sources = (options["calibration"] or {"sources": []})["sources"]
        digests = [source["digest"] for source in sources if source["digest"]]
        older = {key: options[key] for key in ("seed", "solver")}
        _store(delta_id, {**older, "calibration": digests[0] if digests else None})


def _rows() -> list[Any]:
    return list(op.get_bind().execute(sa.select(deltas.c.id, deltas.c.bits, deltas.c.options)))


def _store(delta_id: str, options: dict[str, Any]) -> None:
    op.get_bind().execute(sa.update(deltas).where(deltas.c.id == delta_id).values(options=options))
