"""How the kernels are compiled, and which form of a kernel a launch takes."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from types import MappingProxyType
from typing import Final, TypeVar

import torch

from deltadock.kernels.svd_delta.layout import PLANES

SUM_PARTS: Final = 8
"""Parts of shrink's sum over the inputs, for any number of warps: each eighth of their steps."""
REGISTERS: Final = 65_536
"""Registers of an SM."""
UNSPECIALIZED: Final = ("h_in", "max_tiles", "scales_stride", "block_count", "output_tiles")
"""Arguments not specialized on divisibility by 16, which would only multiply compilations."""


@dataclass(frozen=True, slots=True)
class Form:
    """How one kernel is compiled; its results have the same bits for any number of warps.

    Attributes:
        warps: of a program; each accumulates parts of the sum.
        registers: the most of a thread; they decide how many warps an SM holds.
    """

    warps: int
    registers: int


@dataclass(frozen=True, slots=True)
class ExpandForm(Form):
    """How `expand` is compiled.

    Attributes:
        columns: outputs that a program takes at a time; of `TILE_COLUMNS`.
    """

    columns: int


@dataclass(frozen=True, slots=True)
class Variant:
    """How the kernels are compiled.

    A launch takes the first form of which programs for all tiles run at once, or else the last: few
    programs end sooner with more warps each, or smaller tiles.

    Attributes:
        prepare: forms.
        shrink: forms with at most `SUM_PARTS` warps.
        expand: forms.
        overlap: whether a kernel may start while the one before still runs, where the card can.
    """

    prepare: tuple[Form, ...] = (Form(8, 40), Form(4, 48))
    shrink: tuple[Form, ...] = (Form(8, 80), Form(4, 96))
    expand: tuple[ExpandForm, ...] = (
        ExpandForm(8, 80, 64),
        ExpandForm(8, 80, 128),
        ExpandForm(4, 168, 256),
    )
    overlap: bool = True


DEFAULT: Final = Variant()
VARIANTS: Final[Mapping[tuple[int, int], Variant]] = MappingProxyType({})
"""The best variants by compute capability, as `python -m benchmarks.gpu` finds them; cards that are
not listed use the default."""


@cache
def variant_of(device: torch.device) -> Variant:
    """The variant for a device."""
    if device.type != "cuda":
        return DEFAULT
    return VARIANTS.get(torch.cuda.get_device_capability(device), DEFAULT)


@cache
def multiprocessors_of(device: torch.device) -> int:
    """SMs of a device."""
    if device.type != "cuda":
        return 1
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def places_of(form: Form, multiprocessors: int) -> int:
    """Programs of a form that run at once."""
    return max(1, REGISTERS // (form.registers * 32 * form.warps)) * multiprocessors


F = TypeVar("F", bound=Form)


def form_of(forms: Sequence[F], programs_of: Callable[[F], int], multiprocessors: int) -> F:
    """The form for a launch, by how many programs have something to do."""
    for form in forms:
        if programs_of(form) <= places_of(form, multiprocessors):
            return form
    return forms[-1]


def parts_of_prepare(programs: int, form: Form, multiprocessors: int) -> int:
    """Programs of `prepare` for each of these: one for each plane, if all of them run at once."""
    split = len(PLANES) * programs <= places_of(form, multiprocessors)
    return len(PLANES) if split else 1
