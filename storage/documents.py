"""What the JSON in rows holds."""

from typing import TYPE_CHECKING, Literal, NotRequired, TypedDict

if TYPE_CHECKING:
    from deltadock.compression.options import GoalKind
    from deltadock.model_target import Tier


class SourceOptions(TypedDict):
    """One source of a calibration text."""

    digest: str | None
    """Of an uploaded text; None: sampled from the fine-tune."""
    suffix: NotRequired[str | None]
    """Of the text's file, which selects its parser."""
    weight: float


class MixtureOptions(TypedDict):
    """A calibration text."""

    sources: list[SourceOptions]
    tokens: int
    length: int


class GoalOptions(TypedDict):
    """What decides a delta's size."""

    kind: "GoalKind"
    value: float


class DeltaOptions(TypedDict):
    """How a delta is compressed, besides its method."""

    seed: int
    solver: Literal["exact", "scip"]
    goal: GoalOptions | None
    """None for methods of a fixed size."""
    calibration: MixtureOptions | None


class HeldDelta(TypedDict):
    """A delta that a node holds."""

    digest: str
    tier: "Tier"
    """The fastest that holds it."""
    bytes: int
    references: int
    """Requests that use it now."""
    pinned: bool
