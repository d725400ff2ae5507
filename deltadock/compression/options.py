"""Methods, goals, calibration sources and options of a compression.

Plain Python, so that the api can validate them.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Final, Literal, TypeVar, get_args

from deltadock.errors import (
    BitsOutOfRange,
    Conflict,
    InvalidCalibration,
    InvalidGoal,
    UnknownMethod,
)
from deltadock.words import counted


@dataclass(frozen=True, slots=True)
class MethodInfo:
    """One method.

    Attributes:
        name: unique name.
        title: one line of description.
        bits_min, bits_max: bounds of the code bits per weight; None for methods of one size.
        budgets: the accepted budgets; empty if any within the bounds is.
        needs_calibration: uses the layers' inputs on calibration text.
        needs_gradients: uses the gradients at the layers' outputs as well.
        distills: trains its scales end to end after quantization.
        imports_adapter: takes a PEFT adapter's folder instead of a fine-tuned checkpoint.
        is_lossless: stores every tensor that changed bit for bit, quantized weights included.
        default: used if no method is named.
    """

    name: str
    title: str
    bits_min: float | None = None
    bits_max: float | None = None
    budgets: tuple[float, ...] = ()
    needs_calibration: bool = False
    needs_gradients: bool = False
    distills: bool = False
    imports_adapter: bool = False
    is_lossless: bool = False
    default: bool = False


METHODS: Final[Mapping[str, MethodInfo]] = MappingProxyType(
    {
        method.name: method
        for method in (
            MethodInfo(
                name="optimix",
                title="Optimix: one budget for all ranks by their cost in nats, scales distilled",
                bits_min=0.05,
                bits_max=8.0,
                needs_calibration=True,
                needs_gradients=True,
                distills=True,
                default=True,
            ),
            MethodInfo(
                name="adamix",
                title="AdaMix: mixed-precision SVD factors, widths allocated by calibrated error",
                bits_min=0.1,
                bits_max=8.0,
                needs_calibration=True,
            ),
            MethodInfo(
                name="delta-come",
                title="Delta-CoMe: SVD factors, 8 bits for 2 ranks, 3 for 32, 2 for the rest",
                bits_min=0.1,
                bits_max=8.0,
                needs_calibration=True,
            ),
            MethodInfo(
                name="topk-2",
                title="Top-2: SVD factors, 8 bits for 2 ranks, 2 for the rest",
                bits_min=0.1,
                bits_max=8.0,
                needs_calibration=True,
            ),
            MethodInfo(
                name="topk-32",
                title="Top-32: SVD factors, 8 bits for 32 ranks, 2 for the rest",
                bits_min=0.1,
                bits_max=8.0,
                needs_calibration=True,
            ),
            MethodInfo(
                name="low-rank",
                title="Low rank: the truncated SVD in bfloat16 factors",
                bits_min=0.1,
                bits_max=16.0,
            ),
            MethodInfo(
                name="bitdelta",
                title="BitDelta: signs and one scale a matrix",
            ),
            MethodInfo(
                name="bitdelta-distilled",
                title="BitDelta with its scales trained on the fine-tune's outputs",
                needs_calibration=True,
                distills=True,
            ),
            MethodInfo(
                name="delta-zip",
                title="DeltaZip: 2 of every 4 columns in 2 or 4 bits (1 or 2 a weight), deflated",
                bits_min=1.0,
                bits_max=2.0,
                budgets=(1.0, 2.0),
                needs_calibration=True,
            ),
            MethodInfo(
                name="gpt-zip",
                title="GPT-Zip: 2-bit codes for 5 % of the weights, deflated",
                needs_calibration=True,
            ),
            MethodInfo(
                name="lora",
                title="LoRA: a PEFT adapter, imported without loss",
                imports_adapter=True,
            ),
            MethodInfo(
                name="exact",
                title="Exact: every tensor that changed, bit for bit",
                is_lossless=True,
            ),
        )
    }
)


def check_method(name: str, bits: float | None) -> MethodInfo:
    """Look up a method and check its bit budget.

    Raises:
        UnknownMethod: nothing has this name.
        BitsOutOfRange: the budget is missing, out of range, or given to a method without one.
    """
    method = METHODS.get(name)
    if method is None:
        raise UnknownMethod(f"There is no method {name!r}; choose one of {', '.join(METHODS)}.")
    if method.bits_min is None or method.bits_max is None:
        if bits is not None:
            raise BitsOutOfRange(f"The method {name!r} takes no bit budget; leave bits out.")
    elif method.budgets:
        if bits not in method.budgets:
            budgets = " or ".join(f"{budget:g}" for budget in method.budgets)
            raise BitsOutOfRange(
                f"The method {name!r} needs a bit budget of {budgets} code bits per weight."
            )
    elif bits is None or not method.bits_min <= bits <= method.bits_max:
        raise BitsOutOfRange(
            f"The method {name!r} needs a bit budget between {method.bits_min:g} and "
            f"{method.bits_max:g} code bits per weight."
        )
    return method


def default_method(*, is_adapter: bool = False) -> MethodInfo:
    """The method used if none is named: for a PEFT adapter the one that imports it."""
    return next(
        method
        for method in METHODS.values()
        if (method.imports_adapter if is_adapter else method.default)
    )


def check_kind(method: MethodInfo, *, is_adapter: bool) -> None:
    """Check that a method takes what is to be compressed: a PEFT adapter, or a whole model.

    Raises:
        Conflict: it takes the other.
    """
    if is_adapter != method.imports_adapter:
        other = default_method(is_adapter=is_adapter).name
        kind = "a PEFT adapter" if is_adapter else "a whole model, not a PEFT adapter"
        raise Conflict(
            f"The checkpoint is {kind}, which {method.name!r} does not take: leave the method "
            f"(`--method`) out, or give {other!r}."
        )


Solver = Literal["exact", "scip"]
GoalKind = Literal["bits", "target_bytes", "ratio", "max_kl", "min_agreement"]
FigureT = TypeVar("FigureT")
GOAL_KINDS: Final[tuple[GoalKind, ...]] = get_args(GoalKind)
SIZES: Final[tuple[GoalKind, ...]] = ("bits", "target_bytes", "ratio")
"""Goals that determine the artifact's size in advance."""

