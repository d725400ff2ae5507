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
accumulators, which are added up over the warps once.

Where launches overlap (`kernels/overlap.py`), all that does not depend on the step's inputs comes
before the wait: slot, descriptor and tile, and a request to bring all words that the program will
read to L2.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from types import MappingProxyType
from typing import Any, Final

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
    TILE_COLUMNS,
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
class Variant:
    """How the kernels are compiled.

    A launch takes the first form of which all its programs run at once, or else the last: few
    programs end sooner with more warps each.

    Attributes:
        shrink: forms with at most `SUM_PARTS` warps.
        expand: forms.
        overlap: whether a kernel may start while the one before still runs, where the card can.
    """

    shrink: tuple[Form, ...] = (Form(8, 80), Form(4, 96))
    expand: tuple[Form, ...] = (Form(8, 128), Form(4, 168))
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


def form_of(forms: Sequence[Form], programs: int, multiprocessors: int) -> Form:
    """The form for a launch of this many programs that have something to do."""
    for form in forms:
        if programs <= REGISTERS // (form.registers * 32 * form.warps) * multiprocessors:
            return form
    return forms[-1]


SUM_PARTS: Final = 8
"""Parts of shrink's sum over the inputs, for any number of warps: each eighth of their steps."""
REGISTERS: Final = 65_536
"""Registers of an SM."""
USUAL_SHARE: Final = 3
"""Deltas of one bit per weight have about a third of a table's most ranks, or fewer."""

UNSPECIALIZED: Final = ("h_in", "max_rank", "scales_stride", "block_count")
"""Arguments not specialized on divisibility by 16, which would only multiply compilations."""

PAIRED: Final = tuple(map(int, triton.__version__.split(".")[:2])) < (3, 8)
"""Whether a thread's words of a product's operand lie side by side in pairs. Triton before 3.8
counts bytes that come from `tl.join` as half as wide."""

_DESCRIPTOR = tl.constexpr(DESCRIPTOR_FIELDS)
_TILE = tl.constexpr(TILE_FIELDS)
_BLOCK = tl.constexpr(BLOCK_FIELDS)
_RANKS = tl.constexpr(TILE_RANKS)
_OUTPUT_TILE = tl.constexpr(OUTPUT_TILE_FIELDS)
_COLUMNS = tl.constexpr(TILE_COLUMNS)
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
_PAIRED = tl.constexpr(PAIRED)
_FINITE = tl.constexpr(0x7FFFFFFF)


@triton.jit
def load_bits(pointers, EMULATE: tl.constexpr):
    """Load 32-bit words, as int32, into the threads that compute with them.

    Triton would load 16 bytes a thread and move them between threads through shared memory, with
    barriers. An instruction that it does not know gets the layout of its result's use.
    """
    if EMULATE:
        bits = tl.load(pointers.to(tl.pointer_type(tl.int32), bitcast=True))
    else:
        bits = tl.inline_asm_elementwise(
            "ld.global.b32 $0, [$1];", "=r,l", [pointers.to(tl.int64)],
            dtype=tl.int32, is_pure=True, pack=1,
        )  # fmt: skip
    return bits


@triton.jit
def load_inputs(pointers, EMULATE: tl.constexpr):
    """`load_bits` of 16 bytes at once: a thread's words 0 to 3 on the last axis."""
    if EMULATE:
        bits = load_bits(pointers, EMULATE)
    else:
        bits = tl.inline_asm_elementwise(
            "ld.global.v4.b32 {$0, $1, $2, $3}, [$4];", "=r,=r,=r,=r,l,l,l,l",
            [pointers.to(tl.int64)], dtype=tl.int32, is_pure=True, pack=4,
        )  # fmt: skip
    return bits


@triton.jit
def load_words(pointers, VECTOR: tl.constexpr, EMULATE: tl.constexpr):
    """`load_bits` of words 0 to 3, on the last axis, of two vectors, 8 apart on the axis of ranks.

    In the product's operand a thread's numbers alternate between two vectors, one by one or in
    pairs. Without VECTOR addresses need not be multiples of 16.
    """
    if EMULATE:
        bits = load_bits(pointers, EMULATE)
    elif VECTOR and _PAIRED:
        bits = tl.inline_asm_elementwise(
            "ld.global.v4.b32 {$0, $1, $4, $5}, [$8]; ld.global.v4.b32 {$2, $3, $6, $7}, [$10];",
            "=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,l,l,l,l,l,l,l,l",
            [pointers.to(tl.int64)], dtype=tl.int32, is_pure=True, pack=8,
        )  # fmt: skip
    elif VECTOR:
        bits = tl.inline_asm_elementwise(
            "ld.global.v4.b32 {$0, $2, $4, $6}, [$8]; ld.global.v4.b32 {$1, $3, $5, $7}, [$9];",
            "=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,l,l,l,l,l,l,l,l",
            [pointers.to(tl.int64)], dtype=tl.int32, is_pure=True, pack=8,
        )  # fmt: skip
    else:
        bits = load_bits(pointers, EMULATE)
    return bits


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


