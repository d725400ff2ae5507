"""Lists of deltas and jobs: filters, sorts and keyset pages, each by an index at any size.

A page's statement walks one index in its order and stops at the limit. Which one, is decided here
rather than by the planner, since SQLite has no statistics of how often a value occurs: of the
filters' values, one that few rows have (`RARE`) drives the statement; without one, the sort does.
The columns of the other filters are hidden from the planner (`unindexed`).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from typing import Any, Final, TypeVarTuple

from sqlalchemy import ColumnElement, Select, and_, exists, func, select, true, tuple_, union_all
from sqlalchemy.orm import InstrumentedAttribute, Session

from deltadock.storage.database import unindexed
from deltadock.storage.repositories.shown import ShownDelta, ShownJob
from deltadock.storage.repositories.terms import RARE, TermFilter
from deltadock.storage.tables import DeltaRow, JobRow, JobState

Row = TypeVarTuple("Row")

Key = tuple[datetime | str | float | int, ...]
"""Where a row is in a sort: the cursor of the page that follows it."""


class DeltaSort(StrEnum):
    """Orders of a list of deltas."""

    NEWEST = "newest"
    NAME = "name"
    """By name, then version."""
    SIZE = "size"
    """Of the artifact, largest first; unfinished deltas are left out."""
    KL = "kl"
    """Lowest first; deltas without the figure are left out."""


@dataclass(frozen=True, slots=True)
class DeltaFilter:
    """Which deltas a list contains; None: any."""

    base_id: str | None = None
    method: str | None = None
    state: JobState | None = None
    created_by: str | None = None
    name: str | None = None
    tag: str | None = None
    text: str | None = None
    """Words, or beginnings of words, of the model's name or description."""


ANY_DELTA: Final = DeltaFilter()


@dataclass(frozen=True, slots=True)
class _Order:
    columns: Sequence[InstrumentedAttribute[Any] | ColumnElement[Any]]
    descending: bool

    def sorted(self) -> "_Order":
        """The same, hidden from the planner, which would walk an index in this order."""
        columns = [func.coalesce(column, column) for column in self.columns]
        return _Order(columns, self.descending)


_ORDERS: Final = {
    DeltaSort.NEWEST: _Order((DeltaRow.created_at, DeltaRow.id), descending=True),
    DeltaSort.NAME: _Order((DeltaRow.name, DeltaRow.version), descending=False),
    DeltaSort.SIZE: _Order((DeltaRow.artifact_bytes, DeltaRow.id), descending=True),
    DeltaSort.KL: _Order((DeltaRow.kl, DeltaRow.id), descending=False),
}
_OF_JOBS: Final = _Order((JobRow.created_at, JobRow.delta_id), descending=True)


def key_of(delta: ShownDelta, sort: DeltaSort) -> Key:
    """The delta's place in the sort."""
    return tuple(getattr(delta, str(column.key)) for column in _ORDERS[sort].columns)


def find_page(
    session: Session,
    tenant_id: str,
    *,
    wanted: DeltaFilter,
    sort: DeltaSort,
    after: Key | None,
    limit: int,
) -> Sequence[str]:
    """Ids of up to `limit` deltas of the tenant that follow `after`, in order."""
    filters = {
        column: value
        for column, value in (
            (DeltaRow.name, wanted.name),
            (DeltaRow.base_id, wanted.base_id),
            (DeltaRow.created_by, wanted.created_by),
            (DeltaRow.method, wanted.method),
        )
        if value is not None
    }
    owned = DeltaRow.tenant_id == tenant_id
    terms = TermFilter(session, tenant_id, tag=wanted.tag, text=wanted.text)
    of_models = terms.conditions(DeltaRow.model_id)
    driver: ColumnElement[Any] | InstrumentedAttribute[Any] | None = None
    if terms.few is not None:
        of_models.append(DeltaRow.model_id.in_(terms.few))
        if _is_rare(session, of_models[-1]):
            driver, owned = DeltaRow.model_id, unindexed(DeltaRow.tenant_id) == tenant_id
    order = _ORDERS[sort]
    for column, value in filters.items():
        if driver is not None:
            break
        if _is_rare(session, and_(owned, column == value, DeltaRow.deleted_at.is_(None))):
            driver = column
    if driver is not None:
        order = order.sorted()
    else:
        if wanted.state is not None and not of_models:
            of_state = and_(JobRow.tenant_id == tenant_id, JobRow.state == wanted.state)
            if sort is DeltaSort.NEWEST or _is_rare(session, of_state):
                return _by_jobs(session, of_state, filters, sort, after, limit)
        if sort is DeltaSort.NEWEST:
            # These indexes are in this order.
            driver = next((column for column in filters if column is not DeltaRow.name), None)
    conditions = [
        (column if column is driver else unindexed(column)) == value
        for column, value in filters.items()
    ]
    if wanted.state is not None:
        conditions.append(
            exists().where(JobRow.delta_id == DeltaRow.id, JobRow.state == wanted.state)
        )
    query = select(DeltaRow.id).where(owned, DeltaRow.deleted_at.is_(None), *conditions, *of_models)
    return session.scalars(_ordered(query, order, after).limit(limit)).all()


