"""What the server answers, as typed and frozen objects; in a notebook each shows as a small table.

Fields have the names and meanings of the OpenAPI description (`tests/client/test_resources.py`
compares them). Fields that a newer server adds are ignored.
"""

from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from html import escape
from typing import Any, Final

from pydantic import BaseModel, ConfigDict

from deltadock import words
from deltadock.errors import Cancelled, DeltadockError, error_for

FINAL_STATES: Final = frozenset({"ready", "failed", "cancelled"})


class Resource(BaseModel):
    """Base class: frozen, tolerant of new fields, a table in a notebook."""

    model_config = ConfigDict(frozen=True, extra="ignore", protected_namespaces=())

    def rows(self) -> Iterator[tuple[str, str]]:
        """What people want to see of it, with labels."""
        for name, value in self:
            if value is not None and not isinstance(value, BaseModel | list | Mapping):
                yield name.replace("_", " "), _text(value)

    def _repr_html_(self) -> str:
        cells = "".join(
            f"<tr><th style='text-align:left'>{escape(label)}</th>"
            f"<td style='text-align:left'>{escape(text)}</td></tr>"
            for label, text in self.rows()
        )
        return f"<table>{cells}</table>"


def _text(value: object) -> str:
    """A value for people."""
    if isinstance(value, float):
        return words.significant(value)
    return words.moment(value) if isinstance(value, datetime) else str(value)


class Checkpoint(Resource):
    """A complete checkpoint."""

    digest: str
    weights_digest: str
    model_type: str
    total_bytes: int


class Base(Resource):
    """A base: a checkpoint under a name, against which deltas are compressed."""

    id: str
    name: str
    checkpoint: Checkpoint
    shared: bool
    created_at: datetime


class Method(Resource):
    """A compression method, and the range of its bit budget (None: it takes none)."""

    name: str
    title: str
    bits_min: float | None
    bits_max: float | None
    needs_calibration: bool
    default: bool


class JobError(Resource):
    """Why a job failed or was cancelled."""

    code: str
    message: str


class Job(Resource):
    """State and progress of a compression."""

    id: str
    delta: str
    state: str
    priority: str
    queue_position: int | None = None
    block: int
    blocks: int
    percent: float
    message: str
    error: JobError | None = None
    can_retry: bool = False
    cancel_requested: bool
    attempt: int
    created_at: datetime
    updated_at: datetime
    started_at: datetime | None = None
    idle_seconds: float = 0.0
    expected_at: datetime | None = None
    finished_at: datetime | None = None

    @property
    def is_final(self) -> bool:
        """Whether it has ended."""
        return self.state in FINAL_STATES

    @property
    def stage(self) -> str:
        """What it does now, such as `compressing (attempt 2): block 2 of 5, matrix 3 of 7`."""
        if self.state == "queued" and self.queue_position:
            return f"queued: number {self.queue_position}"
        if self.is_final:
            return self.state
        state = f"{self.state} (attempt {self.attempt})" if self.attempt > 1 else self.state
        return f"{state}: {self.message}" if self.message else state

    @property
    def elapsed(self) -> float | None:
        """Seconds that workers have had it; None before the first."""
        if self.started_at is None:
            return None
        since = (self.finished_at or datetime.now(UTC)) - self.started_at
        return since.total_seconds() - self.idle_seconds

    @property
    def remaining(self) -> float | None:
        """Expected seconds until its end; None if they cannot be told."""
        if self.is_final or self.expected_at is None:
            return None
        return max(0.0, (self.expected_at - datetime.now(UTC)).total_seconds())

    @property
    def failure(self) -> DeltadockError | None:
        """The error that it ended with, in the class of its code; None if it has none."""
        if self.state == "cancelled":
            return Cancelled(f"Job {self.id} was cancelled. `retry` continues it.")
        return None if self.error is None else error_for(self.error.code, self.error.message)

    def rows(self) -> Iterator[tuple[str, str]]:
        """Its progress."""
        yield "job", self.id
        yield "delta", self.delta
        yield "state", self.stage
        yield "done", words.progress(self.percent)
        if self.elapsed is not None:
            yield "elapsed", words.duration(self.elapsed)
        if self.remaining is not None:
            yield "left", words.duration(self.remaining)
        if self.error is not None:
            yield "error", f"{self.error.code}: {self.error.message}"

    def _repr_html_(self) -> str:
        return f"<progress max='100' value='{self.percent}'></progress>{super()._repr_html_()}"


