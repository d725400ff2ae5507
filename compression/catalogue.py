"""The compression methods and what they accept; plain Python, so that the api can validate."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final

from deltadock.errors import BitsOutOfRange, UnknownMethod


@dataclass(frozen=True, slots=True)
class MethodInfo:
    """One method. `bits_min` and `bits_max` bound the code bits per weight; None: it takes none."""

    name: str
    title: str
    bits_min: float | None
    bits_max: float | None
    needs_calibration: bool


METHODS: Final[Mapping[str, MethodInfo]] = MappingProxyType(
    {
        method.name: method
        for method in (
            MethodInfo(
                name="adamix",
                title="AdaMix: mixed-precision SVD factors, widths allotted by calibrated error",
                bits_min=0.1,
                bits_max=8.0,
                needs_calibration=True,
            ),
            MethodInfo(
                name="exact",
                title="Exact: every tensor that changed, bit for bit",
                bits_min=None,
                bits_max=None,
                needs_calibration=False,
            ),
        )
    }
)


def check_method(name: str, bits: float | None) -> MethodInfo:
    """The method, if there is one of this name that accepts this bit budget.

    Raises:
        UnknownMethod: nothing has this name.
        BitsOutOfRange: the budget is missing, outside the method's range, or not wanted.
    """
    method = METHODS.get(name)
    if method is None:
        raise UnknownMethod(f"There is no method {name!r}; choose one of {', '.join(METHODS)}.")
    if method.bits_min is None or method.bits_max is None:
        if bits is not None:
            raise BitsOutOfRange(f"The method {name!r} takes no bit budget; leave bits out.")
    elif bits is None or not method.bits_min <= bits <= method.bits_max:
        raise BitsOutOfRange(
            f"The method {name!r} needs a bit budget between {method.bits_min:g} and "
            f"{method.bits_max:g} code bits per weight."
        )
    return method