@dataclass(frozen=True, slots=True)
class JobFilter:
    """Which jobs a list contains; None, or no states: any."""

    states: Sequence[JobState] = ()
    delta_id: str | None = None
    base_id: str | None = None
    created_from: datetime | None = None
    created_before: datetime | None = None


ANY_JOB: Final = JobFilter()


def key_of_job(job: ShownJob) -> Key:
    """The job's place in the list."""
    return job.created_at, job.delta_id


def find_jobs(
    session: Session, tenant_id: str, *, wanted: JobFilter, after: Key | None, limit: int
) -> Sequence[str]:
    """Ids of up to `limit` jobs of the tenant that follow `after`, newest first."""
    conditions = [JobRow.tenant_id == tenant_id]
    if wanted.created_from is not None:
        conditions.append(JobRow.created_at >= wanted.created_from)
    if wanted.created_before is not None:
        conditions.append(JobRow.created_at < wanted.created_before)
    if wanted.delta_id is not None:
        conditions.append(JobRow.delta_id == wanted.delta_id)
    if wanted.base_id is not None:
        of_base = and_(DeltaRow.tenant_id == tenant_id, DeltaRow.base_id == wanted.base_id)
        if _is_rare(session, of_base):
            conditions.append(
                JobRow.delta_id.in_(session.scalars(select(DeltaRow.id).where(of_base)).all())
            )
        else:
            conditions.append(
                exists().where(DeltaRow.id == JobRow.delta_id, DeltaRow.base_id == wanted.base_id)
            )
    # One walk of the index per state.
    each = [
        _ordered(
            select(JobRow.id, JobRow.created_at, JobRow.delta_id).where(*conditions, of_state),
            _OF_JOBS,
            after,
        )
        .limit(limit)
        .subquery()
        for of_state in ([JobRow.state == state for state in set(wanted.states)] or [true()])
    ]
    found = union_all(*(select(walk) for walk in each)).subquery()
    return session.scalars(
        select(found.c.id).order_by(found.c.created_at.desc(), found.c.delta_id.desc()).limit(limit)
    ).all()


def _by_jobs(
    session: Session,
    of_state: ColumnElement[bool],
    filters: dict[InstrumentedAttribute[Any], str],
    sort: DeltaSort,
    after: Key | None,
    limit: int,
) -> Sequence[str]:
    """Like `find_page`, by the jobs in one state."""
    matching = and_(
        DeltaRow.deleted_at.is_(None), *(column == value for column, value in filters.items())
    )
    if sort is DeltaSort.NEWEST:
        delta = exists().where(DeltaRow.id == JobRow.delta_id, matching)
        query = select(JobRow.delta_id).where(of_state, delta)
        return session.scalars(_ordered(query, _OF_JOBS, after).limit(limit)).all()
    rare = session.scalars(select(JobRow.delta_id).where(of_state)).all()
    query = select(DeltaRow.id).where(DeltaRow.id.in_(rare), matching)
    return session.scalars(_ordered(query, _ORDERS[sort], after).limit(limit)).all()


def _ordered(query: Select[*Row], order: _Order, after: Key | None) -> Select[*Row]:
    columns = order.columns
    if after is not None:
        place = tuple_(*columns)
        query = query.where(place < after if order.descending else place > after)
    else:
        query = query.where(columns[0].is_not(None))
    return query.order_by(*(c.desc() if order.descending else c.asc() for c in columns))


def _is_rare(session: Session, condition: ColumnElement[bool]) -> bool:
    first = select(1).where(condition).limit(RARE + 1).subquery()
    return (session.scalar(select(func.count()).select_from(first)) or 0) <= RARE
