"""Request and response bodies of the delta routes."""

import json
from collections.abc import Mapping
from datetime import datetime
from typing import Annotated, Any, Final, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, Strict, field_validator

from deltadock.api.jobs import EXAMPLE_JOB_ID, JobError, JobOut
from deltadock.api.schemas import (
    EXAMPLE_DELTA_ID,
    EXAMPLE_DIGEST,
    EXAMPLE_TIME,
    Digest,
    GoalFields,
    GoalOut,
    RequestBody,
    goal_choices,
)
from deltadock.compression.options import (
    GOAL_KINDS,
    LENGTH,
    MAX_LENGTH,
    MAX_SOURCES,
    MAX_TOKENS,
    METHODS,
    MIN_LENGTH,
    MIN_TOKENS,
    TOKENS,
)
from deltadock.json_depth import MAX_DEPTH, is_too_deep
from deltadock.names import NAME_PATTERN
from deltadock.storage.documents import MixtureOptions, SourceOptions
from deltadock.storage.repositories.deltas import FIGURES, Lineage
from deltadock.storage.repositories.shown import ShownDelta
from deltadock.storage.tables import DeltaRow, JobPriority, JobState

MAX_RECIPE_BYTES: Final = 16_384

Weight = Annotated[
    float,
    Field(
        gt=0,
        le=1e6,
        allow_inf_nan=False,
        description="Share of the tokens, relative to the other sources'.",
    ),
]


class TextSource(RequestBody):
    """An uploaded calibration text."""

    source: Literal["text"] = "text"
    digest: Digest
    weight: Weight = 1.0


class SampledSource(RequestBody):
    """Text sampled from the fine-tuned model."""

    source: Literal["sampled"]
    weight: Weight = 1.0


CalibrationSource = TextSource | SampledSource


def _sampled() -> list[CalibrationSource]:
    return [SampledSource(source="sampled")]


class CalibrationIn(RequestBody):
    """A mixture of text sources, and how many tokens of it to use."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "sources": [
                        {"digest": EXAMPLE_DIGEST, "weight": 3.0},
                        {"source": "sampled", "weight": 1.0},
                    ],
                    "tokens": TOKENS,
                    "length": LENGTH,
                }
            ]
        }
    )

    sources: list[CalibrationSource] = Field(
        default_factory=_sampled, min_length=1, max_length=MAX_SOURCES
    )
    tokens: int = Field(
        default=TOKENS, ge=MIN_TOKENS, le=MAX_TOKENS, description="Maximum calibration tokens."
    )
    length: int = Field(
        default=LENGTH, ge=MIN_LENGTH, le=MAX_LENGTH, description="Tokens per window."
    )

    @property
    def digests(self) -> list[str]:
        """Digests of the uploaded texts."""
        return [source.digest for source in self.sources if isinstance(source, TextSource)]

    def to_options(self, suffixes: Mapping[str, str]) -> MixtureOptions:
        """The form stored in a delta's row; sampled sources have the digest and suffix None.

        Args:
            suffixes: of the texts, by digest.
        """
        digests = [
            source.digest if isinstance(source, TextSource) else None for source in self.sources
        ]
        sources: list[SourceOptions] = [
            {
                "digest": digest,
                "suffix": suffixes[digest] if digest else None,
                "weight": source.weight,
            }
            for digest, source in zip(digests, self.sources, strict=True)
        ]
        return {"sources": sources, "tokens": self.tokens, "length": self.length}


class SourceOut(BaseModel):
    """One source of a delta's calibration text."""

    source: Literal["text", "sampled"]
    digest: Digest | None
    weight: float = Field(examples=[1.0])


class CalibrationOut(BaseModel):
    """A delta's calibration mixture."""

    sources: list[SourceOut]
    tokens: int = Field(examples=[TOKENS])
    length: int = Field(examples=[LENGTH])

    @classmethod
    def of(cls, options: MixtureOptions) -> Self:
        """Convert the stored form (`CalibrationIn.to_options`)."""
        sources = [
            SourceOut(
                source="text" if source["digest"] else "sampled",
                digest=source["digest"],
                weight=source["weight"],
            )
            for source in options["sources"]
        ]
        return cls(sources=sources, tokens=options["tokens"], length=options["length"])


