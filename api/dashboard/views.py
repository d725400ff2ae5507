"""The pages' data, from the same services as the REST routes."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from types import MappingProxyType
from typing import Final, NamedTuple, Self

from sqlalchemy.orm import Session

from deltadock import errors
from deltadock.api.dashboard.charts import Point
from deltadock.api.dashboard.figures import ReportFigures
from deltadock.api.deltas.lookup import show_delta
from deltadock.api.deltas.schemas import DeltaOut, LineageOut
from deltadock.api.deltas.service import detail_of, page_of_deltas
from deltadock.api.jobs import JobOut, describe_jobs, page_of_jobs
from deltadock.api.registry.schemas import AliasMoveOut, ModelCardOut
from deltadock.api.registry.service import card_of, moves_of, require_model
from deltadock.artifacts.checkpoint import ADAPTER_TYPE
from deltadock.model_target import not_served
from deltadock.storage.repositories import (
    BaseRepository,
    CheckpointRepository,
    DeltaRepository,
    KeyRepository,
    ModelRepository,
    TotalsRepository,
)
from deltadock.storage.repositories.deltas import COUNTED, EXACT_METHOD, Sibling
from deltadock.storage.repositories.listing import DeltaFilter, DeltaSort, JobFilter
from deltadock.storage.repositories.shown import ShownDelta
from deltadock.storage.tables import RUNNING_ORDER, JobState
from deltadock.words import MISSING, percentage, ratio, significant, size

DELTAS_PER_PAGE: Final = 50
SIBLINGS_SHOWN: Final = 50
MOVES_SHOWN: Final = 20
BASE_ROLE: Final = "bare base"
FINETUNE_ROLE: Final = "the fine-tune"

_RETRY: Final = "Retry: finished blocks are not recomputed."

ADVICE: Final[Mapping[str, str]] = MappingProxyType(
    {
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
        errors.DamagedBlob.code: (
            "Stored bytes are damaged. Restore them from a backup, or upload the checkpoint "
            f"again. {_RETRY}"
        ),
        errors.WorkerLost.code: (f"Give the worker more memory, or see its log. {_RETRY}"),
        errors.Unavailable.code: f"A service did not answer; /readyz says which. {_RETRY}",
        errors.Cancelled.code: _RETRY,
        errors.DeltadockError.code: f"See the worker's log for the cause. {_RETRY}",
    }
)


OF_A_TEXT: Final = frozenset({"kl", "agreement", "nll"})
"""Figures that two deltas share a scale of only if they were measured on the same text."""


class DeltaEntry(NamedTuple):
    """A delta and its job."""

    delta: DeltaOut
    job: JobOut

    @classmethod
    def of(cls, delta: ShownDelta) -> Self:
        """Convert a row."""
        return cls(DeltaOut.of(delta), JobOut.of(delta.job))

    @property
    def reference(self) -> str:
        """What the api calls it: `project/model:3`."""
        return f"{self.delta.name}:{self.delta.version}"

    @property
    def is_alarming(self) -> bool:
        """Whether the job failed; one that was cancelled on request did what it was told."""
        return self.job.state is JobState.FAILED

    @property
    def elapsed(self) -> float | None:
        """Seconds that workers have had the job, until it ended."""
        if self.job.started_at is None:
            return None
        since = (self.job.finished_at or datetime.now(UTC)) - self.job.started_at
        return since.total_seconds() - self.job.idle_seconds

    @property
    def remaining(self) -> float | None:
        """Seconds until the job is expected to end; None if that is not known, or now."""
        if self.job.expected_at is None or self.job.state.is_final:
            return None
        left = (self.job.expected_at - datetime.now(UTC)).total_seconds()
        return left if round(left) > 0 else None

    @property
    def poll_interval(self) -> str | None:
        """htmx's polling interval; None once the job has ended."""
        if self.job.state.is_final:
            return None
        return "3s" if self.job.state is JobState.QUEUED else "1s"


class Count(NamedTuple):
    """A number of deltas; there may be more than were counted."""

    number: int
    is_more: bool

    def __str__(self) -> str:
        return f"{self.number}{'+' if self.is_more else ''}"


