"""Schemas shared by several domains."""

import re
from collections.abc import Collection, Mapping, Sequence
from datetime import datetime
from types import MappingProxyType
from typing import Annotated, Final, Self

from pydantic import (
    AwareDatetime,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    Strict,
    model_validator,
)
from pydantic.config import JsonDict, JsonValue

from deltadock.compression.options import (
    GOAL_KINDS,
    MAX_BITS,
    MAX_KL,
    MAX_RATIO,
    METHODS,
    Goal,
    GoalKind,
    MethodInfo,
    default_method,
    goal_for,
)
from deltadock.names import DIGEST_PATTERN
from deltadock.openai.fields import with_integers
from deltadock.storage.tables import CheckpointRow

EXAMPLE_DELTA_ID = "dlt_k7wq2mzv5c3xj6nhy4tbr2dfsa"
EXAMPLE_DIGEST = "9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08"
EXAMPLE_TIME = datetime.fromisoformat("2026-11-22T12:00:00+00:00")

Digest = Annotated[
    str,
    Field(
        pattern=DIGEST_PATTERN,
        description="SHA-256, 64 lower-case hex digits.",
        examples=[EXAMPLE_DIGEST],
    ),
]


_RFC_3339: Final = re.compile(r"\d{4}-\d\d-\d\d[Tt]\d\d:\d\d:\d\d(?:\.\d+)?(?:[Zz]|[+-]\d\d:\d\d)")


def _require_rfc_3339(value: object) -> object:
    """Refuse the numbers and dates that pydantic reads as times too."""
    if isinstance(value, datetime) or (isinstance(value, str) and _RFC_3339.fullmatch(value)):
        return value
    raise ValueError("must be a time with its offset, such as 2026-11-22T12:00:00Z")


Moment = Annotated[AwareDatetime, Strict(False), BeforeValidator(_require_rfc_3339)]
"""A time in a request, as RFC 3339 writes it."""


class RequestBody(BaseModel):
    """Base class of request bodies: unknown fields are an error, and no type is converted.

    An enumeration in one is `Annotated[..., Strict(False)]`, since JSON has its values as strings.
    """

    model_config = ConfigDict(extra="forbid", strict=True)

    _integers = model_validator(mode="before")(with_integers)


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


# `check_goal` checks these ranges, since its errors are specific.
_RANGES: Final[Mapping[GoalKind, JsonDict]] = MappingProxyType(
    {
        "bits": {"exclusiveMinimum": 0, "maximum": MAX_BITS},
        "target_bytes": {"minimum": 1},
        "ratio": {"exclusiveMinimum": 1, "maximum": MAX_RATIO},
        "max_kl": {"exclusiveMinimum": 0, "maximum": MAX_KL},
        "min_agreement": {"exclusiveMinimum": 0, "exclusiveMaximum": 1},
    }
)


_Budget = tuple[float | None, float | None, tuple[float, ...]]


def goal_choices(methods: Collection[MethodInfo], kinds: Sequence[GoalKind]) -> list[JsonValue]:
    """The `anyOf` of a body with `GoalFields`: which methods take which one of these goals."""
    by_budget: dict[_Budget, list[MethodInfo]] = {}
    for method in methods:
        by_budget.setdefault((method.bits_min, method.bits_max, method.budgets), []).append(method)
    choices: list[JsonValue] = []
    for (low, high, budgets), group in by_budget.items():
        bits: JsonDict = {"type": ["number", "null"], "minimum": low, "maximum": high}
        if low is None:
            bits = {"type": "null"}
        elif budgets:
            bits = {"enum": [*budgets, None]}
        choices.append(_choice(group, {"bits": bits}))
    budgeted = [method for method in methods if method.bits_min is not None]
    for kind in kinds:
        if kind != "bits":
            number = "integer" if kind == "target_bytes" else "number"
            choices.append(_choice(budgeted, {kind: {"type": number, **_RANGES[kind]}}))
    return choices


def _choice(methods: Sequence[MethodInfo], goal: JsonDict) -> JsonDict:
    named: JsonDict = {"method": {"enum": [method.name for method in methods]}}
    no_other: JsonDict = {kind: {"type": "null"} for kind in GOAL_KINDS if kind not in goal}
    required: list[JsonValue] = [kind for kind in goal if kind != "bits"]
    if not any(method.default for method in methods):
        required.append("method")
    return {"properties": named | goal | no_other, "required": required}


class GoalFields(RequestBody):
    """Method and goal: at most one goal field; without any, a budget of 1.0 bit."""

    method: str = Field(
        default=default_method().name,
        description="One of GET /v1/methods; a PEFT adapter's is `lora` if none is named.",
        max_length=32,
        json_schema_extra={"enum": list(METHODS)},
    )
    bits: float | None = Field(
        default=None,
        allow_inf_nan=False,
        description="Bits per compressed weight, for methods that take a budget.",
        json_schema_extra=_RANGES["bits"],
    )
    target_bytes: int | None = Field(
        default=None,
        lt=2**63,
        description="Maximum bytes of the whole artifact.",
        json_schema_extra=_RANGES["target_bytes"],
    )
    ratio: float | None = Field(
        default=None,
        allow_inf_nan=False,
        description="Minimum bf16 checkpoint bytes per artifact byte.",
        json_schema_extra=_RANGES["ratio"],
    )
    max_kl: float | None = Field(
        default=None,
        allow_inf_nan=False,
        description="Maximum KL divergence to the fine-tune, in nats per held-out token; selects "
        "the smallest artifact that meets it.",
        json_schema_extra=_RANGES["max_kl"],
    )
    min_agreement: float | None = Field(
        default=None,
        allow_inf_nan=False,
        description="Minimum top-1 agreement, the share of held-out tokens whose most likely next "
        "token is the fine-tune's; selects the smallest artifact that meets it.",
        json_schema_extra=_RANGES["min_agreement"],
    )

    def check_goal(self, *, is_adapter: bool) -> tuple[MethodInfo, Goal | None]:
        """The method, and its goal (None for fixed-size methods).

        Args:
            is_adapter: whether the checkpoint is a PEFT adapter, which has a default method of its
                own.

        Raises:
            UnknownMethod, BitsOutOfRange, InvalidGoal.
        """
        is_named = "method" in self.model_fields_set
        return goal_for(
            self.method if is_named else default_method(is_adapter=is_adapter).name,
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
