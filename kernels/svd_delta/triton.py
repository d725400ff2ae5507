"""GPU path: three kernel launches per call, for any number of deltas.

`prepare` turns the inputs into fixed-point numbers, `shrink` computes `s * (x V_hat^T)`, and
`expand` adds `row_scale * (U_hat projected) + bias` to the outputs. The kernels read the packed
words as the artifact stores them, plane by plane, and multiply bytes on tensor cores, with int32
sums: packed vectors are the tall operand, the rows of a chunk the other. A shift and a mask turn a
word into a code in each of its four bytes, and nothing else is done to a code.

The rows' numbers have 16 bits, in a high and a low byte with signs, which are columns of the small
operand: of the inputs they are relative to the largest of `BLOCK_INPUTS`, of the projections to the
largest of a row and linear. Bytes are exact, and parts of a sum are added in a fixed order, without
atomics: a row's result is bitwise independent of the other rows, and of the number of warps, which
follows from that of programs.

The inner loops have neither barriers nor shared memory: terms of a product may be in any order, so
each thread loads the very words and terms that its part of the tensor-core product takes, and the
words of its next step before it uses those of this one. The four codes that share a word after the
mask depend on the width of the plane, so `prepare` stores the inputs once for each width. `expand`
has its terms in different words: it transposes the bytes of four of them. Its planes share their
accumulators, which are added up over the warps once a tile. As many programs of `expand` as run at
once share its tiles: each loads what those of a chunk and linear have in common only once.

Where launches overlap (`kernels/overlap.py`), all that does not depend on the step's inputs comes
before the wait: slot, descriptor and tile, and a request to bring all words of the program's first
tile to L2.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from types import MappingProxyType
from typing import Any, Final, TypeVar

import torch
import triton
import triton.language as tl
from torch import Tensor

from deltadock.kernels.interpreter import round_to
from deltadock.kernels.overlap import overlaps, prefetch, start_next, wait_for_previous
from deltadock.kernels.svd_delta.chunks import BLOCK_INPUTS, CHUNK_ROWS, Chunks
from deltadock.kernels.svd_delta.layout import (
    BLOCK_FIELDS,
    DESCRIPTOR_FIELDS,
    OUTPUT_TILE_FIELDS,
    PLANES,
    TILE_FIELDS,
    TILE_RANKS,
    DeltaTable,
)


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


SUM_PARTS: Final = 8
"""Parts of shrink's sum over the inputs, for any number of warps: each eighth of their steps."""
REGISTERS: Final = 65_536
"""Registers of an SM."""
USUAL_SHARE: Final = 3
"""Deltas of one bit per weight have about a third of a table's most ranks, or fewer."""

UNSPECIALIZED: Final = ("h_in", "max_tiles", "scales_stride", "block_count", "output_tiles")
"""Arguments not specialized on divisibility by 16, which would only multiply compilations."""

PAIRED: Final = tuple(map(int, triton.__version__.split(".")[:2])) < (3, 8)
"""Whether a thread's words of a product's operand lie side by side in pairs. Triton before 3.8
counts bytes that come from `tl.join` as half as wide."""

_DESCRIPTOR = tl.constexpr(DESCRIPTOR_FIELDS)
_TILE = tl.constexpr(TILE_FIELDS)
_BLOCK = tl.constexpr(BLOCK_FIELDS)
_RANKS = tl.constexpr(TILE_RANKS)
_OUTPUT_TILE = tl.constexpr(OUTPUT_TILE_FIELDS)
_ROWS = tl.constexpr(CHUNK_ROWS)
_BLOCK_INPUTS = tl.constexpr(BLOCK_INPUTS)
_PARTS = tl.constexpr(SUM_PARTS)

_LARGEST = tl.constexpr(32512.0)
"""Largest magnitude of a fixed-point number: its bytes, -127 to 127 and -128 to 127, have signs."""
_TO_FIXED = tl.constexpr(1.5 * 2**23 + 0x8080)
"""Added to a float32, it leaves the rounded number plus 0x8080 in the low 16 bits."""
_SIGNS = tl.constexpr(-0x7F7F7F80)
"""The sign of every byte of a word."""
_BYTES = tl.constexpr(0x01010101)
_HIGH = tl.constexpr(0x7632)
_LOW = tl.constexpr(0x5410)
"""What picks the high or the low bytes of two pairs of fixed-point numbers."""
_PAIRED = tl.constexpr(PAIRED)
_FINITE = tl.constexpr(0x7FFFFFFF)