@triton.jit(do_not_specialize=UNSPECIALIZED)
def prepare_kernel(
    xs_ptr, xs_stride, scales_ptr, sums_ptr, scales_stride, x_ptr, x_stride, h_in, padded_h_in,
    rows_ptr, slots_ptr, addresses_ptr, descriptors_ptr,
    LINEARS: tl.constexpr, OVERLAP: tl.constexpr, EMULATE: tl.constexpr,
):  # fmt: skip
    """A block of a row times a linear's column scale: fixed-point numbers, their scale and sum."""
    start_next(OVERLAP)
    position, block, linear = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    row = tl.load(rows_ptr + position).to(tl.int64)
    slot = tl.load(slots_ptr + position // _ROWS)
    descriptor = descriptors_ptr + (slot * LINEARS + linear) * _DESCRIPTOR
    if (row < 0) | (tl.load(descriptor) == 0):
        wait_for_previous(OVERLAP)
        return
    columns = block * _BLOCK_INPUTS + tl.arange(0, _BLOCK_INPUTS)
    address = tl.load(addresses_ptr + slot * LINEARS + linear)
    planes = tl.load(descriptor + 16)
    scale_word = tl.load(descriptor + 8)
    scale_ptr = address.to(tl.pointer_type(tl.float32)) + scale_word
    mask = columns < tl.where(scale_word >= 0, h_in, 0)
    column_scale = tl.load(scale_ptr + columns, mask=mask, other=1.0)
    x_ptr += wait_for_previous(OVERLAP) + row * x_stride
    x = tl.load(x_ptr + columns, mask=columns < h_in, other=0.0).to(tl.float32) * column_scale
    # As integers NaN is the largest, and makes the scale NaN.
    peak = tl.max(x.to(tl.int32, bitcast=True) & _FINITE, axis=0).to(tl.float32, bitcast=True)
    fixed = _fixed_point(x, _inverse(peak))
    scale = peak * (1.0 / _LARGEST)
    total = tl.sum((fixed & 0xFFFF) - 0x8080, axis=0).to(tl.float32)
    place = position * scales_stride + linear * tl.num_programs(1) + block
    tl.store(scales_ptr + place, scale)
    tl.store(sums_ptr + place, total * scale)
    halves = ((fixed ^ 0x8080) & 0xFFFF).to(tl.int16)
    xs_ptr += position.to(tl.int64) * xs_stride + linear * (2 * padded_h_in)
    for DIGIT in tl.static_range(4):
        if planes & (8 >> DIGIT):
            # Bytes of a word, and words of a thread, are those of the weights; fields are apart.
            parts = tl.reshape(halves, (16 >> DIGIT, 4, 4, 4, 1 << DIGIT))
            parts = tl.reshape(tl.permute(parts, (0, 1, 4, 2, 3)), (_BLOCK_INPUTS,))
            out = xs_ptr + DIGIT * (padded_h_in // 2) + block * (_BLOCK_INPUTS // 4)
            out = out.to(tl.pointer_type(tl.int8), bitcast=True) + tl.arange(0, _BLOCK_INPUTS)
            tl.store(out, (parts >> 8).to(tl.int8))
            tl.store(out + padded_h_in, (parts & 0xFF).to(tl.int8))


@triton.jit
def _codes(words, P: tl.constexpr, FIELD: tl.constexpr):
    """The code of P bits in each byte: its `FIELD`-th; of 8 bits, less 128."""
    return words ^ _SIGNS if P == 8 else (words >> (P * FIELD)) & (_BYTES * (2**P - 1))


@triton.jit
def _prefetch_tile(words_ptr, plane_words, bits, rank_count, h_in, WARPS: tl.constexpr):
    """Ask for all words of a tile of V."""
    index = tl.arange(0, WARPS * 32) * 16
    for DIGIT in tl.static_range(4):
        if bits & (8 >> DIGIT):
            words = (h_in * (8 >> DIGIT) + 31) // 32 * rank_count
            plane_ptr = words_ptr + plane_words[DIGIT]
            for first in range(0, words, WARPS * 32 * 16):
                prefetch(plane_ptr + first + index, first + index < words)


@triton.jit
def _shrink_plane(
    totals, weight, xs_ptrs, scale_ptrs, words_ptr, ranks, h_in,
    P: tl.constexpr, WARPS: tl.constexpr, VECTOR: tl.constexpr, EMULATE: tl.constexpr,
):  # fmt: skip
    """Add one plane's projection, times `weight`, to `totals`, each (warps, ranks, rows).

    A step of a warp takes 16 words of each vector, of wide codes 32 or 64. The steps take the
    parts of the sum in turn.
    """
    RANKS: tl.constexpr = ranks.shape[0]
    FIELDS: tl.constexpr = 8 // P
    RUNS: tl.constexpr = P // 2 if P > 2 else 1
    INPUTS: tl.constexpr = 512 * RUNS // P
    index = tl.arange(0, 4)
    unit = tl.arange(0, WARPS)
    word = (unit * (16 * RUNS))[:, None, None] + (4 * index)[None, None, :]
    rows = (ranks * ((h_in * P + 31) // 32))[None, :, None]
    word_ptrs = (words_ptr + (rows + word))[:, :, :, None] + index[None, None, None, :]
    x_ptrs = (xs_ptrs[None, :, None] + word * FIELDS)[:, :, :, None] + index[None, None, None, :]
    words = load_words(word_ptrs, VECTOR, EMULATE)
    for _ in range(tl.cdiv(tl.cdiv(h_in, INPUTS), _PARTS) * (_PARTS // WARPS)):
        acc = tl.zeros((WARPS, RANKS, 2 * _ROWS), tl.int32)
        for run in tl.static_range(RUNS):
            # The next words are asked for before these are used.
            word_ptrs += 16 if run + 1 < RUNS else 16 * (1 + RUNS * (WARPS - 1))
            next_words = load_words(word_ptrs, VECTOR, EMULATE)
            for field in tl.static_range(FIELDS):
                codes = spread(_codes(words, P, field), EMULATE)
                codes = tl.reshape(codes, (WARPS, RANKS, 4, 2, 2, 4))
                codes = tl.permute(codes, (0, 1, 3, 2, 4, 5) if _PAIRED else (0, 1, 3, 4, 2, 5))
                codes = tl.reshape(codes, (WARPS, RANKS, 64))
                x = load_inputs(x_ptrs + (16 * FIELDS * run + 4 * field), EMULATE)
                x = tl.reshape(spread(x, EMULATE), (WARPS, 2 * _ROWS, 4, 2, 2, 4))
                x = tl.permute(x, (0, 3, 2, 4, 5, 1) if _PAIRED else (0, 3, 4, 2, 5, 1))
                x = tl.reshape(x, (WARPS, 64, 2 * _ROWS))
                acc = dot_bytes(codes, x, acc, EMULATE)
            words = next_words
        high, low = tl.split(tl.reshape(acc, (WARPS, RANKS, _ROWS, 2)))
        blocks = (unit * INPUTS // _BLOCK_INPUTS)[:, None, None]
        scale = load_bits(scale_ptrs[None, None, :] + blocks, EMULATE)
        scale = scale.to(tl.float32, bitcast=True) * weight
        total = totals[0] + (high * 256 + low).to(tl.float32) * scale
        totals = totals[1:] + (total,)  # noqa: RUF005 (Triton knows no other)
        unit += WARPS
        x_ptrs += 16 * RUNS * FIELDS * WARPS
    return totals


@triton.jit(do_not_specialize=UNSPECIALIZED)
def shrink_kernel(
    projected_ptr, peaks_ptr, rests_ptr, max_rank, xs_ptr, xs_stride,
    scales_ptr, sums_ptr, scales_stride, block_count, h_in, padded_h_in,
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
    count = tl.load(last + 17) + tl.load(last + 2)
    if tl.program_id(0) >= count:
        wait_for_previous(OVERLAP)
    positions = chunk * _ROWS + tl.arange(0, _ROWS)
    columns = tl.arange(0, 2 * _ROWS)  # a row's high bytes, its low ones
    for tile in range(tl.program_id(0), count, tl.num_programs(0)):
        linear = 0
        for other in tl.static_range(1, LINEARS):
            linear += (tile >= tl.load(descriptors_ptr + other * _DESCRIPTOR + 17)).to(tl.int32)
        descriptor = descriptors_ptr + linear * _DESCRIPTOR
        address = tl.load(addresses_ptr + slot * LINEARS + linear)
        words_ptr = address.to(tl.pointer_type(tl.int32))
        floats_ptr = address.to(tl.pointer_type(tl.float32))
        tile_ptr = words_ptr + tl.load(descriptor + 3)
        tile_ptr += (tile - tl.load(descriptor + 17)) * _TILE
        v_bits, u_bits = tl.load(tile_ptr), tl.load(tile_ptr + 7)
        rank_count = tl.load(tile_ptr + 2)
        plane_words = (
            tl.load(tile_ptr + 3), tl.load(tile_ptr + 4), tl.load(tile_ptr + 5),
            tl.load(tile_ptr + 6),
        )  # fmt: skip
        index = tl.arange(0, _RANKS)
        ranks = tl.minimum(index, rank_count - 1)  # of the tile's words
        mask = index < rank_count
        delta_ranks = tl.load(tile_ptr + 1) + index
        s = tl.load(floats_ptr + tl.load(descriptor + 4) + delta_ranks, mask=mask, other=0.0)
        v_zero = _zero(floats_ptr, tl.load(descriptor + 5), delta_ranks, mask, v_bits)
        u_zero = _zero(floats_ptr, tl.load(descriptor + 6), delta_ranks, mask, u_bits)
        # As `expand` takes them, codes of U fill seven bits or eight, whatever their width.
        lift = tl.maximum(7 - u_bits, 0)
        u_zero *= (1 << lift).to(tl.float32)
        s *= ((127 - lift) << 23).to(tl.float32, bitcast=True)
        if OVERLAP:
            _prefetch_tile(words_ptr, plane_words, v_bits, rank_count, h_in, WARPS)
        started = wait_for_previous(OVERLAP)
        places = positions * scales_stride + linear * block_count
        scale_ptrs = scales_ptr + started + places
        offsets = (chunk * _ROWS + columns // 2).to(tl.int64) * xs_stride
        xs_ptrs = xs_ptr + started + (offsets + columns % 2 * (padded_h_in // 4))
        blocks = tl.arange(0, BLOCKS)
        sums = tl.load(
            sums_ptr + started + (places[:, None] + blocks[None, :]),
            mask=(blocks < block_count)[None, :], other=0.0,
        )  # fmt: skip
        totals = (tl.zeros((WARPS, _RANKS, _ROWS), tl.float32),) * (_PARTS // WARPS)
        for DIGIT in tl.static_range(4):
            if v_bits & (8 >> DIGIT):
                weight = (1 << (v_bits & ((8 >> DIGIT) - 1))).to(tl.float32)
                copy = linear * (2 * padded_h_in) + DIGIT * (padded_h_in // 2)
                plane_ptr = words_ptr + plane_words[DIGIT]
                totals = _shrink_plane(
                    totals, weight, xs_ptrs + copy, scale_ptrs, plane_ptr, ranks, h_in,
                    8 >> DIGIT, WARPS, VECTOR, EMULATE,
                )  # fmt: skip
        result = (
            _sum_over_warps(_sum_of_parts(totals)) - v_zero[:, None] * tl.sum(sums, axis=1)[None, :]
        )
        result *= s[:, None]
        out = (positions * max_rank)[None, :] + (tl.load(descriptor + 1) + delta_ranks)[:, None]
        tl.store(projected_ptr + out, result, mask=mask[:, None])
        magnitudes = tl.where(mask[:, None], result.to(tl.int32, bitcast=True) & _FINITE, 0)
        tl.store(peaks_ptr + positions * max_rank + tile, tl.max(magnitudes, axis=0))
        rest = tl.sum(tl.where(mask[:, None], result * u_zero[:, None], 0.0), axis=0)
        tl.store(rests_ptr + positions * max_rank + tile, rest)


@triton.jit
def _zero(floats_ptr, offset_word, ranks, mask, bits):
    """The zero points of codes of `bits` as the products take them: of 8 bits, less 128."""
    zero = ((1 << bits) - 1).to(tl.float32) * 0.5 - tl.where(bits == 8, 128.0, 0.0)
    offset_ptrs = floats_ptr + tl.maximum(offset_word, 0) + ranks
    return zero + tl.where(offset_word >= 0, tl.load(offset_ptrs, mask=mask, other=0.0), 0.0)


@triton.jit
def _block(blocks_ptr, block, end, EMULATE: tl.constexpr):
    """A block of ranks of each warp: its first rank, its ranks, its first word, and the place of
    its codes in a byte."""
    block_ptr = blocks_ptr + tl.maximum(tl.minimum(block, end - 1), 0) * _BLOCK
    count = load_bits(block_ptr + 1, EMULATE)
    return (
        load_bits(block_ptr, EMULATE), tl.where(block < end, count, 0),
        load_bits(block_ptr + 2, EMULATE), load_bits(block_ptr + 3, EMULATE),
    )  # fmt: skip


@triton.jit
def _block_words(words_ptr, word, count, tile, h_out, P: tl.constexpr, EMULATE: tl.constexpr):
    """The tile's words of ranks 0, 4, ... of a block, of ranks 1, 5, ..., and so on."""
    SEGMENTS: tl.constexpr = _COLUMNS // 32
    # Past the last segment or word, those of the next vector or region: of columns that do not
    # exist.
    column = tl.arange(0, SEGMENTS)[:, None] * P + tl.arange(0, P)[None, :]
    word_ptrs = words_ptr + (word + tile * (SEGMENTS * P))
    word_ptrs = word_ptrs[:, None, None, None] + column[None, None, :, :]
    stride = (h_out * P + 31) // 32
    last = tl.maximum(count - 1, 0)[:, None]
    index = tl.arange(0, _RANKS // 4)[None, :] * 4
    first = load_bits(word_ptrs + _row(index, last, stride), EMULATE)
    second = load_bits(word_ptrs + _row(index + 1, last, stride), EMULATE)
    third = load_bits(word_ptrs + _row(index + 2, last, stride), EMULATE)
    fourth = load_bits(word_ptrs + _row(index + 3, last, stride), EMULATE)
    return first, second, third, fourth


@triton.jit
def _row(index, last, stride):
    """Offset of ranks (warps, ranks) of a block; past the last one, of the last."""
    return (tl.minimum(index, last) * stride)[:, :, None, None]


@triton.jit
def _prefetch_blocks(words_ptr, blocks_ptr, bounds, tile, h_out, WARPS: tl.constexpr):
    """Ask for the words of all blocks of a tile of outputs, one rank of a block a thread."""
    SEGMENTS: tl.constexpr = _COLUMNS // 32
    AT_ONCE: tl.constexpr = WARPS * 4
    _, second, third, fourth, end = bounds
    index = tl.arange(0, _RANKS)[None, :]
    for first in range(0, end, AT_ONCE):
        block = first + tl.arange(0, AT_ONCE)
        digit = (block >= second).to(tl.int32) + (block >= third).to(tl.int32)
        plane = 8 >> (digit + (block >= fourth).to(tl.int32))
        block_ptr = blocks_ptr + block * _BLOCK
        count = tl.load(block_ptr + 1, mask=block < end, other=0)
        word = tl.load(block_ptr + 2, mask=block < end, other=0) + tile * SEGMENTS * plane
        word = word[:, None] + index * ((h_out * plane + 31) // 32)[:, None]
        prefetch(words_ptr + word, index < count[:, None])


@triton.jit
def _terms(projected_ptrs, rank, index, count, inverse, EMULATE: tl.constexpr):
    """Fixed-point projections (warps, ranks, columns) of ranks `index` of a block; 0 past it."""
    ranks = rank[:, None] + tl.minimum(index, tl.maximum(count - 1, 0)[:, None])
    t = load_bits(projected_ptrs[None, None, :] + ranks[:, :, None], EMULATE)
    t = tl.where((index < count[:, None])[:, :, None], t.to(tl.float32, bitcast=True), 0.0)
    return _fixed_point(t, inverse[None, None, :])


@triton.jit
def _rotate(words, by, EMULATE: tl.constexpr):
    """Rotate words right by a number of bits; left by a negative one."""
    if EMULATE:
        bits = words.to(tl.uint32, bitcast=True)
        rotated = ((bits >> (by & 31)) | (bits << (-by & 31))).to(tl.int32, bitcast=True)
    else:
        rotated = tl.inline_asm_elementwise(
            "shf.r.wrap.b32 $0, $1, $1, $2;", "=r,r,r", [words, by],
            dtype=tl.int32, is_pure=True, pack=1,
        )  # fmt: skip
    return rotated


@triton.jit
def _lifted_codes(words, lift, P: tl.constexpr, FIELD: tl.constexpr, EMULATE: tl.constexpr):
    """`_codes`, shifted left by `lift` bits within their bytes, those of 8 bits by none."""
    if P == 8:
        codes = _codes(words, P, FIELD)
    else:
        codes = _rotate(words, P * FIELD - lift, EMULATE) & ((_BYTES * (2**P - 1)) << lift)
    return codes


@triton.jit
def _codes_of_words(
    first, second, third, fourth, lift,
    P: tl.constexpr, J: tl.constexpr, STEP: tl.constexpr, EMULATE: tl.constexpr,
):  # fmt: skip
    """Codes J, J + STEP, ... of four words whose bytes are transposed, on trailing axes of 2."""
    FIELDS: tl.constexpr = 8 // P
    if STEP == 32 // P:
        BYTE: tl.constexpr = J // FIELDS
        words = first if BYTE == 0 else (second if BYTE == 1 else (third if BYTE == 2 else fourth))
        codes = _lifted_codes(words, lift, P, J % FIELDS, EMULATE)
    else:
        even = _codes_of_words(first, second, third, fourth, lift, P, J, 2 * STEP, EMULATE)
        odd = _codes_of_words(first, second, third, fourth, lift, P, J + STEP, 2 * STEP, EMULATE)
        codes = tl.join(even, odd)
    return codes


@triton.jit
def _expand_plane(
    acc, projected_ptrs, inverse, words_ptr, blocks_ptr, first_block, begin, end, tile, h_out,
    P: tl.constexpr, WARPS: tl.constexpr, EMULATE: tl.constexpr,
):  # fmt: skip
    """Add the products of all planes of P bits to `acc` (warps, columns, rows' bytes).

    Blocks of ranks are strided over the warps. Column `32 * segment + i` of the tile is column
    `i * segments + segment` of `acc`, for every plane.
    """
    SEGMENTS: tl.constexpr = _COLUMNS // 32
    block = begin + tl.arange(0, WARPS)
    selector = tl.where(tl.arange(0, 2 * _ROWS) % 2 == 0, 0x7632, 0x5410)[None, None, :]
    index = tl.arange(0, _RANKS // 4)[None, :] * 4
    rank, count, word, lift = first_block
    w0, w1, w2, w3 = _block_words(words_ptr, word, count, tile, h_out, P, EMULATE)
    for _ in range(tl.cdiv(end - begin, WARPS)):
        # The next block is asked for before this one is used.
        block += WARPS
        next_rank, next_count, word, next_lift = _block(blocks_ptr, block, end, EMULATE)
        if P < 8:
            n0, n1, n2, n3 = _block_words(words_ptr, word, next_count, tile, h_out, P, EMULATE)
        t0 = _terms(projected_ptrs, rank, index, count, inverse, EMULATE)
        t1 = _terms(projected_ptrs, rank, index + 1, count, inverse, EMULATE)
        t2 = _terms(projected_ptrs, rank, index + 2, count, inverse, EMULATE)
        t3 = _terms(projected_ptrs, rank, index + 3, count, inverse, EMULATE)
        low_pair = pick_bytes(t0, t1, 0x5140, EMULATE)
        high_pair = pick_bytes(t2, t3, 0x5140, EMULATE)
        terms = pick_bytes(low_pair, high_pair, selector, EMULATE) ^ _SIGNS
        terms = tl.reshape(spread(terms, EMULATE), (WARPS, _RANKS // 4, 2 * _ROWS, 4))
        terms = tl.reshape(tl.permute(terms, (0, 1, 3, 2)), (WARPS, _RANKS, 2 * _ROWS))
        x0, x2 = pick_bytes(w0, w1, 0x5140, EMULATE), pick_bytes(w0, w1, 0x7362, EMULATE)
        x1, x3 = pick_bytes(w2, w3, 0x5140, EMULATE), pick_bytes(w2, w3, 0x7362, EMULATE)
        codes = _codes_of_words(
            pick_bytes(x0, x1, 0x5410, EMULATE), pick_bytes(x0, x1, 0x7632, EMULATE),
            pick_bytes(x2, x3, 0x5410, EMULATE), pick_bytes(x2, x3, 0x7632, EMULATE),
            lift[:, None, None, None], P, 0, 1, EMULATE,
        )  # fmt: skip
        codes = tl.reshape(spread(codes, EMULATE), (WARPS, _RANKS // 4, SEGMENTS, P, 32 // P, 4))
        codes = tl.permute(codes, (0, 3, 4, 2, 1, 5))
        codes = tl.reshape(codes, (WARPS, _COLUMNS, _RANKS))
        acc = dot_bytes(codes, terms, acc, EMULATE)
        if P == 8:  # More registers would be spilled.
            n0, n1, n2, n3 = _block_words(words_ptr, word, next_count, tile, h_out, P, EMULATE)
        rank, count, lift = next_rank, next_count, next_lift
        w0, w1, w2, w3 = n0, n1, n2, n3
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
def _peak_and_rest(peaks_ptr, rests_ptr, places, tiles, BLOCK: tl.constexpr):
    """A row's largest projection and what the zero points take, (rows), from those of its tiles."""
    peak = tl.zeros((BLOCK, _ROWS), tl.int32)
    rest = tl.zeros((BLOCK, _ROWS), tl.float32)
    for first in range(0, tiles, BLOCK):
        tile = first + tl.arange(0, BLOCK)[:, None]
        offsets = places[None, :] + tile
        peak = tl.maximum(peak, tl.load(peaks_ptr + offsets, mask=tile < tiles, other=0))
        rest += tl.load(rests_ptr + offsets, mask=tile < tiles, other=0.0)
    return tl.max(peak, axis=0).to(tl.float32, bitcast=True), tl.sum(rest, axis=0)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def expand_kernel(
    y_ptr, y_stride, projected_ptr, peaks_ptr, rests_ptr, max_rank, rows_ptr, slots_ptr,
    addresses_ptr, descriptors_ptr, output_tiles_ptr,
    LINEARS: tl.constexpr, WARPS: tl.constexpr, OVERLAP: tl.constexpr, EMULATE: tl.constexpr,
):  # fmt: skip
    """Add the deltas to one chunk of rows and one tile of a linear's outputs."""
    start_next(OVERLAP)
    output_tile_ptr, chunk = output_tiles_ptr + tl.program_id(0) * _OUTPUT_TILE, tl.program_id(1)
    slot = tl.load(slots_ptr + chunk)
    linear = tl.load(output_tile_ptr)
    tile = tl.load(output_tile_ptr + 1)
    begin = tl.load(output_tile_ptr + 2)
    h_out = tl.load(output_tile_ptr + 3)
    # All that depends on the slot is asked for at once; slot 0 has no ranks.
    descriptor = descriptors_ptr + (slot * LINEARS + linear) * _DESCRIPTOR
    address = tl.load(addresses_ptr + slot * LINEARS + linear)
    rank, first_rank, tiles, scale_word, bias_word, blocks_word, first_tile = (
        tl.load(descriptor), tl.load(descriptor + 1), tl.load(descriptor + 2),
        tl.load(descriptor + 7), tl.load(descriptor + 9), tl.load(descriptor + 10),
        tl.load(descriptor + 17),
    )  # fmt: skip
    bound_0, bound_1, bound_2, bound_3, bound_4 = (
        tl.load(descriptor + 11), tl.load(descriptor + 12), tl.load(descriptor + 13),
        tl.load(descriptor + 14), tl.load(descriptor + 15),
    )  # fmt: skip
    bounds = (bound_0, bound_1, bound_2, bound_3, bound_4)
    rows = tl.load(rows_ptr + chunk * _ROWS + tl.arange(0, _ROWS))
    if (rank == 0) & (bias_word < 0):
        wait_for_previous(OVERLAP)
        return
    words_ptr = address.to(tl.pointer_type(tl.int32))
    floats_ptr = address.to(tl.pointer_type(tl.float32))
    columns = tile * _COLUMNS + tl.arange(0, _COLUMNS)
    blocks_ptr = words_ptr + tl.maximum(blocks_word, 0)
    warp = tl.arange(0, WARPS)
    blocks = (
        _block(blocks_ptr, bound_0 + warp, bound_1, EMULATE),
        _block(blocks_ptr, bound_1 + warp, bound_2, EMULATE),
        _block(blocks_ptr, bound_2 + warp, bound_3, EMULATE),
        _block(blocks_ptr, bound_3 + warp, bound_4, EMULATE),
    )
    mask = columns < tl.where(scale_word >= 0, h_out, 0)
    row_scale = tl.load(floats_ptr + scale_word + columns, mask=mask, other=1.0)
    mask = columns < tl.where(bias_word >= 0, h_out, 0)
    bias = tl.load(floats_ptr + bias_word + columns, mask=mask, other=0.0)
    if OVERLAP & (rank > 0):
        _prefetch_blocks(words_ptr, blocks_ptr, bounds, tile, h_out, WARPS)
    started = wait_for_previous(OVERLAP)
    out = y_ptr + started + rows.to(tl.int64)[None, :] * y_stride + (begin + columns)[:, None]
    mask = (rows >= 0)[None, :] & (columns < h_out)[:, None]
    y = tl.load(out, mask=mask, other=0.0)
    total = tl.zeros((_COLUMNS, _ROWS), tl.float32)
    if rank > 0:
        places = (chunk * _ROWS + tl.arange(0, _ROWS)) * max_rank + first_tile
        peak, rest = _peak_and_rest(peaks_ptr + started, rests_ptr + started, places, tiles, 64)
        pairs = (chunk * _ROWS + tl.arange(0, 2 * _ROWS) // 2) * max_rank
        projected_ptrs = projected_ptr + started + (pairs + first_rank)
        inverse = _inverse(tl.reshape(tl.join(peak, peak), (2 * _ROWS,)))
        acc = tl.zeros((WARPS, _COLUMNS, 2 * _ROWS), tl.int32)
        for DIGIT in tl.static_range(4):
            if bounds[DIGIT] < bounds[DIGIT + 1]:
                acc = _expand_plane(
                    acc, projected_ptrs, inverse, words_ptr, blocks_ptr, blocks[DIGIT],
                    bounds[DIGIT], bounds[DIGIT + 1], tile, h_out, 8 >> DIGIT, WARPS, EMULATE,
                )  # fmt: skip
        high, low = tl.split(tl.reshape(acc, (WARPS, _COLUMNS, _ROWS, 2)))
        # Sums of integers are the same for any number of warps.
        high, low = _sum_over_warps(high), _sum_over_warps(low)
        total = high.to(tl.float32) * 256.0 + low.to(tl.float32)
        total = tl.reshape(total, (32, _COLUMNS // 32, _ROWS))
        total = tl.reshape(tl.permute(total, (1, 0, 2)), (_COLUMNS, _ROWS))
        total = total * (peak * (1.0 / _LARGEST))[None, :] - rest[None, :]
    total = total * row_scale[:, None] + bias[:, None] + y.to(tl.float32)
    tl.store(out, round_to(total, y_ptr.dtype.element_ty, EMULATE), mask=mask)


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
    tiles = max(1, triton.cdiv(table.max_rank, TILE_RANKS))
    shrinks = triton.cdiv(tiles, USUAL_SHARE) * chunks.count
    shrink_form = form_of(variant.shrink, shrinks, multiprocessors)
    expands = len(table.output_tiles) * chunks.count
    expand_form = form_of(variant.expand, expands, multiprocessors)

    def prepare() -> object:
        return prepare_kernel[(chunks.count * CHUNK_ROWS, block_count, table.linears)](
            xs, xs.stride(0), scales, chunks.sums, scales.stride(0), x, x.stride(0),
            table.h_in, table.padded_h_in, chunks.rows, chunks.slots,
            table.addresses, table.descriptors, num_warps=8, **shared,
        )  # fmt: skip

    def shrink() -> object:
        return shrink_kernel[(tiles, chunks.count)](
            chunks.projected, chunks.peaks, chunks.rests, chunks.max_rank, xs, xs.stride(0),
            scales, chunks.sums, scales.stride(0), block_count, table.h_in, table.padded_h_in,
            chunks.slots, table.addresses, table.descriptors,
            BLOCKS=triton.next_power_of_2(block_count), VECTOR=table.h_in % 128 == 0,
            WARPS=shrink_form.warps,
            num_warps=shrink_form.warps, maxnreg=shrink_form.registers, **shared,
        )  # fmt: skip

    def expand() -> object:
        return expand_kernel[(len(table.output_tiles), chunks.count)](
            y, y.stride(0), chunks.projected, chunks.peaks, chunks.rests, chunks.max_rank,
            chunks.rows, chunks.slots, table.addresses, table.descriptors, table.output_tiles,
            WARPS=expand_form.warps,
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
