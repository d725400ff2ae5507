"""What the pages show, gathered through the same services as the REST routes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple, Self

from sqlalchemy.orm import Session

from deltadock.api.bases.schemas import BaseOut
from deltadock.api.dashboard.advice import advice_for
from deltadock.api.dashboard.figures import Figures
from deltadock.api.deltas.schemas import DeltaOut
from deltadock.api.deltas.service import get_delta, page_of_deltas
from deltadock.api.jobs.schemas import JobOut
from deltadock.storage.models import RUNNING_ORDER, DeltaRow, JobState
from deltadock.storage.repositories import BaseRepository, DeltaRepository

PAGE: Final = 50
"""Deltas on a page."""


class Entry(NamedTuple):
    """One delta in brief, and how its job stands."""

    delta: DeltaOut
    job: JobOut

    @classmethod
    def of(cls, delta: DeltaRow) -> Self:
        """The public forms of a row."""
        return cls(DeltaOut.of(delta), JobOut.of(delta.job))

    @property
    def polls(self) -> str | None:
        """How often a page asks again; None once nothing will change."""
        if self.job.state.is_final:
            return None
        return "3s" if self.job.state is JobState.QUEUED else "1s"


@dataclass(frozen=True, slots=True)
class Totals:
    """Bytes that are stored, against those of the bases and full checkpoints."""

    deltas: int
    artifact_bytes: int
    base_bytes: int
    checkpoint_bytes: int

    @property
    def longest(self) -> int:
        """Bytes of the longer of the two bars."""
        return self.base_bytes + max(self.artifact_bytes, self.checkpoint_bytes, 1)


@dataclass(frozen=True, slots=True)
class Overview:
    """The list page."""

    entries: Sequence[Entry]
    next: str | None
    bases: Sequence[BaseOut]
    totals: Totals


@dataclass(frozen=True, slots=True)
class DeltaPage:
    """One delta's page; `figures` is None until there is a report."""

    entry: Entry
    figures: Figures | None


class Stage(NamedTuple):
    """A stage of a job: done, current or still to come."""

    name: JobState
    status: str


def overview(session: Session, after: str | None) -> Overview:
    """A page of deltas, newest first, and what all of them come to.

    Raises:
        InvalidInput: `after` is not what a page ended with.
    """
    deltas, following = page_of_deltas(session, limit=PAGE, after=after)
    bases = [BaseOut.of(base) for base in BaseRepository(session).all()]
    return Overview([Entry.of(delta) for delta in deltas], following, bases, _sum(session, bases))


def totals(session: Session) -> Totals:
    """What all deltas come to."""
    return _sum(session, [BaseOut.of(base) for base in BaseRepository(session).all()])


def entry(session: Session, delta_id: str) -> Entry:
    """One delta in brief.

    Raises:
        NotFound: there is none, or it was deleted.
    """
    return Entry.of(get_delta(session, delta_id))


def delta_page(session: Session, delta_id: str) -> DeltaPage:
    """One delta with its report.

    Raises:
        NotFound: there is none, or it was deleted.
    """
    delta = get_delta(session, delta_id)
    return DeltaPage(Entry.of(delta), Figures.of(delta.report) if delta.report else None)


def stages(job: JobOut) -> list[Stage]:
    """A running job's stages, each done, current or still to come."""
    at = RUNNING_ORDER.index(job.state) if job.state in RUNNING_ORDER else len(RUNNING_ORDER)
    return [
        Stage(state, "done" if i < at else "current" if i == at else "ahead")
        for i, state in enumerate(RUNNING_ORDER)
    ]


def advice(job: JobOut) -> str | None:
    """What to do about a job that failed or was cancelled."""
    return advice_for(job.error.code) if job.error else None


def _sum(session: Session, bases: Sequence[BaseOut]) -> Totals:
    # Two names may stand for one checkpoint.
    sizes: Mapping[str, int] = {
        base.checkpoint.digest: base.checkpoint.total_bytes for base in bases
    }
    deltas = DeltaRepository(session).totals()
    return Totals(
        deltas=deltas.deltas,
        artifact_bytes=deltas.artifact_bytes,
        base_bytes=sum(sizes.values()),
        checkpoint_bytes=deltas.checkpoint_bytes,
    )