@triton.jit
def _ceil_div(number, divisor: tl.constexpr):
    """`number / divisor` rounded up; of a number that is not negative compilers make a shift."""
    return ((number + (divisor - 1)).to(tl.uint32) // divisor).to(tl.int32)


@triton.jit
def load_bits(addresses, EMULATE: tl.constexpr):
    """Load 32-bit words, as int32, into the threads that compute with them.

    Triton would load 16 bytes a thread and move them between threads through shared memory, with
    barriers. An instruction that it does not know gets the layout of its result's use.
    """
    if EMULATE:
        bits = tl.load(addresses.to(tl.pointer_type(tl.int32)))
    else:
        bits = tl.inline_asm_elementwise(
            "ld.global.b32 $0, [$1];", "=r,l", [addresses],
            dtype=tl.int32, is_pure=True, pack=1,
        )  # fmt: skip
    return bits


@triton.jit
def load_inputs(addresses, EMULATE: tl.constexpr):
    """`load_bits` of 16 bytes at once: a thread's words 0 to 3 on the last axis."""
    if EMULATE:
        bits = load_bits(addresses, EMULATE)
    else:
        bits = tl.inline_asm_elementwise(
            "ld.global.v4.b32 {$0, $1, $2, $3}, [$4];", "=r,=r,=r,=r,l,l,l,l",
            [addresses], dtype=tl.int32, is_pure=True, pack=4,
        )  # fmt: skip
    return bits


@triton.jit
def load_words(addresses, VECTOR: tl.constexpr, EMULATE: tl.constexpr):
    """`load_bits` of words 0 to 3, on the last axis, of two vectors, 8 apart on the axis of ranks.

    In the product's operand a thread's numbers alternate between two vectors, one by one or in
    pairs. Without VECTOR addresses need not be multiples of 16.
    """
    if EMULATE:
        bits = load_bits(addresses, EMULATE)
    elif VECTOR and _PAIRED:
        bits = tl.inline_asm_elementwise(
            "ld.global.v4.b32 {$0, $1, $4, $5}, [$8]; ld.global.v4.b32 {$2, $3, $6, $7}, [$10];",
            "=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,l,l,l,l,l,l,l,l",
            [addresses], dtype=tl.int32, is_pure=True, pack=8,
        )  # fmt: skip
    elif VECTOR:
        bits = tl.inline_asm_elementwise(
            "ld.global.v4.b32 {$0, $2, $4, $6}, [$8]; ld.global.v4.b32 {$1, $3, $5, $7}, [$9];",
            "=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,l,l,l,l,l,l,l,l",
            [addresses], dtype=tl.int32, is_pure=True, pack=8,
        )  # fmt: skip
    else:
        bits = load_bits(addresses, EMULATE)
    return bits


@triton.jit
def store_bits(addresses, bits, EMULATE: tl.constexpr):
    """Store 32-bit words from the threads that have them; Triton would exchange them first."""
    if EMULATE:
        tl.store(addresses.to(tl.pointer_type(tl.int32)), bits)
    else:
        tl.inline_asm_elementwise(
            "st.global.b32 [$1], $2; mov.b32 $0, 0;", "=r,l,r", [addresses, bits],
            dtype=tl.int32, is_pure=False, pack=1,
        )  # fmt: skip


@triton.jit
def row_addresses(first, rank, last, stride, EMULATE: tl.constexpr):
    """`first + min(rank, last) * stride`, int64, by two instructions.

    Compilers would multiply 64-bit numbers, and compute what no tile changes once, for all planes,
    which they keep on the stack.
    """
    if EMULATE:
        addresses = first + tl.minimum(rank, last).to(tl.int64) * stride
    else:
        addresses = tl.inline_asm_elementwise(
            "{.reg .s32 row; min.s32 row, $2, $3; mad.wide.s32 $0, row, $4, $1;}", "=l,l,r,r,r",
            [first, rank, last, stride], dtype=tl.int64, is_pure=True, pack=1,
        )  # fmt: skip
    return addresses


@triton.jit
def load_run(addresses, COUNT: tl.constexpr, VECTOR: tl.constexpr, EMULATE: tl.constexpr):
    """`load_bits` of COUNT consecutive words at each address, as a tuple.

    The 256 bytes around come to L2: they are of the program's next tiles, or its neighbours'.
    Without VECTOR addresses need not be multiples of the run's bytes, or of 16.
    """
    if COUNT == 8 or (COUNT > 1 and (EMULATE or not VECTOR)):
        run = load_run(addresses, COUNT // 2, VECTOR, EMULATE)
        run += load_run(addresses + 2 * COUNT, COUNT // 2, VECTOR, EMULATE)
    elif EMULATE:
        run = (load_bits(addresses, EMULATE),)
    elif COUNT == 1:
        run = (
            tl.inline_asm_elementwise(
                "ld.global.L2::256B.b32 $0, [$1];", "=r,l", [addresses],
                dtype=tl.int32, is_pure=True, pack=1,
            ),
        )  # fmt: skip
    elif COUNT == 2:
        run = tl.inline_asm_elementwise(
            "ld.global.L2::256B.v2.b32 {$0, $1}, [$2];", "=r,=r,l", [addresses],
            dtype=(tl.int32, tl.int32), is_pure=True, pack=1,
        )  # fmt: skip
    else:
        run = tl.inline_asm_elementwise(
            "ld.global.L2::256B.v4.b32 {$0, $1, $2, $3}, [$4];", "=r,=r,=r,=r,l", [addresses],
            dtype=(tl.int32, tl.int32, tl.int32, tl.int32), is_pure=True, pack=1,
        )  # fmt: skip
    return run


@triton.jit
def spread(words, EMULATE: tl.constexpr):
    """The bytes of each word as int8, the lowest first, on two trailing axes of size 2."""
    if EMULATE:
        first, second = (words & 0xFF).to(tl.int8), ((words >> 8) & 0xFF).to(tl.int8)
        third, fourth = ((words >> 16) & 0xFF).to(tl.int8), ((words >> 24) & 0xFF).to(tl.int8)
        spread_bytes = tl.join(tl.join(first, third), tl.join(second, fourth))
    else:
        copies = tl.join(words, words)
        spread_bytes = tl.inline_asm_elementwise(
            "mov.b32 $0, $1;", "=r,r,r,r,r", [tl.join(copies, copies)],
            dtype=tl.int8, is_pure=True, pack=4,
        )  # fmt: skip
    return spread_bytes


@triton.jit
def pick_bytes(first, second, selector, EMULATE: tl.constexpr):
    """A word of four bytes: number `selector >> 4 * i & 7` of those of `first`, then `second`."""
    if EMULATE:
        picked = tl.zeros_like(first)
        for i in tl.static_range(4):
            number = (selector >> (4 * i)) & 7
            word = tl.where(number < 4, first, second)
            picked |= ((word >> (8 * (number % 4))) & 0xFF) << (8 * i)
    else:
        picked = tl.inline_asm_elementwise(
            "prmt.b32 $0, $1, $2, $3;", "=r,r,r,r", [first, second, selector],
            dtype=tl.int32, is_pure=True, pack=1,
        )  # fmt: skip
    return picked


@triton.jit
def dot_bytes(a, b, acc, EMULATE: tl.constexpr):
    """`a @ b + acc` of int8 operands; exact."""
    if EMULATE:  # Triton's interpreter overflows.
        product = tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="ieee")
        acc += product.to(tl.int32)
    else:
        acc = tl.dot(a, b, acc, out_dtype=tl.int32)
    return acc


@triton.jit
def _inverse(peak):
    """What makes the largest number the largest fixed-point number; of zeros anything."""
    return _LARGEST / tl.maximum(peak, 1e-30)


@triton.jit
def _fixed_point(x, inverse):
    """The bytes of `x * inverse`, without their signs, in bits 8 to 15 and 0 to 7."""
    return (x * inverse + _TO_FIXED).to(tl.int32, bitcast=True)


@triton.jit
def _input(x_ptrs, scale_ptrs, column, number, digit, h_in, scaled):
    """Input `number` of a word of a plane's bytes, and its scale; `column` is that of the first."""
    offset = number << digit
    x = tl.load(x_ptrs + offset, mask=column < h_in - offset, other=0.0)
    scale = tl.load(scale_ptrs + offset, mask=column < scaled - offset, other=1.0)
    return x.to(tl.float32), scale


@triton.jit
def _bytes(t0, t1, t2, t3, selector, EMULATE: tl.constexpr):
    """A word of the high bytes of four fixed-point numbers, or of their low ones."""
    low_pair, high_pair = pick_bytes(t0, t1, 0x5140, EMULATE), pick_bytes(t2, t3, 0x5140, EMULATE)
    return pick_bytes(low_pair, high_pair, selector, EMULATE) ^ _SIGNS


@triton.jit(do_not_specialize=UNSPECIALIZED)
def prepare_kernel(
    xs_ptr, xs_stride, scales_ptr, scales_stride, x_ptr, x_stride, h_in, padded_h_in,
    rows_ptr, slots_ptr, addresses_ptr, descriptors_ptr,
    LINEARS: tl.constexpr, VECTOR: tl.constexpr, OVERLAP: tl.constexpr, EMULATE: tl.constexpr,
):  # fmt: skip
    """A block of a row times a linear's column scale: fixed-point numbers, their scale and sum.

    A program stores them for one plane of V's words, or all of them.
    """
    start_next(OVERLAP)
    position, block = tl.program_id(0), tl.program_id(1)
    linear, first_digit = tl.program_id(2) % LINEARS, tl.program_id(2) // LINEARS
    row = tl.load(rows_ptr + position).to(tl.int64)
    slot = tl.load(slots_ptr + position // _ROWS)
    # After a product nothing hides these loads: all that depends on the slot is asked for at once.
    descriptor = descriptors_ptr + (slot * LINEARS + linear) * _DESCRIPTOR
    tiles, scale_word, planes = (
        tl.load(descriptor), tl.load(descriptor + 7), tl.load(descriptor + 15),
    )  # fmt: skip
    address = tl.load(addresses_ptr + slot * LINEARS + linear)
    if (row < 0) | (tiles == 0):
        wait_for_previous(OVERLAP)
        return
    columns = block * _BLOCK_INPUTS + tl.arange(0, _BLOCK_INPUTS)
    scale_ptr = address.to(tl.pointer_type(tl.float32)) + scale_word
    scaled = tl.where(scale_word >= 0, h_in, 0)
    column_scale = tl.load(scale_ptr + columns, mask=columns < scaled, other=1.0)
    x_ptr += wait_for_previous(OVERLAP) + row * x_stride
    if VECTOR:  # One check for all numbers of a load.
        h_in = h_in // 16 * 16
    x = tl.load(x_ptr + columns, mask=columns < h_in, other=0.0).to(tl.float32) * column_scale
    # As integers NaN is the largest, and makes the scale NaN.
    peak = tl.max(x.to(tl.int32, bitcast=True) & _FINITE, axis=0).to(tl.float32, bitcast=True)
    inverse = _inverse(peak)
    scale = peak * (1.0 / _LARGEST)
    total = tl.sum((_fixed_point(x, inverse) & 0xFFFF) - 0x8080, axis=0).to(tl.float32)
    scales_ptr += position * scales_stride + (linear * tl.num_programs(1) + block) * 2
    tl.store(scales_ptr, scale)
    tl.store(scales_ptr + 1, total * scale)
    word = tl.arange(0, _BLOCK_INPUTS // 4)
    xs_ptr += position.to(tl.int64) * xs_stride + linear * (2 * padded_h_in)
    xs_ptr += block * (_BLOCK_INPUTS // 4) + word
    for digit in range(first_digit, 4, tl.num_programs(2) // LINEARS):
        if planes & (8 >> digit):
            # Bytes of a word, and words of a thread, are those of the weights; fields are apart.
            column = (word >> (2 + digit) << (4 + digit)) + ((word & 3) << (2 + digit))
            column += block * _BLOCK_INPUTS + ((word >> 2) & ((1 << digit) - 1))
            x_ptrs, scale_ptrs = x_ptr + column, scale_ptr + column
            x0, scale_0 = _input(x_ptrs, scale_ptrs, column, 0, digit, h_in, scaled)
            x1, scale_1 = _input(x_ptrs, scale_ptrs, column, 1, digit, h_in, scaled)
            x2, scale_2 = _input(x_ptrs, scale_ptrs, column, 2, digit, h_in, scaled)
            x3, scale_3 = _input(x_ptrs, scale_ptrs, column, 3, digit, h_in, scaled)
            t0, t1 = _fixed_point(x0 * scale_0, inverse), _fixed_point(x1 * scale_1, inverse)
            t2, t3 = _fixed_point(x2 * scale_2, inverse), _fixed_point(x3 * scale_3, inverse)
            out = xs_ptr + digit * (padded_h_in // 2)
            tl.store(out, _bytes(t0, t1, t2, t3, _HIGH, EMULATE))
            tl.store(out + padded_h_in // 4, _bytes(t0, t1, t2, t3, _LOW, EMULATE))


@triton.jit
def _codes(words, P: tl.constexpr, FIELD: tl.constexpr, LIFT: tl.constexpr = 0):
    """The code of P bits in each byte: its `FIELD`-th, shifted left by LIFT; 8 bits less 128."""
    SHIFT: tl.constexpr = P * FIELD - LIFT
    shifted = words >> SHIFT if SHIFT >= 0 else words << -SHIFT
    return words ^ _SIGNS if P == 8 else shifted & ((_BYTES * (2**P - 1)) << LIFT)


@triton.jit
def _prefetch_tile(words_ptr, plane_words, bits, rank_count, h_in, WARPS: tl.constexpr):
    """Ask for all words of a tile of V."""
    index = tl.arange(0, WARPS * 32) * 16
    for DIGIT in tl.static_range(4):
        if bits & (8 >> DIGIT):
            words = _ceil_div(h_in * (8 >> DIGIT), 32) * rank_count
            plane_ptr = words_ptr + plane_words[DIGIT]
            for first in range(0, words, WARPS * 32 * 16):
                prefetch(plane_ptr + first + index, first + index < words)


@triton.jit
def _shrink_plane(
    totals, weight, xs_addresses, scale_addresses, words_address, last, h_in,
    P: tl.constexpr, WARPS: tl.constexpr, VECTOR: tl.constexpr, EMULATE: tl.constexpr,
):  # fmt: skip
    """Add one plane's projection, times `weight`, to `totals`, each (warps, ranks, rows).

    Past rank `last`, words of the last.

    A step of a warp takes 16 words of each vector, of wide codes 32 or 64. The steps take the
    parts of the sum in turn.
    """
    FIELDS: tl.constexpr = 8 // P
    RUNS: tl.constexpr = P // 2 if P > 2 else 1
    INPUTS: tl.constexpr = 512 * RUNS // P
    index = tl.arange(0, 4) * 16
    unit = tl.arange(0, WARPS)
    byte = (unit * (64 * RUNS))[:, None, None] + index[None, None, :]
    rank = tl.arange(0, _RANKS)[None, :, None]
    stride = 4 * _ceil_div(h_in * P, 32)
    words_addresses = row_addresses(words_address + byte, rank, last, stride, EMULATE)
    words_addresses = words_addresses[:, :, :, None] + (index // 4)[None, None, None, :]
    x_addresses = (xs_addresses[None, :, None] + byte * FIELDS)[:, :, :, None]
    x_addresses += (index // 4)[None, None, None, :]
    words = load_words(words_addresses, VECTOR, EMULATE)
    for _ in range(_ceil_div(h_in, INPUTS * _PARTS) * (_PARTS // WARPS)):
        acc = tl.zeros((WARPS, _RANKS, 2 * _ROWS), tl.int32)
        for run in tl.static_range(RUNS):
            # The next words are asked for before these are used.
            words_addresses += 64 if run + 1 < RUNS else 64 * (1 + RUNS * (WARPS - 1))
            next_words = load_words(words_addresses, VECTOR, EMULATE)
            for field in tl.static_range(FIELDS):
                codes = spread(_codes(words, P, field), EMULATE)
                codes = tl.reshape(codes, (WARPS, _RANKS, 4, 2, 2, 4))
                codes = tl.permute(codes, (0, 1, 3, 2, 4, 5) if _PAIRED else (0, 1, 3, 4, 2, 5))
                codes = tl.reshape(codes, (WARPS, _RANKS, 64))
                x = load_inputs(x_addresses + (64 * FIELDS * run + 16 * field), EMULATE)
                x = tl.reshape(spread(x, EMULATE), (WARPS, 2 * _ROWS, 4, 2, 2, 4))
                x = tl.permute(x, (0, 3, 2, 4, 5, 1) if _PAIRED else (0, 3, 4, 2, 5, 1))
                x = tl.reshape(x, (WARPS, 64, 2 * _ROWS))
                acc = dot_bytes(codes, x, acc, EMULATE)
            words = next_words
        high, low = tl.split(tl.reshape(acc, (WARPS, _RANKS, _ROWS, 2)))
        block = (unit * INPUTS).to(tl.uint32) // _BLOCK_INPUTS
        scale = load_bits(scale_addresses[None, None, :] + (block * 8)[:, None, None], EMULATE)
        scale = scale.to(tl.float32, bitcast=True) * weight
        total = totals[0] + (high * 256 + low).to(tl.float32) * scale
        totals = totals[1:] + (total,)  # noqa: RUF005 (Triton knows no other)
        unit += WARPS
        x_addresses += 64 * RUNS * FIELDS * WARPS
    return totals


@triton.jit(do_not_specialize=UNSPECIALIZED)
def shrink_kernel(
    projected_ptr, peaks_ptr, rests_ptr, max_tiles, xs_ptr, xs_stride,
    scales_ptr, scales_stride, block_count, h_in, padded_h_in,
    slots_ptr, addresses_ptr, descriptors_ptr,
    LINEARS: tl.constexpr, BLOCKS: tl.constexpr, WARPS: tl.constexpr, VECTOR: tl.constexpr,
    OVERLAP: tl.constexpr, EMULATE: tl.constexpr,
):  # fmt: skip
    """`s * (x V_hat^T)` for one chunk of rows and grid-strided tiles of ranks.

    And of each tile the largest magnitude, and what the zero points of U take from every output.
    """
    start_next(OVERLAP)
    chunk = tl.program_id(1)
    slot = tl.load(slots_ptr + chunk)
    if slot == 0:
        wait_for_previous(OVERLAP)
        return
    descriptors_ptr += slot * LINEARS * _DESCRIPTOR
    last = descriptors_ptr + (LINEARS - 1) * _DESCRIPTOR
    count = tl.load(last + 1) + tl.load(last)
    if tl.program_id(0) >= count:
        wait_for_previous(OVERLAP)
    positions = chunk * _ROWS + tl.arange(0, _ROWS)
    columns = tl.arange(0, 2 * _ROWS)  # a row's high bytes, its low ones
    for tile in range(tl.program_id(0), count, tl.num_programs(0)):
        linear = 0
        for other in tl.static_range(1, LINEARS):
            linear += (tile >= tl.load(descriptors_ptr + other * _DESCRIPTOR + 1)).to(tl.int32)
        descriptor = descriptors_ptr + linear * _DESCRIPTOR
        address = tl.load(addresses_ptr + slot * LINEARS + linear)
        words_ptr = address.to(tl.pointer_type(tl.int32))
        floats_ptr = address.to(tl.pointer_type(tl.float32))
        tile_ptr = words_ptr + tl.load(descriptor + 2)
        tile_ptr += (tile - tl.load(descriptor + 1)) * _TILE
        v_bits, u_bits = tl.load(tile_ptr), tl.load(tile_ptr + 7)
        rank_count = tl.load(tile_ptr + 2)
        plane_words = (
            tl.load(tile_ptr + 3), tl.load(tile_ptr + 4), tl.load(tile_ptr + 5),
            tl.load(tile_ptr + 6),
        )  # fmt: skip
        index = tl.arange(0, _RANKS)
        mask = index < rank_count
        delta_ranks = tl.load(tile_ptr + 1) + index
        s = tl.load(floats_ptr + tl.load(descriptor + 3) + delta_ranks, mask=mask, other=0.0)
        v_zero = _zero(floats_ptr, tl.load(descriptor + 4), delta_ranks, mask, v_bits)
        u_zero = _zero(floats_ptr, tl.load(descriptor + 5), delta_ranks, mask, u_bits)
        # As `expand` takes them, codes of U fill seven bits or eight, whatever their width.
        lift = tl.maximum(7 - u_bits, 0)
        u_zero *= (1 << lift).to(tl.float32)
        s *= ((127 - lift) << 23).to(tl.float32, bitcast=True)
        if OVERLAP:
            _prefetch_tile(words_ptr, plane_words, v_bits, rank_count, h_in, WARPS)
        started = wait_for_previous(OVERLAP)
        scale_ptrs = scales_ptr + started + positions * scales_stride + linear * (2 * block_count)
        scale_addresses = scale_ptrs.to(tl.int64)
        offsets = (chunk * _ROWS + columns // 2).to(tl.int64) * xs_stride
        offsets += columns % 2 * (padded_h_in // 4) + linear * (2 * padded_h_in)
        xs_addresses = (xs_ptr + started + offsets).to(tl.int64)
        totals = (tl.zeros((WARPS, _RANKS, _ROWS), tl.float32),) * (_PARTS // WARPS)
        for DIGIT in tl.static_range(4):
            if DIGIT == 3:
                # Not earlier: compilers would keep them on the stack, and wait for them first.
                blocks = tl.arange(0, BLOCKS)
                sums = tl.load(
                    scale_ptrs[:, None] + (blocks * 2 + 1)[None, :],
                    mask=(blocks < block_count)[None, :], other=0.0,
                )  # fmt: skip
            if v_bits & (8 >> DIGIT):
                weight = (1 << (v_bits & ((8 >> DIGIT) - 1))).to(tl.float32)
                totals = _shrink_plane(
                    totals, weight, xs_addresses + DIGIT * 2 * padded_h_in, scale_addresses,
                    address + 4 * plane_words[DIGIT].to(tl.int64), rank_count - 1, h_in,
                    8 >> DIGIT, WARPS, VECTOR, EMULATE,
                )  # fmt: skip
        result = _sum_over_warps(_sum_of_parts(totals))
        result -= v_zero[:, None] * tl.sum(sums, axis=1)[None, :]
        result *= s[:, None]  # 0 past the last rank
        out = projected_ptr + ((positions * max_tiles + tile) * _RANKS)[None, :] + index[:, None]
        store_bits(out.to(tl.int64), result.to(tl.int32, bitcast=True), EMULATE)
        magnitudes = result.to(tl.int32, bitcast=True) & _FINITE
        peak, rest = tl.reduce((magnitudes, result * u_zero[:, None]), 0, _largest_and_sum)
        places = (chunk * max_tiles + tile) * _ROWS + tl.arange(0, _ROWS)
        tl.store(peaks_ptr + places, peak)
        tl.store(rests_ptr + places, rest)


@triton.jit
def _largest_and_sum(largest, total, other_largest, other_total):
    """Combine what two parts have: the largest of some numbers, and the sum of others."""
    return tl.maximum(largest, other_largest), total + other_total


@triton.jit
def _zero(floats_ptr, offset_word, ranks, mask, bits):
    """The zero points of codes of `bits` as the products take them: of 8 bits, less 128."""
    zero = ((1 << bits) - 1).to(tl.float32) * 0.5 - tl.where(bits == 8, 128.0, 0.0)
    offset_ptrs = floats_ptr + tl.maximum(offset_word, 0) + ranks
    return zero + tl.where(offset_word >= 0, tl.load(offset_ptrs, mask=mask, other=0.0), 0.0)


@triton.jit
def _block(blocks_address, block, end, EMULATE: tl.constexpr):
    """A block of ranks of each warp: its tile, its ranks, its first word, and its weight."""
    address = blocks_address + tl.maximum(tl.minimum(block, end - 1), 0) * (4 * _BLOCK)
    tile, count, word, weight = load_run(address, 4, True, EMULATE)
    return tile, count, word, tl.where(block < end, weight.to(tl.float32, bitcast=True), 0.0)


@triton.jit
def _block_words(
    words_address, word, count, tile, h_out,
    P: tl.constexpr, COLUMNS: tl.constexpr, VECTOR: tl.constexpr, EMULATE: tl.constexpr,
):  # fmt: skip
    """The words of a run of columns a thread, of ranks 0, 4, ... of a block; of 1, 5, ...; etc."""
    BITS: tl.constexpr = COLUMNS // 8 * P
    COUNT: tl.constexpr = BITS // 32 if BITS > 32 else 1
    # Past the last column or word, those of the next vector or region: of columns that do not
    # exist.
    column = tl.arange(0, 8) * BITS // 32 + tile * (COLUMNS * P // 32)
    first = words_address + (word[:, None, None] + column[None, None, :]).to(tl.int64) * 4
    stride = 4 * _ceil_div(h_out * P, 32)
    # Past the last rank, words of the last.
    last = count[:, None, None] - 1
    index = tl.arange(0, _RANKS // 4)[None, :, None] * 4
    row_0 = row_addresses(first, index, last, stride, EMULATE)
    row_1 = row_addresses(first, index + 1, last, stride, EMULATE)
    row_2 = row_addresses(first, index + 2, last, stride, EMULATE)
    row_3 = row_addresses(first, index + 3, last, stride, EMULATE)
    return (
        load_run(row_0, COUNT, VECTOR, EMULATE), load_run(row_1, COUNT, VECTOR, EMULATE),
        load_run(row_2, COUNT, VECTOR, EMULATE), load_run(row_3, COUNT, VECTOR, EMULATE),
    )  # fmt: skip


@triton.jit
def _prefetch_blocks(
    address, blocks_address, bounds, tile, h_out, COLUMNS: tl.constexpr, WARPS: tl.constexpr
):
    """Ask for the words of all blocks of a tile of outputs, one rank of a block a thread."""
    AT_ONCE: tl.constexpr = WARPS * 4
    words_ptr = address.to(tl.pointer_type(tl.int32))
    blocks_ptr = blocks_address.to(tl.pointer_type(tl.int32))
    _, second, third, fourth, end = bounds
    index = tl.arange(0, _RANKS)[None, :]
    for first in range(0, end, AT_ONCE):
        block = first + tl.arange(0, AT_ONCE)
        digit = (block >= second).to(tl.int32) + (block >= third).to(tl.int32)
        plane = 8 >> (digit + (block >= fourth).to(tl.int32))
        block_ptr = blocks_ptr + block * _BLOCK
        count = tl.load(block_ptr + 1, mask=block < end, other=0)
        word = tl.load(block_ptr + 2, mask=block < end, other=0) + tile * (COLUMNS // 32) * plane
        word = word[:, None] + index * _ceil_div(h_out * plane, 32)[:, None]
        prefetch(words_ptr + word, index < count[:, None])


@triton.jit
def _terms(projected_addresses, tile, scale, EMULATE: tl.constexpr):
    """A block's projections as fixed-point numbers, a byte of four ranks a word."""
    index = tl.arange(0, _RANKS // 4)[None, :, None] * 16
    addresses = projected_addresses[None, None, :] + (tile * (4 * _RANKS))[:, None, None] + index
    t0, t1, t2, t3 = load_run(addresses, 4, True, EMULATE)
    t0 = _fixed_point(t0.to(tl.float32, bitcast=True), scale)
    t1 = _fixed_point(t1.to(tl.float32, bitcast=True), scale)
    t2 = _fixed_point(t2.to(tl.float32, bitcast=True), scale)
    t3 = _fixed_point(t3.to(tl.float32, bitcast=True), scale)
    selector = tl.where(tl.arange(0, 2 * _ROWS) % 2 == 0, _HIGH, _LOW)[None, None, :]
    return _bytes(t0, t1, t2, t3, selector, EMULATE)


@triton.jit
def _two_of_four(w0, w1, w2, w3, selector, EMULATE: tl.constexpr):
    """Words of a byte of each of four, and of another; `selector` picks them from two of four."""
    a, b = pick_bytes(w0, w1, selector, EMULATE), pick_bytes(w2, w3, selector, EMULATE)
    return pick_bytes(a, b, 0x5410, EMULATE), pick_bytes(a, b, 0x7632, EMULATE)


@triton.jit
def _transpose_bytes(words, WORD: tl.constexpr, BITS: tl.constexpr, EMULATE: tl.constexpr):
    """Words of the first, second, ... bytes of four ranks' runs of BITS bits, from word WORD on."""
    w0, w1, w2, w3 = words[0][WORD], words[1][WORD], words[2][WORD], words[3][WORD]
    if BITS >= 32:
        transposed = _two_of_four(w0, w1, w2, w3, 0x5140, EMULATE)
        transposed += _two_of_four(w0, w1, w2, w3, 0x7362, EMULATE)
        if BITS > 32:
            transposed += _transpose_bytes(words, WORD + 1, BITS - 32, EMULATE)
    elif BITS == 16:  # Two threads share a word.
        half = (0x5140 + 0x2222 * (tl.arange(0, 8) % 2))[None, None, :]
        transposed = _two_of_four(w0, w1, w2, w3, half, EMULATE)
    else:  # Four do.
        byte = (0x5140 + 0x1111 * (tl.arange(0, 8) % 4))[None, None, :] & 0x77
        transposed = _two_of_four(w0, w1, w2, w3, byte, EMULATE)[:1]
    return transposed


@triton.jit
def _codes_of_run(transposed, P: tl.constexpr, FIRST: tl.constexpr, STEP: tl.constexpr):
    """Codes FIRST, FIRST + STEP, ... of runs whose bytes are transposed, on trailing axes of 2.

    They are shifted to the upper bits of their byte: those of 7 bits or less fill the lower seven.
    """
    FIELDS: tl.constexpr = 8 // P
    if len(transposed) * FIELDS == STEP:
        codes = _codes(transposed[FIRST // FIELDS], P, FIRST % FIELDS, 7 - P if P < 8 else 0)
    else:
        even = _codes_of_run(transposed, P, FIRST, 2 * STEP)
        odd = _codes_of_run(transposed, P, FIRST + STEP, 2 * STEP)
        codes = tl.join(even, odd)
    return codes


@triton.jit
def _expand_plane(
    acc, projected_addresses, inverse, words_address, blocks_address, first_block, begin, end,
    steps, tile, h_out,
    P: tl.constexpr, COLUMNS: tl.constexpr, WARPS: tl.constexpr, VECTOR: tl.constexpr,
    EMULATE: tl.constexpr,
):  # fmt: skip
    """Add the products of all planes of P bits to `acc` (warps, columns, rows' bytes).

    Blocks of ranks are strided over the warps. A thread takes a run of an eighth of the tile's
    columns: column `8 * i + run` of `acc` is the run's column i, for every plane.
    """
    RUN: tl.constexpr = COLUMNS // 8
    block = begin + tl.arange(0, WARPS)
    rank_tile, count, word, weight = first_block
    words = _block_words(words_address, word, count, tile, h_out, P, COLUMNS, VECTOR, EMULATE)
    for _ in range(steps):
        # The next block is asked for before this one is used.
        block += WARPS
        next_tile, count, word, next_weight = _block(blocks_address, block, end, EMULATE)
        if P * COLUMNS * WARPS < 8192:
            next_words = _block_words(
                words_address, word, count, tile, h_out, P, COLUMNS, VECTOR, EMULATE
            )
        scale = inverse[None, None, :] * weight[:, None, None]
        terms = spread(_terms(projected_addresses, rank_tile, scale, EMULATE), EMULATE)
        terms = tl.reshape(terms, (WARPS, _RANKS // 4, 2 * _ROWS, 4))
        terms = tl.reshape(tl.permute(terms, (0, 1, 3, 2)), (WARPS, _RANKS, 2 * _ROWS))
        codes = _codes_of_run(_transpose_bytes(words, 0, RUN * P, EMULATE), P, 0, 1)
        codes = tl.reshape(spread(codes, EMULATE), (WARPS, _RANKS // 4, 8, RUN, 4))
        codes = tl.reshape(tl.permute(codes, (0, 3, 2, 1, 4)), (WARPS, COLUMNS, _RANKS))
        acc = dot_bytes(codes, terms, acc, EMULATE)
        if P * COLUMNS * WARPS >= 8192:  # More registers would be spilled.
            next_words = _block_words(
                words_address, word, count, tile, h_out, P, COLUMNS, VECTOR, EMULATE
            )
        rank_tile, weight, words = next_tile, next_weight, next_words
    return acc


@triton.jit
def _sum_over_warps(parts):
    """Sum (warps, columns, rows) over the warps, in pairs; each thread is left with a few sums.

    `tl.sum` would leave every warp with all of them.
    """
    WARPS: tl.constexpr = parts.shape[0]
    COLUMNS: tl.constexpr = parts.shape[1]
    ROWS: tl.constexpr = parts.shape[2]
    if WARPS == 1:
        total = tl.reshape(parts, (COLUMNS, ROWS))
    else:
        pairs = tl.permute(tl.reshape(parts, (2, WARPS // 2, COLUMNS, ROWS)), (1, 2, 3, 0))
        even, odd = tl.split(pairs)
        total = _sum_over_warps(even + odd)
    return total


@triton.jit
def _sum_of_parts(parts):
    """Sum parts in pairs, in the order in which `_sum_over_warps` would if each had its warps."""
    return parts[0] if len(parts) == 1 else _sum_of_parts(parts[::2]) + _sum_of_parts(parts[1::2])


@triton.jit
def _peak_and_rest(peaks_ptr, rests_ptr, tiles, EMULATE: tl.constexpr):
    """The rows' largest projections and what the zero points take, (rows), from those of tiles.

    A warp takes eight tiles at a time, in an order that does not depend on the number of warps.
    """
    peak = tl.zeros((8, _ROWS), tl.int32)
    rest = tl.zeros((8, _ROWS), tl.float32)
    place = tl.arange(0, 8)[:, None] * _ROWS + tl.arange(0, _ROWS)[None, :]
    for first in range(0, tiles, 32):
        for some in tl.static_range(4):
            offsets = (first + 8 * some) * _ROWS + place
            mask = offsets < tiles * _ROWS
            peak = tl.maximum(peak, tl.load(peaks_ptr + offsets, mask=mask, other=0))
            rest += tl.load(rests_ptr + offsets, mask=mask, other=0.0)
    return tl.max(peak, axis=0).to(tl.float32, bitcast=True), tl.sum(rest, axis=0)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def expand_kernel(
    y_ptr, y_stride, projected_ptr, peaks_ptr, rests_ptr, max_tiles, rows_ptr, slots_ptr, used_ptr,
    addresses_ptr, descriptors_ptr, output_tiles_ptr, output_tiles,
    LINEARS: tl.constexpr, COLUMNS: tl.constexpr, WARPS: tl.constexpr, VECTOR: tl.constexpr,
    OVERLAP: tl.constexpr, EMULATE: tl.constexpr,
):  # fmt: skip
    """Add the deltas to chunks of rows and tiles of the linears' outputs.

    All programs take as many tiles, one after another. What the tiles of a chunk and linear have in
    common is loaded once.
    """
    start_next(OVERLAP)
    everything = tl.load(used_ptr) * output_tiles
    share = tl.cdiv(everything, tl.num_programs(0))
    item = tl.program_id(0) * share
    end = tl.minimum(item + share, everything)
    while item < end:
        chunk = item // output_tiles
        output_tile_ptr = output_tiles_ptr + item % output_tiles * _OUTPUT_TILE
        slot = tl.load(slots_ptr + chunk)
        linear = tl.load(output_tile_ptr)
        first_tile = tl.load(output_tile_ptr + 1)
        begin = tl.load(output_tile_ptr + 2)
        h_out = tl.load(output_tile_ptr + 3)
        if VECTOR:
            begin, h_out = tl.multiple_of(begin, 4), tl.multiple_of(h_out, 4)
        last_tile = tl.minimum(_ceil_div(h_out, COLUMNS), first_tile + end - item)
        item += last_tile - first_tile
        # All that depends on the slot is asked for at once.
        descriptor = descriptors_ptr + (slot * LINEARS + linear) * _DESCRIPTOR
        address = tl.load(addresses_ptr + slot * LINEARS + linear)
        tiles, first_rank_tile, scale_word, bias_word, blocks_word = (
            tl.load(descriptor), tl.load(descriptor + 1), tl.load(descriptor + 6),
            tl.load(descriptor + 8), tl.load(descriptor + 9),
        )  # fmt: skip
        bound_0, bound_1, bound_2, bound_3, bound_4 = (
            tl.load(descriptor + 10), tl.load(descriptor + 11), tl.load(descriptor + 12),
            tl.load(descriptor + 13), tl.load(descriptor + 14),
        )  # fmt: skip
        bounds = (bound_0, bound_1, bound_2, bound_3, bound_4)
        rows = tl.load(rows_ptr + chunk * _ROWS + tl.arange(0, _ROWS))
        if (tiles > 0) | (bias_word >= 0):
            floats_ptr = address.to(tl.pointer_type(tl.float32))
            blocks_address = address + 4 * tl.maximum(blocks_word, 0)
            warp = tl.arange(0, WARPS)
            blocks = (
                _block(blocks_address, bound_0 + warp, bound_1, EMULATE),
                _block(blocks_address, bound_1 + warp, bound_2, EMULATE),
                _block(blocks_address, bound_2 + warp, bound_3, EMULATE),
                _block(blocks_address, bound_3 + warp, bound_4, EMULATE),
            )
            if OVERLAP & (tiles > 0):
                _prefetch_blocks(address, blocks_address, bounds, first_tile, h_out, COLUMNS, WARPS)
            started = wait_for_previous(OVERLAP)
            places = (chunk * max_tiles + first_rank_tile) * _ROWS + started
            peak, rest = _peak_and_rest(peaks_ptr + places, rests_ptr + places, tiles, EMULATE)
            positions = chunk * _ROWS + tl.arange(0, 2 * _ROWS) // 2
            offsets = (positions * max_tiles + first_rank_tile).to(tl.int64) * (4 * _RANKS)
            projected_addresses = (projected_ptr + started).to(tl.int64) + offsets
            inverse = _inverse(tl.reshape(tl.join(peak, peak), (2 * _ROWS,)))
            for tile in range(first_tile, last_tile):
                acc = tl.zeros((WARPS, COLUMNS, 2 * _ROWS), tl.int32)
                for DIGIT in tl.static_range(4):
                    if DIGIT == 3:
                        columns = tile * COLUMNS + tl.arange(0, COLUMNS)
                        out = y_ptr + started + rows.to(tl.int64)[:, None] * y_stride
                        out += (begin + columns)[None, :]
                        mask = (rows >= 0)[:, None] & (columns < h_out)[None, :]
                        y = tl.load(out, mask=mask, other=0.0).to(tl.float32)
                        row_scale = tl.load(
                            floats_ptr + scale_word + columns,
                            mask=columns < tl.where(scale_word >= 0, h_out, 0), other=1.0,
                        )  # fmt: skip
                        bias = tl.load(
                            floats_ptr + bias_word + columns,
                            mask=columns < tl.where(bias_word >= 0, h_out, 0), other=0.0,
                        )  # fmt: skip
                    steps = _ceil_div(bounds[DIGIT + 1] - bounds[DIGIT], WARPS)
                    # Into a condition Triton would move the exchange of sums between warps.
                    for _ in range(tl.minimum(steps, 1)):
                        acc = _expand_plane(
                            acc, projected_addresses, inverse, address, blocks_address,
                            blocks[DIGIT], bounds[DIGIT], bounds[DIGIT + 1], steps, tile, h_out,
                            8 >> DIGIT, COLUMNS, WARPS, VECTOR, EMULATE,
                        )  # fmt: skip
                acc = tl.reshape(acc, (WARPS, COLUMNS // 8, 8, _ROWS, 2))
                acc = tl.reshape(tl.permute(acc, (0, 3, 2, 1, 4)), (WARPS, _ROWS, 2 * COLUMNS))
                # Sums of integers are the same for any number of warps.
                high, low = tl.split(tl.reshape(_sum_over_warps(acc), (_ROWS, COLUMNS, 2)))
                total = high.to(tl.float32) * 256.0 + low.to(tl.float32)
                total = total * (peak * (1.0 / _LARGEST))[:, None] - rest[:, None]
                total = total * row_scale[None, :] + bias[None, :] + y
                tl.store(out, round_to(total, y_ptr.dtype.element_ty, EMULATE), mask=mask)
    wait_for_previous(OVERLAP)


def launches(
    y: Tensor,
    x: Tensor,
    table: DeltaTable,
    chunks: Chunks,
    variant: Variant,
    *,
    emulate: bool,
) -> tuple[Callable[[], object], ...]:
    """The three launches of one call, in order: prepare, shrink, expand."""
    overlap = variant.overlap and overlaps(x.device) and not emulate
    shared: dict[str, Any] = {
        "LINEARS": table.linears,
        "OVERLAP": overlap,
        "EMULATE": emulate,
        "launch_pdl": overlap,
        "enable_fp_fusion": True,  # pinned: Triton 3.10 changes the default
    }
    xs, scales = chunks.fixed, chunks.scales
    block_count = table.padded_h_in // BLOCK_INPUTS
    multiprocessors = multiprocessors_of(x.device)
    prepares = len(x) * block_count * table.linears
    prepare_form = form_of(variant.prepare, lambda _: prepares, multiprocessors)
    parts = parts_of_prepare(prepares, prepare_form, multiprocessors)
    tiles = max(1, triton.cdiv(table.max_rank, TILE_RANKS))
    shrinks = triton.cdiv(tiles, USUAL_SHARE) * chunks.count
    shrink_form = form_of(variant.shrink, lambda _: shrinks, multiprocessors)

    def expands(form: ExpandForm) -> int:
        return len(table.output_tiles[form.columns]) * chunks.count

    expand_form = form_of(variant.expand, expands, multiprocessors)
    output_tiles = table.output_tiles[expand_form.columns]
    programs = min(expands(expand_form), places_of(expand_form, multiprocessors))

    def prepare() -> object:
        return prepare_kernel[(chunks.count * CHUNK_ROWS, block_count, table.linears * parts)](
            xs, xs.stride(0), scales, scales.stride(0), x, x.stride(0),
            table.h_in, table.padded_h_in, chunks.rows, chunks.slots,
            table.addresses, table.descriptors, VECTOR=table.h_in % 128 == 0,
            num_warps=prepare_form.warps, maxnreg=prepare_form.registers, **shared,
        )  # fmt: skip

    def shrink() -> object:
        return shrink_kernel[(tiles, chunks.count)](
            chunks.projected, chunks.peaks, chunks.rests, chunks.max_tiles, xs, xs.stride(0),
            scales, scales.stride(0), block_count, table.h_in, table.padded_h_in,
            chunks.slots, table.addresses, table.descriptors,
            BLOCKS=triton.next_power_of_2(block_count), VECTOR=table.h_in % 128 == 0,
            WARPS=shrink_form.warps,
            num_warps=shrink_form.warps, maxnreg=shrink_form.registers, **shared,
        )  # fmt: skip

    def expand() -> object:
        return expand_kernel[(programs,)](
            y, y.stride(0), chunks.projected, chunks.peaks, chunks.rests, chunks.max_tiles,
            chunks.rows, chunks.slots, chunks.used, table.addresses, table.descriptors,
            output_tiles, len(output_tiles), COLUMNS=expand_form.columns, WARPS=expand_form.warps,
            VECTOR=all(h_out % 128 == 0 for h_out in table.h_outs),
            num_warps=expand_form.warps, maxnreg=expand_form.registers, **shared,
        )  # fmt: skip

    return prepare, shrink, expand


def svd_delta(
    y: Tensor,
    x: Tensor,
    table: DeltaTable,
    chunks: Chunks,
    *,
    emulate: bool | None = None,
    variant: Variant | None = None,
) -> None:
    """Add each row's delta to `y` in place; see `deltadock.kernels.svd_delta.svd_delta`.

    With `emulate` the kernels use neither inline assembly nor products of bytes, which Triton's
    interpreter lacks; on a GPU this is slow, and isolates errors in either.
    """
    if not chunks.count:
        return
    emulate = not x.is_cuda if emulate is None else emulate
    for launch in launches(y, x, table, chunks, variant or variant_of(x.device), emulate=emulate):
        launch()