@dataclass(frozen=True, slots=True)
class Totals:
    """Bytes stored, and bytes of the bases and of full checkpoints."""

    deltas: int
    artifact_bytes: int
    base_bytes: int
    checkpoint_bytes: int
    states: Mapping[JobState, int]
    """Deltas in the other states, each counted up to `COUNTED`."""

    @property
    def counts(self) -> dict[str, Count]:
        """Deltas by what a list shows of their states; those that are running as one."""
        groups: dict[str, list[JobState]] = {
            "running": [state for state in RUNNING_ORDER if state is not JobState.QUEUED],
            "queued": [JobState.QUEUED],
            "failed": [JobState.FAILED],
            "cancelled": [JobState.CANCELLED],
        }
        counts = {"ready": Count(self.deltas, is_more=False)}
        for name, states in groups.items():
            numbers = [self.states[state] for state in states]
            counts[name] = Count(sum(numbers), is_more=max(numbers) >= COUNTED)
        return counts

    @property
    def longest(self) -> int:
        """Bytes of the longer of the two bars."""
        return self.base_bytes + max(self.artifact_bytes, self.checkpoint_bytes, 1)


class ModelGroup(NamedTuple):
    """Versions of one model that stand together in a list."""

    name: str
    entries: Sequence[DeltaEntry]


@dataclass(frozen=True, slots=True)
class Overview:
    """The list page."""

    entries: Sequence[DeltaEntry]
    next: str | None
    totals: Totals

    @property
    def groups(self) -> list[ModelGroup]:
        """The entries by model, in the order in which the models come first."""
        groups: dict[str, list[DeltaEntry]] = {}
        for entry in self.entries:
            groups.setdefault(entry.delta.name, []).append(entry)
        return [ModelGroup(name, entries) for name, entries in groups.items()]


class Tried(NamedTuple):
    """A model that answers under "Try it", and what it is: bare base, fine-tune, or its method."""

    name: str
    role: str
    checkpoints: Sequence[str]
    """Digests; the first that says so decides whether it has a chat template."""
    chats: bool | None = None
    """Whether it has a chat template; None: not known."""


@dataclass(frozen=True, slots=True)
class DeltaView:
    """One delta's page; `figures` is None until there is a report."""

    entry: DeltaEntry
    lineage: LineageOut
    parent: DeltaEntry | None
    figures: ReportFigures | None
    siblings: Sequence[Sibling]
    """Ready deltas of the same fine-tune, this one too."""
    exact: Sibling | None
    """The fine-tune itself, if it is stored as an exact delta."""
    finetune_bytes: int | None
    """Size of the fine-tuned checkpoint, if it is still stored, and a whole model."""
    tried: Sequence[Tried]
    not_served: str | None
    created_by_name: str | None
    """Of the key that asked for it."""
    """Why no node answers with it, and what to do; None: nodes serve its family."""
    """Base, fine-tune and delta."""

    @property
    def finetune_name(self) -> str:
        """The name under which the fine-tune is stored as a delta."""
        project, _, model = self.entry.delta.name.partition("/")
        return f"{project}/{model[:80]}-finetuned"

    @property
    def points(self) -> list[Point]:
        """Rate and distortion of this delta and its siblings; none if it has not both."""
        points = points_of(self.siblings, [self.entry.delta.id])
        return points if any(point.style == "this" for point in points) else []


@dataclass(frozen=True, slots=True)
class ModelView:
    """One model's page."""

    card: ModelCardOut
    entries: Sequence[DeltaEntry]
    next: str | None
    history: Sequence[AliasMoveOut]


class Difference(NamedTuple):
    """A row of a comparison."""

    label: str
    values: Sequence[str]
    best: int | None
    """Which value is the best, where one is."""

    @property
    def differs(self) -> bool:
        """Whether the values are not all equal."""
        return len(set(self.values)) > 1


class Stage(NamedTuple):
    """A stage of a job; `status` is done, current or ahead."""

    name: JobState
    status: str


def overview(
    session: Session, tenant_id: str, *, after: str | None, wanted: DeltaFilter, sort: DeltaSort
) -> Overview:
    """A page of deltas, and the totals over all deltas.

    Raises:
        NotFound: `after` is not a cursor of this sort.
    """
    deltas, next_after = page_of_deltas(
        session, tenant_id, limit=DELTAS_PER_PAGE, after=after, wanted=wanted, sort=sort
    )
    return Overview(
        [DeltaEntry.of(delta) for delta in deltas], next_after, totals(session, tenant_id)
    )


