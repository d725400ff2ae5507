"""The compression methods and what they accept; plain Python, so that the api can validate."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final

from deltadock.errors import BitsOutOfRange, UnknownMethod


@dataclass(frozen=True, slots=True)
class MethodInfo:
    """One method.

    Attributes:
        name: what it goes by.
        title: what it does, in a line.
        bits_min, bits_max: bounds of the code bits per weight; None where there is one size only.
        budgets: the only budgets there are; empty where every one within the bounds will do.
        needs_calibration: looks at the layers' inputs on calibration text.
        needs_gradients: looks at the gradients at the layers' outputs as well.
        distills: trains its scales end to end once the codes are settled.
        imports_adapter: takes a PEFT adapter's folder in place of a fine-tuned checkpoint.
        default: is used where no method is named.
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
                title="AdaMix: mixed-precision SVD factors, widths allotted by calibrated error",
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
            ),
        )
    }
)


def check_method(name: str, bits: float | None) -> MethodInfo:
    """The method, if there is one of this name that accepts this bit budget.

    Raises:
        UnknownMethod: nothing has this name.
        BitsOutOfRange: the budget is missing, outside what the method takes, or not wanted.
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


def default_method() -> MethodInfo:
    """The method that is used where none is named."""
    return next(method for method in METHODS.values() if method.default)
