"""What a compression aims at, one size or one bound; plain Python, as the api checks it too."""

import math
from dataclasses import dataclass
from typing import Final, Literal, get_args

from deltadock.compression.catalogue import METHODS, MethodInfo, check_method
from deltadock.errors import BitsOutOfRange, InvalidGoal

GoalKind = Literal["bits", "target_bytes", "ratio", "max_kl", "min_agreement"]
GOAL_KINDS: Final[tuple[GoalKind, ...]] = get_args(GoalKind)
SIZES: Final = ("bits", "target_bytes", "ratio")
"""Goals from which the artifact's size follows before any work."""

DEFAULT_BITS: Final = 1.0
MAX_BITS: Final = 16.0
MAX_RATIO: Final = 1e6
MAX_KL: Final = 100.0


@dataclass(frozen=True, slots=True)
class Goal:
    """What decides the artifact's size.

    Attributes:
        kind: `bits`: per weight of what is compressed; `target_bytes`: of the whole artifact;
            `ratio`: bf16 checkpoint bytes per artifact byte; `max_kl`: nats per held-out token;
            `min_agreement`: share of held-out tokens with the fine-tune's likeliest next token.
            The last two ask for the smallest artifact that keeps the bound.
        value: finite and positive; whole bytes for `target_bytes`.
    """

    kind: GoalKind
    value: float

    @property
    def bits(self) -> float | None:
        """The bit budget, where that is the goal."""
        return self.value if self.kind == "bits" else None

    def __str__(self) -> str:
        value = f"{self.value:g}"
        match self.kind:
            case "bits":
                return f"{value} bit"
            case "target_bytes":
                return f"{self.value:.0f} bytes"
            case "ratio":
                return f"ratio {value}"
            case "max_kl":
                return f"KL at most {value}"
            case "min_agreement":
                return f"agreement at least {value}"


def check_goal(
    *,
    bits: float | None = None,
    target_bytes: float | None = None,
    ratio: float | None = None,
    max_kl: float | None = None,
    min_agreement: float | None = None,
) -> Goal:
    """The one goal that is given; `DEFAULT_BITS` where none is.

    Raises:
        InvalidGoal: several are given, or one outside its range.
        BitsOutOfRange: a bit budget that no method takes.
    """
    values = (bits, target_bytes, ratio, max_kl, min_agreement)
    given = [Goal(k, v) for k, v in zip(GOAL_KINDS, values, strict=True) if v is not None]
    if not given:
        return Goal("bits", DEFAULT_BITS)
    if len(given) > 1:
        names = " and ".join(goal.kind for goal in given)
        raise InvalidGoal(f"{names} exclude each other. Give one: it decides the size.")
    _check_range(given[0])
    return given[0]


def goal_for(
    method: str,
    *,
    bits: float | None = None,
    target_bytes: float | None = None,
    ratio: float | None = None,
    max_kl: float | None = None,
    min_agreement: float | None = None,
) -> tuple[MethodInfo, Goal | None]:
    """The method with this name and the goal it is to reach; None for methods without a budget.

    Raises:
        UnknownMethod: nothing has this name.
        InvalidGoal: several goals, one outside its range, or one for a method that takes none.
        BitsOutOfRange: the bit budget is outside the method's range.
    """
    others = (target_bytes, ratio, max_kl, min_agreement)
    has_others = any(value is not None for value in others)
    info = METHODS.get(method)
    if info is None or not has_others:
        default = DEFAULT_BITS if info is not None and info.bits_min is not None else None
        info = check_method(method, default if bits is None else bits)
    if info.bits_min is None:
        if has_others:
            raise InvalidGoal(f"The method {method!r} has one size only; leave the goal out.")
        return info, None
    return info, check_goal(
        bits=bits, target_bytes=target_bytes, ratio=ratio, max_kl=max_kl,
        min_agreement=min_agreement,
    )  # fmt: skip


def _check_range(goal: Goal) -> None:
    value, fits = goal.value, math.isfinite(goal.value)
    match goal.kind:
        case "bits":
            if not (fits and 0 < value <= MAX_BITS):
                raise BitsOutOfRange(
                    f"bits = {value:g}: a budget is above 0 and at most {MAX_BITS:g} bits a weight."
                )
        case "target_bytes":
            if not (fits and 1 <= value < 2**63 and value == int(value)):
                raise InvalidGoal(f"target_bytes = {value:g}: give a positive whole number.")
        case "ratio":
            if not (fits and 1 < value <= MAX_RATIO):
                raise InvalidGoal(
                    f"ratio = {value:g}: the checkpoint is to become smaller, by a factor above 1."
                )
        case "max_kl":
            if not (fits and 0 < value <= MAX_KL):
                raise InvalidGoal(
                    f"max_kl = {value:g}: give nats per token above 0, such as 0.01. Nothing is "
                    "lost by the method 'exact' only."
                )
        case "min_agreement":
            if not (fits and 0 < value < 1):
                raise InvalidGoal(
                    f"min_agreement = {value:g}: give a share of tokens between 0 and 1, such as "
                    "0.98."
                )