DEFAULT_BITS: Final = 1.0
MAX_BITS: Final = 16.0
MAX_RATIO: Final = 1e6
MAX_KL: Final = 100.0


@dataclass(frozen=True, slots=True)
class Goal:
    """The goal that decides the artifact's size.

    Attributes:
        kind: `bits`: per weight of what is compressed; `target_bytes`: of the whole artifact;
            `ratio`: bf16 checkpoint bytes per artifact byte; `max_kl`: nats per held-out token;
            `min_agreement`: fraction of held-out tokens with the fine-tune's most likely next
            token. The last two request the smallest artifact that keeps the bound.
        value: finite and positive; whole bytes for `target_bytes`.
    """

    kind: GoalKind
    value: float

    @property
    def bits(self) -> float | None:
        """The bit budget, if that is the goal."""
        return self.value if self.kind == "bits" else None

    @property
    def is_bound(self) -> bool:
        """Whether a figure of the finished delta decides, and not its size."""
        return self.kind not in SIZES

    @property
    def is_size(self) -> bool:
        """Whether the artifact's size decides, so that a budget is looked for."""
        return self.kind in ("target_bytes", "ratio")

    def figure(self, kl: FigureT, agreement: FigureT) -> FigureT:
        """The one of the two that a bound is on."""
        return kl if self.kind == "max_kl" else agreement

    def loss(self, figure: float) -> float:
        """A bound's figure as one that grows as a delta gets worse."""
        return figure if self.kind == "max_kl" else 1 - figure

    def is_kept(self, figure: float) -> bool:
        """Whether a figure is within the bound."""
        return self.loss(figure) <= self.loss(self.value)

    def __str__(self) -> str:
        value = f"{self.value:g}"
        match self.kind:
            case "bits":
                return f"{value} bit"
            case "target_bytes":
                return f"{self.value:,.0f} bytes"
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
    """The one goal that is given; `DEFAULT_BITS` if none is.

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
    """Look up a method, and check its goal; the goal is None for methods without a budget.

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