class DeltaIn(GoalFields):
    """A compression to run."""

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
            ],
            "anyOf": goal_choices(METHODS.values(), GOAL_KINDS),
        }
    )

    name: str = Field(
        pattern=NAME_PATTERN,
        description="project/model; each compression creates a new version.",
    )
    base: str = Field(min_length=1, max_length=96, description="The base's id or name.")
    checkpoint: Digest = Field(description="The fine-tuned checkpoint's digest.")
    seed: int = Field(default=0, ge=0, lt=2**53)
    solver: Literal["exact", "scip"] = Field(
        default="exact", description="Solver of the bit allocation; both find the same optimum."
    )
    priority: Annotated[JobPriority, Strict(False)] = Field(
        default=JobPriority.NORMAL,
        description="Of its job among the tenant's in the queue; changes no result.",
    )
    parent: str | None = Field(
        default=None,
        max_length=300,
        description="The delta whose fine-tune this one continues: its id or name.",
    )
    recipe: dict[str, Any] | None = Field(
        default=None,
        description=f"How the fine-tune was trained; at most {MAX_RECIPE_BYTES} bytes of JSON.",
    )
    commit: str | None = Field(
        default=None, max_length=64, description="The commit of the training code."
    )
    calibration: CalibrationIn | CalibrationSource | None = Field(
        default=None,
        description="A source or a mixture. By default, methods that need calibration use text "
        "sampled from the fine-tune.",
    )

    @field_validator("recipe")
    @classmethod
    def _is_small(cls, recipe: dict[str, Any] | None) -> dict[str, Any] | None:
        if is_too_deep(recipe):
            raise ValueError(f"It is nested more than {MAX_DEPTH} levels deep.")
        try:
            size = len(json.dumps(recipe, allow_nan=False, ensure_ascii=False).encode())
        except ValueError as error:
            raise ValueError("NaN, infinities and half surrogate pairs are no JSON.") from error
        if size > MAX_RECIPE_BYTES:
            raise ValueError(f"It has {size} bytes; at most {MAX_RECIPE_BYTES} are stored.")
        return recipe


class BaseRefOut(BaseModel):
    """A delta's base."""

    id: str
    name: str = Field(examples=["tiny-base"])
    checkpoint: Digest


class ArtifactOut(BaseModel):
    """A delta's artifact file."""

    digest: Digest
    bytes: int = Field(examples=[262_144])


class MetricsOut(BaseModel):
    """Size and fidelity to the fine-tuned model; KL and NLL in nats per token."""

    ratio: float | None = Field(default=None, description="Checkpoint bytes per artifact byte.")
    true_bits: float | None = Field(
        default=None, description="Bits per weight, all stored bytes counted."
    )
    kl: float | None = None
    agreement: float | None = Field(
        default=None,
        description="Top-1 agreement: share of tokens whose most likely next token is the "
        "fine-tune's.",
    )
    nll: float | None = None
    nll_finetuned: float | None = None
    nll_base: float | None = None


