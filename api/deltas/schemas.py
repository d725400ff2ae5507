"""Bodies of the delta routes."""

from datetime import datetime
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field

from deltadock.api.deltas.calibration import CalibrationIn, CalibrationOut, Source
from deltadock.api.goals import GoalFields, GoalOut
from deltadock.api.jobs.schemas import EXAMPLE_JOB_ID, JobError, JobOut
from deltadock.api.schemas import EXAMPLE_DIGEST, EXAMPLE_TIME, Digest
from deltadock.storage.models import DeltaRow, JobState

EXAMPLE_DELTA_ID = "dlt_k7wq2mzv5c3xj6nhy4tbr2dfsa"


class DeltaIn(GoalFields):
    """A compression to be done."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "name": "maths/skills",
                    "base": "tiny-base",
                    "checkpoint": EXAMPLE_DIGEST,
                    "method": "adamix",
                    "bits": 1.0,
                    "seed": 0,
                    "solver": "exact",
                    "calibration": {"source": "text", "digest": EXAMPLE_DIGEST},
                }
            ]
        }
    )

    name: str = Field(
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,95}/[A-Za-z0-9][A-Za-z0-9._-]{0,95}$",
        description="project/model; each compression becomes a new version of it.",
    )
    base: str = Field(min_length=1, max_length=96, description="The base's id or name.")
    checkpoint: Digest = Field(description="The fine-tuned checkpoint's digest.")
    seed: int = Field(default=0, ge=0, lt=2**53)
    solver: Literal["exact", "scip"] = Field(
        default="exact", description="What allots the bits; both find the same optimum."
    )
    calibration: CalibrationIn | Source | None = Field(
        default=None,
        description="A source or a mixture; none is text sampled from the fine-tune, for the "
        "methods that need calibration.",
    )


class BaseRefOut(BaseModel):
    """A delta's base."""

    id: str
    name: str = Field(examples=["tiny-base"])
    checkpoint: Digest


class ArtifactOut(BaseModel):
    """A delta's file."""

    digest: Digest
    bytes: int = Field(examples=[262_144])


class MetricsOut(BaseModel):
    """The report in short: size and fidelity against the fine-tuned model (nats per token)."""

    ratio: float | None = Field(default=None, description="Checkpoint bytes per artifact byte.")
    true_bits: float | None = Field(default=None, description="Stored bits per weight, all in.")
    kl: float | None = None
    agreement: float | None = Field(default=None, description="Share of equal next tokens.")
    nll: float | None = None
    nll_finetuned: float | None = None
    nll_base: float | None = None


class DeltaOut(BaseModel):
    """A delta; `state` is its job's."""

    id: str = Field(examples=[EXAMPLE_DELTA_ID])
    name: str = Field(examples=["maths/skills"])
    version: int = Field(examples=[1])
    base: BaseRefOut
    checkpoint: Digest
    method: str = Field(examples=["adamix"])
    bits: float | None = Field(
        examples=[1.0], description="The budget; null where there is none or another goal."
    )
    goal: GoalOut | None
    seed: int
    solver: str
    calibration: CalibrationOut | None
    state: JobState = Field(examples=["ready"])
    percent: float = Field(examples=[100.0])
    job: str = Field(examples=[EXAMPLE_JOB_ID])
    error: JobError | None = None
    artifact: ArtifactOut | None = None
    metrics: MetricsOut | None = None
    created_at: datetime = Field(examples=[EXAMPLE_TIME])

    @classmethod
    def of(cls, delta: DeltaRow) -> Self:
        """The public form of a row."""
        job = JobOut.of(delta.job)
        artifact = None
        if delta.artifact_digest is not None and delta.artifact_bytes is not None:
            artifact = ArtifactOut(digest=delta.artifact_digest, bytes=delta.artifact_bytes)
        return cls(
            id=delta.id,
            name=delta.name,
            version=delta.version,
            base=BaseRefOut(
                id=delta.base.id, name=delta.base.name, checkpoint=delta.base.checkpoint_digest
            ),
            checkpoint=delta.checkpoint_digest,
            method=delta.method,
            bits=delta.bits,
            goal=GoalOut(**delta.options["goal"]) if delta.options["goal"] else None,
            seed=delta.options["seed"],
            solver=delta.options["solver"],
            calibration=CalibrationOut.of(delta.options["calibration"])
            if delta.options["calibration"]
            else None,
            state=job.state,
            percent=job.percent,
            job=job.id,
            error=job.error,
            artifact=artifact,
            metrics=MetricsOut.model_validate(delta.report) if delta.report else None,
            created_at=delta.created_at,
        )


class DeltaAccepted(BaseModel):
    """The delta, and the job that makes it."""

    delta: DeltaOut
    job: JobOut


class DeltaPage(BaseModel):
    """Deltas, newest first. `next` is the `after` of the following page; null: this is the last."""

    data: list[DeltaOut]
    next: str | None = Field(examples=[EXAMPLE_DELTA_ID])


class ReportOut(BaseModel):
    """What the compression measured, per matrix and in total."""

    model_config = ConfigDict(extra="allow")

    method: str = Field(examples=["adamix"])
    nominal_bits: float | None = None
    true_bits: float | None = None
    artifact_bytes: int | None = None
    checkpoint_bytes: int | None = None
    ratio: float | None = None
    kl: float | None = None
    agreement: float | None = None
    matrices: list[dict[str, Any]] = Field(default_factory=list)
    other_tensors: list[dict[str, Any]] = Field(default_factory=list)