def rank_budget(bits: float, h_out: int, h_in: int) -> int:
    """Rank-bits that one matrix may spend: `floor(bits * h_in * h_out / (h_in + h_out))`."""
    return int(bits * h_in * h_out / (h_in + h_out))


LENGTH: Final = 2048
TOKENS: Final = 128 * LENGTH
MIN_LENGTH: Final = 16
MAX_LENGTH: Final = 1 << 17
MIN_TOKENS: Final = 256
MAX_TOKENS: Final = 1 << 24
MAX_SOURCES: Final = 16


def check_text_tokens(tokens: int) -> None:
    """Refuse a calibration text that is too short.

    Raises:
        InvalidCalibration: it is.
    """
    if tokens < MIN_TOKENS:
        raise InvalidCalibration(
            f"The calibration text has {counted(tokens, 'token')}; at least {MIN_TOKENS} are "
            f"needed, and at most {TOKENS} are used."
        )


def check_text_bytes(name: str, size: int) -> None:
    """Refuse a calibration text that is too short for every tokenizer: a token has a byte.

    Chat templates add tokens to lines of .jsonl.

    Raises:
        InvalidCalibration: it is.
    """
    if name.endswith(".txt") and size < MIN_TOKENS:
        raise InvalidCalibration(
            f"The calibration text {name} has {counted(size, 'byte')}; at least {MIN_TOKENS} "
            f"tokens are needed, and at most {TOKENS} are used."
        )


@dataclass(frozen=True, slots=True)
class CalibrationOptions:
    """Largest number of calibration tokens, and window length in tokens (at most the model's)."""

    tokens: int = TOKENS
    length: int = LENGTH

    def check(self) -> None:
        """Check both ranges.

        Raises:
            InvalidCalibration: naming the range.
        """
        if not MIN_TOKENS <= self.tokens <= MAX_TOKENS:
            raise InvalidCalibration(
                f"Calibration takes {MIN_TOKENS} to {MAX_TOKENS} tokens, not {self.tokens}."
            )
        if not MIN_LENGTH <= self.length <= MAX_LENGTH:
            raise InvalidCalibration(
                f"A calibration window has {MIN_LENGTH} to {MAX_LENGTH} tokens, not {self.length}."
            )


CALIBRATION_SUFFIXES: Final = (".txt", ".jsonl")
"""How names of calibration texts end, which selects how they are read."""


@dataclass(frozen=True, slots=True)
class Source:
    """One source of calibration text.

    Attributes:
        path: .txt, or .jsonl whose lines have `text`, `messages`, `prompt` with `completion`, or
            `prompt` alone, which the fine-tuned model continues; None: text sampled from the
            fine-tuned model without prompts.
        weight: fraction of the tokens, relative to the other sources.
    """

    path: Path | None = None
    weight: float = 1.0


SAMPLED: Final = Source()
"""Text sampled from the fine-tuned model, the default source."""


def check_weights(weights: Sequence[float]) -> None:
    """Check the weights of a mixture.

    Raises:
        InvalidCalibration: too many sources, or a weight that is not positive and finite.
    """
    if len(weights) > MAX_SOURCES:
        raise InvalidCalibration(f"A mixture has at most {MAX_SOURCES} sources.")
    for weight in weights:
        if not (math.isfinite(weight) and 0 < weight <= 1e6):
            raise InvalidCalibration(
                f"The weight {weight:g} of a calibration source is not above 0 and at most 1e6."
            )


@dataclass(frozen=True, slots=True)
class CompressOptions:
    """Everything that decides an artifact's bytes besides the weights and the calibration text.

    Attributes:
        method: a name of `METHODS`.
        goal: None: `DEFAULT_BITS`, for methods with a budget.
        seed: seed of window selection, label sampling and distillation.
        solver: allocation solver of AdaMix.
        calibration: amount of calibration text.
    """

    method: str = default_method().name
    goal: Goal | None = None
    seed: int = 0
    solver: Solver = "exact"
    calibration: CalibrationOptions = field(default_factory=CalibrationOptions)

    def check(self) -> tuple[MethodInfo, Goal | None]:
        """The method, and the goal to reach. Raises as `goal_for`."""
        given = {} if self.goal is None else {str(self.goal.kind): self.goal.value}
        return goal_for(self.method, **given)