class LogLine(Resource):
    """One line of a job's log."""

    id: int
    at: datetime
    message: str


class BaseRef(Resource):
    """A delta's base; `checkpoint` is its digest."""

    id: str
    name: str
    checkpoint: str


class Artifact(Resource):
    """A delta's file."""

    digest: str
    bytes: int


class Metrics(Resource):
    """Size and fidelity to the fine-tune; KL and NLL in nats per token."""

    ratio: float | None = None
    true_bits: float | None = None
    kl: float | None = None
    agreement: float | None = None
    nll: float | None = None
    nll_finetuned: float | None = None
    nll_base: float | None = None


class Goal(Resource):
    """What determines a delta's size."""

    kind: str
    value: float

    def __str__(self) -> str:
        return f"{self.kind} {self.value:g}"


class Lineage(Resource):
    """Where a fine-tune comes from."""

    base: str
    parent: str | None
    recipe: dict[str, Any] | None
    commit: str | None
    deltadock: str | None
    calibration: list[str]


class Delta(Resource):
    """A delta: one version of a model."""

    id: str
    name: str
    version: int
    aliases: list[str]
    default_version: int | None
    base: BaseRef
    checkpoint: str
    method: str
    bits: float | None
    goal: Goal | None
    seed: int
    solver: str
    state: str
    percent: float
    job: str
    created_by: str | None
    error: JobError | None = None
    artifact: Artifact | None = None
    metrics: Metrics | None = None
    created_at: datetime
    lineage: Lineage | None = None

    @property
    def reference(self) -> str:
        """Its name with the version, such as `maths/skills:3`."""
        return f"{self.name}:{self.version}"

    def rows(self) -> Iterator[tuple[str, str]]:
        """Its name, state, size and fidelity."""
        yield "delta", self.reference
        yield "id", self.id
        if self.aliases:
            yield "aliases", ", ".join(self.aliases)
        yield "base", self.base.name
        yield "method", f"{self.method}, {self.goal}" if self.goal else self.method
        if self.state == "ready":
            yield "state", self.state
        else:
            yield "state", f"{self.state}, {words.progress(self.percent)}, job {self.job}"
        if self.error is not None:
            yield "error", f"{self.error.code}: {self.error.message}"
        if self.artifact is not None:
            yield "size", words.size(self.artifact.bytes)
            yield "sha256", self.artifact.digest
        metrics = self.metrics or Metrics()
        for label, text in (
            ("ratio", words.ratio(metrics.ratio)),
            ("bits per weight", words.significant(metrics.true_bits)),
            ("KL to the fine-tune", words.nats(metrics.kl)),
            ("top-1 agreement", words.percentage(metrics.agreement)),
        ):
            if text != words.MISSING:
                yield label, text
        yield "created", words.moment(self.created_at)


class Resolved(Resource):
    """What a name means now: the delta, and the artifact's digest and size."""

    name: str
    delta: str
    digest: str
    bytes: int
    artifact: str
    base: str
    base_digest: str


class Report(Resource):
    """A compression's measurements, KL and NLL in nats per token; `model_extra` has more."""

    model_config = ConfigDict(frozen=True, extra="allow", protected_namespaces=())

    method: str
    nominal_bits: float | None = None
    true_bits: float | None = None
    artifact_bytes: int | None = None
    checkpoint_bytes: int | None = None
    ratio: float | None = None
    kl: float | None = None
    kl_base: float | None = None
    agreement: float | None = None
    nll: float | None = None
    nll_finetuned: float | None = None
    nll_base: float | None = None
    base_digest: str | None = None
    parameters: int | None = None
    seconds: float | None = None
    matrices: list[dict[str, Any]]
    other_tensors: list[dict[str, Any]]
    notes: list[str]


class Alias(Resource):
    """What an alias of a model means."""

    alias: str
    version: int
    delta: str
    moved_at: datetime


