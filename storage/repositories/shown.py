"""Deltas and jobs as answers show them: columns by one statement, not entities.

A list of fifty entities with their relationships takes three times as long to make as to read.
"""

from collections.abc import Sequence
from datetime import datetime
from functools import cache
from typing import Any, Final, NamedTuple, Self

from sqlalchemy import Select, and_, func, select
from sqlalchemy.orm import aliased

from deltadock.names import DEFAULT
from deltadock.storage.models import AliasRow, BaseRow, DeltaRow, JobPriority, JobRow, JobState


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
    name: str
    version: int
    checkpoint_digest: str
    method: str
    bits: float | None
    options: dict[str, Any]
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
        """Convert a row of `select_deltas`."""
        job, base = _JOBS, _JOBS + _BASES
        default, aliases, *own = row[base:]
        names = sorted(aliases.split(_COMMA)) if aliases else ()
        return cls(ShownJob(*row[:job]), ShownBase(*row[job:base]), default, names, *own)


_COMMA: Final = ","
"""Which no alias contains."""
_JOBS: Final = len(ShownJob._fields)
_BASES: Final = len(ShownBase._fields)
_OWN: Final = ShownDelta._fields[4:]


@cache
def select_jobs() -> Select[Any]:
    """The columns of `ShownJob`."""
    return select(*(getattr(JobRow, name) for name in ShownJob._fields))


@cache
def select_deltas() -> Select[Any]:
    """The columns of `ShownDelta`."""
    default = aliased(AliasRow)
    aliases = (
        select(func.aggregate_strings(AliasRow.alias, _COMMA))
        .where(AliasRow.delta_id == DeltaRow.id)
        .scalar_subquery()
    )
    return (
        select(
            *(getattr(JobRow, name) for name in ShownJob._fields),
            *(getattr(BaseRow, name) for name in ShownBase._fields),
            default.version,
            aliases,
            *(getattr(DeltaRow, name) for name in _OWN),
        )
        .select_from(DeltaRow)
        .join(JobRow, JobRow.delta_id == DeltaRow.id)
        .join(BaseRow, BaseRow.id == DeltaRow.base_id)
        .outerjoin(default, and_(default.model_id == DeltaRow.model_id, default.alias == DEFAULT))
    )