class DeltaOut(BaseModel):
    """A delta; `state` is its job's."""

    id: str = Field(examples=[EXAMPLE_DELTA_ID])
    name: str = Field(examples=["maths/skills"])
    version: int = Field(examples=[1])
    aliases: list[str] = Field(
        description="Those that mean this version.", examples=[["default", "prod"]]
    )
    default_version: int | None = Field(
        description="What the bare name means now; null: nothing yet.", examples=[1]
    )
    base: BaseRefOut
    checkpoint: Digest
    method: str = Field(examples=["adamix"])
    bits: float | None = Field(
        examples=[1.0], description="The budget; null for other goals and fixed-size methods."
    )
    goal: GoalOut | None
    seed: int
    solver: str
    calibration: CalibrationOut | None
    state: JobState = Field(examples=["ready"])
    percent: float = Field(examples=[100.0])
    job: str = Field(examples=[EXAMPLE_JOB_ID])
    created_by: str | None = Field(description="The id of the API key that asked for it.")
    error: JobError | None = None
    artifact: ArtifactOut | None = None
    metrics: MetricsOut | None = None
    created_at: datetime = Field(examples=[EXAMPLE_TIME])

    @classmethod
    def of(cls, delta: DeltaRow | ShownDelta) -> Self:
        """Convert a row."""
        job = delta.job
        artifact = None
        if delta.artifact_digest is not None and delta.artifact_bytes is not None:
            artifact = ArtifactOut(digest=delta.artifact_digest, bytes=delta.artifact_bytes)
        return cls(
            id=delta.id,
            name=delta.name,
            version=delta.version,
            aliases=list(delta.alias_names),
            default_version=delta.default_version,
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
            percent=round(job.percent, 1),
            job=job.id,
            created_by=delta.created_by,
            error=JobError.of(job),
            artifact=artifact,
            metrics=MetricsOut(**{figure: getattr(delta, figure) for figure in FIGURES})
            if delta.artifact_digest
            else None,
            created_at=delta.created_at,
        )


class LineageOut(BaseModel):
    """Where a fine-tune comes from."""

    base: Digest = Field(description="The base's checkpoint.")
    parent: str | None = Field(description="A delta's id.", examples=[EXAMPLE_DELTA_ID])
    recipe: dict[str, Any] | None
    commit: str | None = Field(description="Of the training code, as its owner says.")
    deltadock: str | None = Field(description="The version that it was pushed to.")
    calibration: list[Digest] = Field(description="The texts that were given.")


class DeltaDetail(DeltaOut):
    """A delta with its lineage."""

    lineage: LineageOut

    @classmethod
    def of_row(cls, delta: DeltaRow | ShownDelta, lineage: Lineage) -> Self:
        """Convert a row; its lineage is read apart."""
        out = DeltaOut.of(delta)
        sources = out.calibration.sources if out.calibration else []
        shown = LineageOut(
            base=out.base.checkpoint,
            parent=lineage.parent_id,
            recipe=lineage.recipe,
            commit=lineage.code_commit,
            deltadock=lineage.code_version,
            calibration=[source.digest for source in sources if source.digest],
        )
        return cls(**dict(out), lineage=shown)


class DeltaAccepted(BaseModel):
    """The delta and its compression job."""

    delta: DeltaDetail
    job: JobOut


class DeltaPage(BaseModel):
    """Deltas in the order of `sort`. `next` is the next page's `after`; null on the last page."""

    data: list[DeltaOut]
    next: str | None = Field(description="Opaque.")


class MeasuredSource(BaseModel):
    """One source of the text that a report's figures are measured on."""

    kind: Literal["text", "conversations", "sampled"]
    sha256: Digest | None = Field(description="Of the text; null if the fine-tune wrote it.")
    tokens: int = Field(examples=[8192])


class ReportOut(BaseModel):
    """The compression's measurements, per matrix and in total."""

    model_config = ConfigDict(extra="allow")

    method: str = Field(examples=["adamix"])
    nominal_bits: float | None = None
    true_bits: float | None = None
    artifact_bytes: int | None = None
    checkpoint_bytes: int | None = None
    ratio: float | None = None
    kl: float | None = None
    agreement: float | None = None
    measured_on: list[MeasuredSource] = Field(
        default_factory=list, description="The text that KL, agreement and NLL are measured on."
    )
    matrices: list[dict[str, Any]] = Field(default_factory=list)
    other_tensors: list[dict[str, Any]] = Field(default_factory=list)
    notes: list[str] = Field(
        default_factory=list,
        description="What was not taken from the fine-tune's folder, and why figures are missing "
        "or poor.",
    )