class AliasMove(Resource):
    """One move of an alias; a version of None is none."""

    id: int
    alias: str
    from_version: int | None
    to_version: int | None
    reason: str
    moved_by: str | None
    moved_by_name: str | None
    at: datetime


class PromotionRule(Resource):
    """When a newer version becomes a model's default by itself; in nats per token."""

    max_kl: float
    max_increase: float = 0.0


class Model(Resource):
    """A model: a name `project/model` with its versions; `aliases` only of a single one."""

    name: str
    tags: list[str]
    last_version: int
    rule: PromotionRule | None = None
    created_at: datetime
    description: str | None = None
    aliases: list[Alias] | None = None


class HeldDelta(Resource):
    """A delta on a node, and the fastest tier that holds it: device, host or disk."""

    artifact: str
    names: list[str]
    tier: str
    bytes: int
    references: int
    pinned: bool


class NodeUsage(Resource):
    """A node's last ten seconds; latencies are means, None without a token."""

    tokens_per_second: float
    first_token_seconds: float | None = None
    inter_token_seconds: float | None = None
    memory_bytes: int | None = None
    memory_limit: int | None = None


class Node(Resource):
    """An inference node. From `url` on, only the operator's tenant sees anything."""

    id: str
    state: str
    base: str | None
    base_name: str | None
    adopts: bool
    url: str | None
    capacity: int | None
    admitted: int | None
    delta_slots: int | None
    held: dict[str, int]
    """Deltas by the tier that holds them."""
    deltas: list[HeldDelta]
    """The first of them, fastest tier first."""
    usage: NodeUsage | None = None
    started_at: datetime | None
    seen_at: datetime | None

    @property
    def address(self) -> str:
        """Its URL or, for those who do not see that, its id."""
        return self.url or self.id


class Key(Resource):
    """An API key; `key` itself is known only when it is made."""

    id: str
    tenant: str
    tenant_name: str
    name: str
    prefix: str
    scopes: list[str]
    created_at: datetime
    expires_at: datetime | None = None
    revoked_at: datetime | None = None
    last_used_at: datetime | None = None
    key: str | None = None

    @property
    def state(self) -> str:
        """valid, revoked or expired."""
        if self.revoked_at is not None:
            return "revoked"
        expired = self.expires_at is not None and self.expires_at <= datetime.now(UTC)
        return "expired" if expired else "valid"


class Webhook(Resource):
    """A URL that is told about events; `secret` is known only when it is made."""

    id: str
    url: str
    events: list[str]
    created_at: datetime
    secret: str | None = None


class WebhookMessage(Resource):
    """A message to a webhook: its state, and the last answer's status or why there is none."""

    id: str
    event: str
    state: str
    attempts: int
    status: int | None = None
    error: str | None = None
    body: str
    created_at: datetime
    next_attempt_at: datetime | None = None
    delivered_at: datetime | None = None


class Limits(Resource):
    """What a tenant may use; None is no limit."""

    max_bytes: int | None = None
    max_deltas: int | None = None
    max_jobs: int | None = None
    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None


class TenantUsage(Resource):
    """What a tenant uses of its quotas; jobs are unfinished ones."""

    bytes: int
    deltas: int
    jobs: int


class Tenant(Resource):
    """A tenant; `usage` only of a single one."""

    id: str
    name: str
    is_operator: bool
    limits: Limits
    usage: TenantUsage | None = None
    created_at: datetime


class Preview(Resource):
    """The predicted size of a compression."""

    method: str
    bits: float | None
    artifact_bytes: int
    checkpoint_bytes: int
    parameters: int
    ratio: float
    true_bits: float


class Readiness(Resource):
    """State of what the server depends on."""

    status: str
    checks: dict[str, str]


class Usage(Resource):
    """Tokens of a generation."""

    prompt_tokens: int
    completion_tokens: int


class Generated(Resource):
    """An answer, or a piece of one that is streamed; the last piece has reason and usage."""

    text: str
    finish_reason: str | None = None
    usage: Usage | None = None

    def __str__(self) -> str:
        return self.text


class Accepted(Resource):
    """A delta and its job."""

    delta: Delta
    job: Job
