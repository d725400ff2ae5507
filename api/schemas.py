"""Schemas shared by several domains."""

from datetime import datetime
from typing import Annotated, Self

from pydantic import BaseModel, ConfigDict, Field

from deltadock.compression.options import Goal, GoalKind, MethodInfo, default_method, goal_for
from deltadock.storage.models import CheckpointRow

EXAMPLE_DELTA_ID = "dlt_k7wq2mzv5c3xj6nhy4tbr2dfsa"
EXAMPLE_DIGEST = "9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08"
EXAMPLE_TIME = datetime.fromisoformat("2026-11-22T12:00:00+00:00")

Digest = Annotated[
    str,
    Field(
        pattern=r"^[0-9a-f]{64}$",
        description="SHA-256, 64 lower-case hex digits.",
        examples=[EXAMPLE_DIGEST],
    ),
]


class RequestBody(BaseModel):
    """Base class of request bodies: unknown fields are an error rather than ignored."""

    model_config = ConfigDict(extra="forbid")


class CheckpointOut(BaseModel):
    """A complete checkpoint."""

    digest: Digest = Field(description="Of the whole checkpoint: files, tensors and config.")
    weights_digest: Digest = Field(
        description="Of the tensors alone, however sharded; artifacts name their base by it."
    )
    model_type: str = Field(examples=["llama"])
    total_bytes: int = Field(examples=[4_196_352])

    @classmethod
    def of(cls, checkpoint: CheckpointRow) -> Self:
        """Convert a row."""
        return cls(
            digest=checkpoint.digest,
            weights_digest=checkpoint.weights_digest,
            model_type=checkpoint.model_type,
            total_bytes=checkpoint.total_bytes,
        )


class GoalFields(RequestBody):
    """Method and goal: at most one goal field; without any, a budget of 1.0 bit.

    `check_goal` checks the ranges, since its errors are specific.
    """

    method: str = Field(
        default=default_method().name, description="One of GET /v1/methods.", max_length=32
    )
    bits: float | None = Field(
        default=None,
        allow_inf_nan=False,
        description="Bits per compressed weight, for methods that take a budget.",
    )
    target_bytes: int | None = Field(
        default=None, lt=2**63, description="Maximum bytes of the whole artifact."
    )
    ratio: float | None = Field(
        default=None,
        allow_inf_nan=False,
        description="Minimum bf16 checkpoint bytes per artifact byte.",
    )
    max_kl: float | None = Field(
        default=None,
        allow_inf_nan=False,
        description="Maximum KL divergence to the fine-tune, in nats per held-out token; selects "
        "the smallest artifact that meets it.",
    )
    min_agreement: float | None = Field(
        default=None,
        allow_inf_nan=False,
        description="Minimum share of held-out tokens whose most likely next token is the "
        "fine-tune's; selects the smallest artifact that meets it.",
    )

    def check_goal(self) -> tuple[MethodInfo, Goal | None]:
        """The method, and its goal (None for fixed-size methods).

        Raises:
            UnknownMethod, BitsOutOfRange, InvalidGoal.
        """
        return goal_for(
            self.method,
            bits=self.bits,
            target_bytes=self.target_bytes,
            ratio=self.ratio,
            max_kl=self.max_kl,
            min_agreement=self.min_agreement,
        )


class GoalOut(BaseModel):
    """The goal that determines a delta's size."""

    kind: GoalKind = Field(examples=["bits"])
    value: float = Field(examples=[1.0])

    @classmethod
    def of(cls, goal: Goal) -> Self:
        """Convert a goal."""
        return cls(kind=goal.kind, value=goal.value)

    def __str__(self) -> str:
        return str(Goal(self.kind, self.value))
