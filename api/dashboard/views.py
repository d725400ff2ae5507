"""The pages' data, from the same services as the REST routes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final, NamedTuple, Self

from sqlalchemy.orm import Session

from deltadock import errors
from deltadock.api.bases import BasePage, page_of_bases
from deltadock.api.dashboard.figures import ReportFigures
from deltadock.api.deltas.schemas import DeltaOut
from deltadock.api.deltas.service import page_of_deltas, require_delta
from deltadock.api.jobs import JobOut
from deltadock.storage.models import RUNNING_ORDER, DeltaRow, JobState
from deltadock.storage.repositories import DeltaRepository, TotalsRepository
from deltadock.storage.repositories.listing import DeltaFilter, DeltaSort

DELTAS_PER_PAGE: Final = 50
BASES_SHOWN: Final = 50

_RETRY: Final = "Retry: finished blocks are not recomputed."

ADVICE: Final[Mapping[str, str]] = MappingProxyType(
    {
        errors.NonFiniteWeights.code: (
            "The fine-tune diverged or was saved badly. Upload a checkpoint without NaN and "
            "infinities; nothing stored needs to be removed."
        ),
        errors.ArchitectureMismatch.code: (
            "A delta needs a base with the same tensors. Register the checkpoint that the "
            "fine-tune started from, and use it as the base."
        ),
        errors.InvalidCalibration.code: (
            "Calibrate with a few hundred lines of text like the fine-tune's own, as UTF-8 "
            ".txt or .jsonl."
        ),
        errors.UnsupportedModel.code: (
            "This model family cannot be run for calibration. The method “exact” needs none."
        ),
        errors.DamagedBlob.code: "Stored bytes are damaged. Upload the checkpoint again.",
        errors.WorkerLost.code: (f"Give the worker more memory, or see its log. {_RETRY}"),
        errors.Unavailable.code: f"A service did not answer; GET /readyz says which. {_RETRY}",
        errors.Cancelled.code: _RETRY,
        errors.DeltadockError.code: f"See the worker's log for the cause. {_RETRY}",
    }
)


class DeltaEntry(NamedTuple):
    """A delta and its job."""

    delta: DeltaOut
    job: JobOut

    @classmethod
    def of(cls, delta: DeltaRow) -> Self:
        """Convert a row."""
        return cls(DeltaOut.of(delta), JobOut.of(delta.job))

    @property
    def poll_interval(self) -> str | None:
        """htmx's polling interval; None once the job has ended."""
        if self.job.state.is_final:
            return None
        return "3s" if self.job.state is JobState.QUEUED else "1s"


@dataclass(frozen=True, slots=True)
class Totals:
    """Bytes stored, and bytes of the bases and of full checkpoints."""

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

    entries: Sequence[DeltaEntry]
    next: str | None
    bases: BasePage
    totals: Totals


@dataclass(frozen=True, slots=True)
class DeltaView:
    """One delta's page; `figures` is None until there is a report."""

    entry: DeltaEntry
    figures: ReportFigures | None


class Stage(NamedTuple):
    """A stage of a job; `status` is done, current or ahead."""

    name: JobState
    status: str


def overview(
    session: Session, tenant_id: str, *, after: str | None, wanted: DeltaFilter, sort: DeltaSort
) -> Overview:
    """A page of deltas, the first bases by name, and the totals over all deltas.

    Raises:
        InvalidInput: `after` is not a cursor of this sort.
    """
    deltas, next_after = page_of_deltas(
        session, tenant_id, limit=DELTAS_PER_PAGE, after=after, wanted=wanted, sort=sort
    )
    return Overview(
        [DeltaEntry.of(delta) for delta in deltas],
        next_after,
        page_of_bases(session, tenant_id, limit=BASES_SHOWN, after=None),
        totals(session, tenant_id),
    )


def totals(session: Session, tenant_id: str) -> Totals:
    """The totals over all deltas and bases of the tenant."""
    return Totals(**TotalsRepository(session, tenant_id).read()._asdict())


def entry(session: Session, tenant_id: str, delta_id: str) -> DeltaEntry:
    """One delta and its job.

    Raises:
        NotFound: there is none, or it was deleted.
    """
    return DeltaEntry.of(require_delta(session, tenant_id, delta_id))


def delta_view(session: Session, tenant_id: str, delta_id: str) -> DeltaView:
    """One delta with its report.

    Raises:
        NotFound: there is none, or it was deleted.
    """
    delta = require_delta(session, tenant_id, delta_id)
    report = DeltaRepository(session, tenant_id).report(delta.id)
    return DeltaView(DeltaEntry.of(delta), ReportFigures.of(report) if report else None)


def stages(job: JobOut) -> list[Stage]:
    """The stages of a running job."""
    current = RUNNING_ORDER.index(job.state) if job.state in RUNNING_ORDER else len(RUNNING_ORDER)
    return [
        Stage(state, "done" if i < current else "current" if i == current else "ahead")
        for i, state in enumerate(RUNNING_ORDER)
    ]


def advice(job: JobOut) -> str | None:
    """What to do about a failed or cancelled job; None where its error message says it."""
    return ADVICE.get(job.error.code) if job.error else None
