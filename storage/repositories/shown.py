"""Deltas and jobs as answers show them: columns by one statement, not entities.

Fifty entities with their relationships take three times as long to make as to read.
"""

from collections.abc import Sequence
from datetime import datetime
from typing import Any, Final, NamedTuple, Self

from sqlalchemy import and_, bindparam, func, select

from deltadock.names import DEFAULT
from deltadock.storage.documents import DeltaOptions
from deltadock.storage.tables import (
    AliasRow,
    BaseRow,
    DeltaRow,
    JobPriority,
    JobRow,
    JobState,
    ModelRow,
)


class ShownJob(NamedTuple):
    """A job's columns, named as those of `JobRow`."""

    id: str
    delta_id: str
    state: JobState
    priority: JobPriority
    stage_block: int
    stage_blocks: int
    percent: float
    message: str
    error_code: str | None
    error_message: str | None
    cancel_requested: bool
    lease_owner: str | None
    attempt: int
    created_at: datetime
    updated_at: datetime
    started_at: datetime | None
    idle_seconds: float
    expected_at: datetime | None
    finished_at: datetime | None


class ShownBase(NamedTuple):
    """A delta's base."""

    id: str
    name: str
    checkpoint_digest: str


class ShownDelta(NamedTuple):
    """A delta's columns, named as those of `DeltaRow`, with its base and job."""

    job: ShownJob
    base: ShownBase
    default_version: int | None
    alias_names: Sequence[str]
    id: str
    tenant_id: str
    name: str
    version: int
    checkpoint_digest: str
    method: str
    bits: float | None
    options: DeltaOptions
    artifact_digest: str | None
    artifact_bytes: int | None
    ratio: float | None
    true_bits: float | None
    kl: float | None
    agreement: float | None
    nll: float | None
    nll_finetuned: float | None
    nll_base: float | None
    created_by: str | None
    created_at: datetime

    @classmethod
    def of(cls, row: Sequence[Any]) -> Self:
        """Convert a row of `SELECT_DELTAS`."""
        job, base = _JOBS, _JOBS + _BASES
        default, aliases, *own = row[base:]
        names = sorted(aliases.split(_COMMA)) if aliases else ()
        return cls(ShownJob(*row[:job]), ShownBase(*row[job:base]), default, names, *own)


_COMMA: Final = ","
"""Which no alias contains."""
_JOBS: Final = len(ShownJob._fields)
_BASES: Final = len(ShownBase._fields)

# Of the tables' columns: the entities' would make each row pass through the mapper. Statements of
# one row are made once, with parameters; making one takes longer than the database does.
_job, _base, _delta, _alias, _model = (
    row.__table__.c for row in (JobRow, BaseRow, DeltaRow, AliasRow, ModelRow)
)
_default = AliasRow.__table__.alias("defaults").c

SELECT_JOBS: Final = select(*(_job[name] for name in ShownJob._fields))
"""The columns of `ShownJob`."""

SELECT_DELTAS: Final = (
    select(
        *(_job[name] for name in ShownJob._fields),
        *(_base[name] for name in ShownBase._fields),
        _default.version,
        select(func.aggregate_strings(_alias.alias, _COMMA))
        .where(_alias.delta_id == _delta.id)
        .scalar_subquery(),
        *(_delta[name] for name in ShownDelta._fields[4:]),
    )
    .select_from(DeltaRow.__table__)
    .join(JobRow.__table__, _job.delta_id == _delta.id)
    .join(BaseRow.__table__, _base.id == _delta.base_id)
    .outerjoin(
        _default.version.table,
        and_(_default.model_id == _delta.model_id, _default.alias == DEFAULT),
    )
)
"""The columns of `ShownDelta`."""

JOB: Final = SELECT_JOBS.where(_job.id == bindparam("id"), _job.tenant_id == bindparam("tenant"))

_OWN: Final = SELECT_DELTAS.where(
    _delta.deleted_at.is_(None), _delta.tenant_id == bindparam("tenant")
)
DELTA: Final = _OWN.where(_delta.id == bindparam("id"))
DELTA_OF_VERSION: Final = _OWN.where(
    _delta.name == bindparam("name"), _delta.version == bindparam("version")
)
_meant = AliasRow.__table__.alias("meant").c
DELTA_OF_ALIAS: Final = (
    _OWN.join(_meant.version.table, _meant.delta_id == _delta.id)
    .join(ModelRow.__table__, _model.id == _meant.model_id)
    .where(
        _model.tenant_id == bindparam("tenant"),
        _model.name == bindparam("name"),
        _meant.alias == bindparam("alias"),
    )
)
LINEAGE: Final = select(
    _delta.parent_id, _delta.recipe, _delta.code_version, _delta.code_commit
).where(_delta.id == bindparam("id"), _delta.tenant_id == bindparam("tenant"))
"""The columns of `Lineage`."""