def totals(session: Session, tenant_id: str) -> Totals:
    """The totals over all deltas and bases of the tenant."""
    return Totals(
        **TotalsRepository(session, tenant_id).read()._asdict(),
        states=DeltaRepository(session, tenant_id).count_by_state(),
    )


def entry(session: Session, tenant_id: str, delta_id: str) -> DeltaEntry:
    """One delta and its job, with its place in the queue.

    Raises:
        NotFound: there is none, or it was deleted.
    """
    delta = show_delta(session, tenant_id, delta_id)
    return DeltaEntry(DeltaOut.of(delta), describe_jobs(session, tenant_id, [delta.job])[0])


def delta_view(session: Session, tenant_id: str, delta_id: str) -> DeltaView:
    """One delta with its report.

    Raises:
        NotFound: there is none, or it was deleted.
        NotReady: a bare name has no default version yet.
    """
    delta = show_delta(session, tenant_id, delta_id)
    deltas = DeltaRepository(session, tenant_id)
    report = deltas.report(delta.id)
    detail = detail_of(session, delta)
    parent = deltas.show(detail.lineage.parent) if detail.lineage.parent else None
    siblings = deltas.of_checkpoint(delta.checkpoint_digest, limit=SIBLINGS_SHOWN)
    checkpoint = CheckpointRepository(session, tenant_id).find(delta.checkpoint_digest)
    exact = deltas.exact_twin(delta)
    base = BaseRepository(session, tenant_id).find(delta.base.id)
    own = delta.checkpoint_digest, delta.base.checkpoint_digest
    tried = [Tried(delta.base.name, BASE_ROLE, own[1:])]
    if exact is not None and exact.id != delta.id:
        tried.append(Tried(f"{exact.name}:{exact.version}", FINETUNE_ROLE, own))
    tried.append(Tried(f"{delta.name}:{delta.version}", _role(delta.method), own))
    return DeltaView(
        DeltaEntry(detail, describe_jobs(session, tenant_id, [delta.job])[0]),
        detail.lineage,
        DeltaEntry.of(parent) if parent else None,
        ReportFigures.model_validate(report) if report else None,
        siblings,
        exact,
        checkpoint.total_bytes
        if checkpoint is not None and checkpoint.model_type != ADAPTER_TYPE
        else None,
        with_chats(session, tenant_id, tried),
        None if base is None else not_served(base.checkpoint.model_type),
        KeyRepository(session, tenant_id).names([delta.created_by]).get(delta.created_by)
        if delta.created_by
        else None,
    )


def model_view(session: Session, tenant_id: str, name: str, *, after: str | None) -> ModelView:
    """One model with a page of its versions, newest first, and the last moves of its aliases.

    Raises:
        NotFound: there is none, or it was deleted.
        NotFound: `after` is not a cursor of the versions.
    """
    model = require_model(session, tenant_id, name)
    versions, next_after = page_of_deltas(
        session, tenant_id, limit=DELTAS_PER_PAGE, after=after, wanted=DeltaFilter(name=name)
    )
    moves = ModelRepository(session, tenant_id).history(model, limit=MOVES_SHOWN)
    return ModelView(
        card_of(session, tenant_id, model),
        [DeltaEntry.of(version) for version in versions],
        next_after,
        moves_of(session, tenant_id, moves),
    )


def jobs_page(
    session: Session, tenant_id: str, states: Sequence[JobState], *, limit: int, after: str | None
) -> tuple[list[DeltaEntry], str | None]:
    """A page of jobs with their deltas, newest first; those of deleted deltas are left out.

    Raises:
        NotFound: `after` is not a cursor of this list.
    """
    jobs, next_after = page_of_jobs(
        session, tenant_id, JobFilter(states=states), limit=limit, after=after
    )
    found = DeltaRepository(session, tenant_id).with_ids([job.delta for job in jobs])
    deltas = {delta.id: DeltaOut.of(delta) for delta in found}
    return [DeltaEntry(deltas[job.delta], job) for job in jobs if job.delta in deltas], next_after


def points_of(deltas: Sequence[Sibling], chosen: Sequence[str]) -> list[Point]:
    """Rate and distortion of the deltas that have both; `chosen` (ids) are marked.

    So are those that were measured on another text than the first of `chosen`. An exact delta has
    no place on a logarithmic scale.
    """
    texts = {delta.id: _text_of(delta.checkpoint_digest, delta.digests) for delta in deltas}
    return [
        Point(
            f"{delta.name}:{delta.version}, {delta.method}",
            delta.true_bits,
            delta.kl,
            f"/deltas/{delta.id}",
            "this" if delta.id in chosen else "other",
            texts[delta.id] != texts.get(chosen[0]),
        )
        for delta in deltas
        if delta.true_bits is not None and delta.kl
    ]


def differences(entries: Sequence[DeltaEntry]) -> list[Difference]:
    """What is compared of several deltas, their figures first."""

    def figure(
        label: str,
        name: str,
        show: Callable[[float | None], str],
        best: Callable[..., float] | None,
    ) -> Difference:
        values = [getattr(e.delta.metrics, name) if e.delta.metrics else None for e in entries]
        shown = [show(value) for value in values]
        known = [value for value in values if value is not None]
        is_clear = len(known) == len(values) and len(set(shown)) > 1
        is_clear &= name not in OF_A_TEXT or has_one_text(entries)
        number = values.index(best(known)) if best and is_clear else None
        return Difference(label, shown, number)

    def text(label: str, read: Callable[[DeltaOut], object]) -> Difference:
        return Difference(label, [str(read(entry.delta) or MISSING) for entry in entries], None)

    return [
        figure("True ratio", "ratio", ratio, max),
        figure("KL to the fine-tune", "kl", significant, min),
        figure("Top-1 agreement", "agreement", percentage, max),
        figure("Bits per weight", "true_bits", significant, min),
        # The fine-tune's loss is the aim, not the lowest.
        figure("Loss of the delta", "nll", lambda value: significant(value, 4), None),
        text(
            "Loss of the fine-tune",
            lambda d: significant(d.metrics.nll_finetuned if d.metrics else None, 4),
        ),
        text("Artifact", lambda d: size(d.artifact.bytes) if d.artifact else None),
        text("State", lambda d: d.state),
        text("Aliases", lambda d: ", ".join(d.aliases)),
        text("Method", lambda d: d.method),
        text("Goal", lambda d: d.goal),
        text("Base", lambda d: d.base.name),
        text("Fine-tune", lambda d: d.checkpoint[:12]),
        text("Calibration", _sources),
        text("Seed", lambda d: str(d.seed)),
    ]


def has_one_text(entries: Sequence[DeltaEntry]) -> bool:
    """Whether all were calibrated, and so measured, on the same text."""
    deltas = [entry.delta for entry in entries]
    sources = [delta.calibration.sources if delta.calibration else [] for delta in deltas]
    texts = {
        _text_of(delta.checkpoint, [source.digest for source in found])
        for delta, found in zip(deltas, sources, strict=True)
    }
    return len(texts) == 1


def _text_of(checkpoint: str, digests: Iterable[str | None]) -> frozenset[str]:
    """The texts that a delta was measured on; without one it is sampled from its own fine-tune."""
    texts = frozenset(digest or f"sampled from {checkpoint}" for digest in digests)
    return texts or _text_of(checkpoint, [None])


def _sources(delta: DeltaOut) -> str:
    found = delta.calibration.sources if delta.calibration else []
    return ", ".join(s.digest[:12] if s.digest else "sampled from the fine-tune" for s in found)


def _role(method: str) -> str:
    return FINETUNE_ROLE if method == EXACT_METHOD else method


def tried(session: Session, tenant_id: str, names: Iterable[str]) -> list[Tried]:
    """Models of these names; a delta is looked for before a base."""
    deltas, bases = DeltaRepository(session, tenant_id), BaseRepository(session, tenant_id)
    found = []
    for name in names:
        if delta := deltas.show(name):
            digests = delta.checkpoint_digest, delta.base.checkpoint_digest
            found.append(Tried(name, _role(delta.method), digests))
        elif base := bases.find(name):
            found.append(Tried(name, BASE_ROLE, (base.checkpoint_digest,)))
        else:
            found.append(Tried(name, "not found", ()))
    return with_chats(session, tenant_id, found)


def with_chats(session: Session, tenant_id: str, models: Sequence[Tried]) -> list[Tried]:
    """The models, with whether each has a chat template."""
    digests = {digest for model in models for digest in model.checkpoints}
    has_one = CheckpointRepository(session, tenant_id).chat_templates(digests)
    return [
        model._replace(
            chats=next(
                (known for digest in model.checkpoints if (known := has_one[digest]) is not None),
                None,
            )
        )
        for model in models
    ]


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
