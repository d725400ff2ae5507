"""GPU path: three kernel launches per call, for any number of deltas.

`prepare` scales, pads and reorders the inputs, `shrink` computes `s * (x V_hat^T)`, and `expand`
adds `row_scale * (U_hat projected) + bias` to the outputs. The kernels read the packed words as the
artifact stores them, plane by plane, and multiply on tensor cores: packed vectors are the tall
operand, the eight rows of a chunk the other. Each warp accumulates a part of a sum, and parts are
added in a fixed order, without atomics: a row's result is bitwise independent of the other rows.

Unpacking two words yields two codes at once: their corresponding halves are placed side by side
and a mask leaves one code in each half. Read as a float, such a half is a subnormal, and one packed
multiply-add turns it into `code - midpoint`, exactly, in units of 2**-UNIT.

The inner loops have neither barriers nor shared memory: terms of a product may be in any order, so
each thread loads the very words and terms that its part of the tensor-core product takes, and the
words of its next step before it uses those of this one. What a thread holds is in units of a
segment, 32 columns of a vector: P words of a plane of P bits. So all planes of `expand` share their
accumulators, which are added up over the warps once.

Where launches overlap (`kernels/overlap.py`), all that does not depend on the step's inputs comes
before the wait: slot, descriptor and tile, the first words, and a request to bring all others that
the program will read to L2.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from types import MappingProxyType
from typing import Any, Final

import torch
import triton
import triton.language as tl
from torch import Tensor

from deltadock.kernels.interpreter import dot, round_to
from deltadock.kernels.overlap import overlaps, prefetch, start_next, wait_for_previous
from deltadock.kernels.svd_delta.chunks import CHUNK_ROWS, SUM_COLUMNS, Chunks
from deltadock.kernels.svd_delta.layout import (
    BLOCK_FIELDS,
    BLOCK_RANKS,
    DESCRIPTOR_FIELDS,
    OUTPUT_TILE_FIELDS,
    SEGMENTS,
    TILE_COLUMNS,
    TILE_FIELDS,
    TILE_RANKS,
    DeltaTable,
)


@dataclass(frozen=True, slots=True)
class Variant:
    """How the kernels are compiled.

    The order of a sum follows from it, so it may depend on the card, but not on a step's rows.

    Attributes:
        shrink_warps, expand_warps: warps per program; each accumulates a part of the sum. Those of
            shrink may not pass the padding of the inputs (`layout.H_IN_ALIGNMENT`) in one step.
        shrink_registers, expand_registers: the most registers of a thread; they decide how many
            warps an SM holds.
        overlap: whether a kernel may start while the one before still runs, where the card can.
    """

    shrink_warps: int = 8
    shrink_registers: int = 128
    expand_warps: int = 8
    expand_registers: int = 128
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


UNSPECIALIZED: Final = ("h_in", "max_rank", "sums_stride", "sum_count")
"""Arguments not specialized on divisibility by 16, which would only multiply compilations."""

_DESCRIPTOR = tl.constexpr(DESCRIPTOR_FIELDS)
_TILE = tl.constexpr(TILE_FIELDS)
_BLOCK = tl.constexpr(BLOCK_FIELDS)
_RANKS = tl.constexpr(BLOCK_RANKS)
_OUTPUT_TILE = tl.constexpr(OUTPUT_TILE_FIELDS)
_COLUMNS = tl.constexpr(TILE_COLUMNS)
_SEGMENTS = tl.constexpr(SEGMENTS)


@triton.jit
def _subtract_midpoint(
    masked, T: tl.constexpr, P: tl.constexpr, DOWN: tl.constexpr,
    DT: tl.constexpr, EMULATE: tl.constexpr,
):  # fmt: skip
    """`code - (2**P - 1) / 2` of the codes at bit T of both halves: two DT values in 32 bits.

    In units of 2**-(UNIT + DOWN).
    """
    MANTISSA: tl.constexpr = 7 if tl.bfloat16 == DT else 10
    BIAS: tl.constexpr = 127 if tl.bfloat16 == DT else 15
    UNIT: tl.constexpr = MANTISSA - 1
    if EMULATE:  # Triton's interpreter does not support inline assembly.
        SCALE: tl.constexpr = 2.0 ** (-UNIT - DOWN)
        low = ((((masked & 0xFFFF) >> T) - (2**P - 1) / 2) * SCALE).to(DT)
        high = ((((masked >> 16) & 0xFFFF) >> T) - (2**P - 1) / 2) * SCALE
        low = low.to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF
        pair = low | (high.to(DT).to(tl.int16, bitcast=True).to(tl.int32) << 16)
    else:
        # Scaling by the dtype's largest power of two maps a subnormal's lowest bit to 2**-UNIT.
        FACTOR: tl.constexpr = ((2 * BIAS - T - DOWN) << MANTISSA) * 0x10001
        # Exponent and leading mantissa bits of the midpoint, 1/2, 3/2 or 15/2.
        POWER: tl.constexpr = BIAS - UNIT - DOWN + (-1 if P == 1 else (0 if P == 2 else 2))
        BITS: tl.constexpr = (0 if P == 1 else (4 if P == 2 else 7)) << (MANTISSA - 3)
        MIDPOINT: tl.constexpr = (0x8000 + (POWER << MANTISSA) + BITS) * 0x10001 - (1 << 32)
        if tl.bfloat16 == DT:
            pair = tl.inline_asm_elementwise(
                "fma.rn.bf16x2 $0, $1, $2, $3;", "=r,r,r,r", [masked, FACTOR, MIDPOINT],
                dtype=tl.int32, is_pure=True, pack=1,
            )  # fmt: skip
        else:
            pair = tl.inline_asm_elementwise(
                "fma.rn.f16x2 $0, $1, $2, $3;", "=r,r,r,r", [masked, FACTOR, MIDPOINT],
                dtype=tl.int32, is_pure=True, pack=1,
            )  # fmt: skip
    return pair


@triton.jit
def _pairs(low, high, J: tl.constexpr, STEP: tl.constexpr, P: tl.constexpr, DOWN: tl.constexpr,
           DT: tl.constexpr, EMULATE: tl.constexpr):  # fmt: skip
    """Codes J, J + STEP, ... of each word, on trailing axes of size 2.

    A mantissa holds several bit positions, so that few codes need a shift.
    """
    HALF: tl.constexpr = 16 // P
    if STEP == 2 * HALF:
        BITS: tl.constexpr = 4 if P == 8 else P
        FIELD: tl.constexpr = (J % HALF) * P + (4 if P == 8 and DOWN == 0 else 0)
        SPAN: tl.constexpr = (7 if tl.bfloat16 == DT else 10) // BITS * BITS
        SHIFT: tl.constexpr = FIELD // SPAN * SPAN
        T: tl.constexpr = FIELD - SHIFT
        MASK: tl.constexpr = ((1 << BITS) - 1) * 0x10001 << T
        masked = ((low if J < HALF else high) >> SHIFT) & MASK
        pairs = _subtract_midpoint(masked, T, BITS, DOWN, DT, EMULATE)
    else:
        even = _pairs(low, high, J, 2 * STEP, P, DOWN, DT, EMULATE)
        odd = _pairs(low, high, J + STEP, 2 * STEP, P, DOWN, DT, EMULATE)
        pairs = tl.join(even, odd)
    return pairs


@triton.jit
def unpack(first, second, P: tl.constexpr, DOWN: tl.constexpr, DT: tl.constexpr,
            EMULATE: tl.constexpr):  # fmt: skip
    """Midpoint-subtracted codes of two (A, B, C) tensors of words: (A, B, C, 32 // P, 2) of DT.

    In units of 2**-(UNIT + DOWN). Of an 8-bit code only four bits: the upper ones if DOWN is 0.
    """
    low = (first & 0xFFFF) | (second << 16)
    high = ((first >> 16) & 0xFFFF) | (second & -65536)
    pairs = _pairs(low, high, 0, 1, P, DOWN, DT, EMULATE)
    even = (pairs & 0xFFFF).to(tl.int16).to(DT, bitcast=True)
    odd = ((pairs >> 16) & 0xFFFF).to(tl.int16).to(DT, bitcast=True)
    A: tl.constexpr = first.shape[0]
    B: tl.constexpr = first.shape[1]
    C: tl.constexpr = first.shape[2]
    return tl.reshape(tl.join(even, odd), (A, B, C, 32 // P, 2))


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
def load_words(words_ptr, rows, segments, word, columns, P: tl.constexpr, EMULATE: tl.constexpr):
    """Word `word` of `segments` of vectors `rows`; past the last segment, that of the last.

    A segment is 32 columns: P words. Of the last segment some words may be those of the next
    vector or region; they are codes of columns that do not exist.
    """
    segments = tl.minimum(segments, (columns + 31) // 32 - 1)
    words = (columns * P + 31) // 32
    return load_bits(words_ptr + (rows * words + segments * P + word), EMULATE)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def prepare_kernel(
    xs_ptr, xs_stride, sums_ptr, sums_stride, x_ptr, x_stride, h_in, padded_h_in,
    rows_ptr, slots_ptr, addresses_ptr, descriptors_ptr,
    LINEARS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
    OVERLAP: tl.constexpr, EMULATE: tl.constexpr,
):  # fmt: skip
    """Scale a block of a row by a linear's column scale, zero-pad and pair it, and sum it."""
    start_next(OVERLAP)
    position, block, linear = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    row = tl.load(rows_ptr + position).to(tl.int64)
    slot = tl.load(slots_ptr + position // BLOCK_M)
    descriptor = descriptors_ptr + (slot * LINEARS + linear) * _DESCRIPTOR
    if (row < 0) | (tl.load(descriptor) == 0):
        wait_for_previous(OVERLAP)
        return
    # Column i of segment j is paired with column i of segment j + _SEGMENTS; pairs of the same i
    # are adjacent.
    pairs = block * (BLOCK_K // 2) + tl.arange(0, BLOCK_K // 2)
    run = pairs // (32 * _SEGMENTS)
    columns = 64 * _SEGMENTS * run + 32 * (pairs % _SEGMENTS) + pairs // _SEGMENTS % 32
    others = columns + 32 * _SEGMENTS
    address = tl.load(addresses_ptr + slot * LINEARS + linear)
    scale_word = tl.load(descriptor + 8)
    scale_ptr = address.to(tl.pointer_type(tl.float32)) + scale_word
    scaled = tl.where(scale_word >= 0, h_in, 0)
    low_scale = tl.load(scale_ptr + columns, mask=columns < scaled, other=1.0)
    high_scale = tl.load(scale_ptr + others, mask=others < scaled, other=1.0)
    x_ptr += wait_for_previous(OVERLAP) + row * x_stride
    low = tl.load(x_ptr + columns, mask=columns < h_in, other=0.0).to(tl.float32)
    high = tl.load(x_ptr + others, mask=others < h_in, other=0.0).to(tl.float32)
    low = round_to(low * low_scale, xs_ptr.dtype.element_ty, EMULATE)
    high = round_to(high * high_scale, xs_ptr.dtype.element_ty, EMULATE)
    words = low.to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF
    words |= high.to(tl.int16, bitcast=True).to(tl.int32) << 16
    xs_ptr = xs_ptr.to(tl.pointer_type(tl.int32), bitcast=True) + linear * (padded_h_in // 2)
    tl.store(xs_ptr + position.to(tl.int64) * (xs_stride // 2) + pairs, words)
    sums = sums_ptr + position * sums_stride + linear * tl.num_programs(1) + block
    tl.store(sums, tl.sum(low.to(tl.float32) + high.to(tl.float32), axis=0))


@triton.jit
def _unit_words(words_ptr, ranks, h_in, unit, P: tl.constexpr, EMULATE: tl.constexpr):
    """A word of each of `2 * _SEGMENTS` segments: the first half, the second half."""
    rows = ranks[None, :, None]
    segments = unit // P * (2 * _SEGMENTS) + tl.arange(0, _SEGMENTS)[None, None, :]
    first = load_words(words_ptr, rows, segments, unit % P, h_in, P, EMULATE)
    second = load_words(words_ptr, rows, segments + _SEGMENTS, unit % P, h_in, P, EMULATE)
    return first, second


@triton.jit
def _prefetch_tile(words_ptr, tile_ptr, bits, rank_count, h_in, WARPS: tl.constexpr):
    """Ask for all words of a tile of V."""
    index = tl.arange(0, WARPS * 32) * 16
    for digit in range(4):
        plane = 8 >> digit
        if bits & plane:
            words = (h_in * plane + 31) // 32 * rank_count
            plane_ptr = words_ptr + tl.load(tile_ptr + 3 + digit)
            for first in range(0, words, WARPS * 32 * 16):
                prefetch(plane_ptr + first + index, first + index < words)


@triton.jit
def _shrink_plane(
    total, weight, xs_ptrs, words_ptr, ranks, h_in,
    P: tl.constexpr, WARPS: tl.constexpr, OVERLAP: tl.constexpr, EMULATE: tl.constexpr,
):  # fmt: skip
    """Add one plane's projection, times `weight`, to `total` (warps, ranks, rows)."""
    DT: tl.constexpr = xs_ptrs.dtype.scalar.element_ty
    PER: tl.constexpr = 32 // P
    BLOCK_K: tl.constexpr = 2 * _SEGMENTS * PER
    BLOCK_M: tl.constexpr = xs_ptrs.shape[0]
    inputs = tl.arange(0, PER)[:, None] * _SEGMENTS + tl.arange(0, _SEGMENTS)[None, :]
    pairs_ptrs = xs_ptrs.to(tl.pointer_type(tl.int32), bitcast=True)[None, None, None, :]
    acc = tl.zeros(total.shape, tl.float32)
    unit = tl.arange(0, WARPS)[:, None, None]
    first, second = _unit_words(words_ptr, ranks, h_in, unit, P, EMULATE)
    pairs_ptrs += wait_for_previous(OVERLAP)
    for _ in range(tl.cdiv(tl.cdiv(h_in, 64 * _SEGMENTS) * P, WARPS)):
        # The next words are asked for before these are used.
        next_first, next_second = _unit_words(words_ptr, ranks, h_in, unit + WARPS, P, EMULATE)
        pairs = unit * (_SEGMENTS * PER) + inputs[None, :, :]
        x = load_bits(pairs_ptrs + pairs[:, :, :, None], EMULATE)
        even = (x & 0xFFFF).to(tl.int16).to(DT, bitcast=True)
        odd = ((x >> 16) & 0xFFFF).to(tl.int16).to(DT, bitcast=True)
        x = tl.reshape(tl.permute(tl.join(even, odd), (0, 1, 2, 4, 3)), (WARPS, BLOCK_K, BLOCK_M))
        for DOWN in tl.static_range(0, 8 if P == 8 else 4, 4):
            codes = tl.permute(unpack(first, second, P, DOWN, DT, EMULATE), (0, 1, 3, 2, 4))
            codes = tl.reshape(codes, (WARPS, ranks.shape[0], BLOCK_K))
            acc = dot(codes, x, acc, EMULATE)
        unit, first, second = unit + WARPS, next_first, next_second
    UNIT: tl.constexpr = (6 if tl.bfloat16 == DT else 9) + (4 if P == 8 else 0)
    return total + acc * (weight * 2.0**UNIT)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def shrink_kernel(
    projected_ptr, max_rank, sums_ptr, sums_stride, sum_count, xs_ptr, xs_stride, h_in, padded_h_in,
    slots_ptr, addresses_ptr, descriptors_ptr,
    LINEARS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr, SUMS: tl.constexpr,
    WARPS: tl.constexpr, OVERLAP: tl.constexpr, EMULATE: tl.constexpr,
):  # fmt: skip
    """`s * (xs V_hat^T)` for one chunk of rows and grid-strided tiles of ranks."""
    start_next(OVERLAP)
    chunk = tl.program_id(1)
    slot = tl.load(slots_ptr + chunk)
    if slot == 0:
        wait_for_previous(OVERLAP)
        return
    descriptors_ptr += slot * LINEARS * _DESCRIPTOR
    count = 0
    for other in tl.static_range(LINEARS):
        count += tl.load(descriptors_ptr + other * _DESCRIPTOR + 2)
    if tl.program_id(0) >= count:
        wait_for_previous(OVERLAP)
    positions = chunk * BLOCK_M + tl.arange(0, BLOCK_M)
    for tile in range(tl.program_id(0), count, tl.num_programs(0)):
        linear = 0
        linear_tile = tile
        for other in tl.static_range(LINEARS - 1):
            tiles = tl.load(descriptors_ptr + other * _DESCRIPTOR + 2)
            past = (linear == other) & (linear_tile >= tiles)
            linear += past.to(tl.int32)
            linear_tile -= tl.where(past, tiles, 0)
        descriptor = descriptors_ptr + linear * _DESCRIPTOR
        address = tl.load(addresses_ptr + slot * LINEARS + linear)
        words_ptr = address.to(tl.pointer_type(tl.int32))
        tile_ptr = words_ptr + tl.load(descriptor + 3) + linear_tile * _TILE
        bits = tl.load(tile_ptr)
        rank_count = tl.load(tile_ptr + 2)
        ranks = tl.minimum(tl.arange(0, BLOCK_R), rank_count - 1)  # of the tile's words
        index = tl.arange(0, BLOCK_R)
        mask = index < rank_count
        delta_ranks = tl.load(tile_ptr + 1) + index
        floats_ptr = address.to(tl.pointer_type(tl.float32))
        s = tl.load(floats_ptr + tl.load(descriptor + 4) + delta_ranks, mask=mask, other=0.0)
        if OVERLAP:
            _prefetch_tile(words_ptr, tile_ptr, bits, rank_count, h_in, WARPS)
        total = tl.zeros((WARPS, BLOCK_R, BLOCK_M), tl.float32)
        row_ptrs = xs_ptr + (positions * xs_stride + linear * padded_h_in)
        for digit in tl.static_range(4):
            if bits & (8 >> digit):
                plane_ptr = words_ptr + tl.load(tile_ptr + 3 + digit)
                weight = (1 << (bits & ((8 >> digit) - 1))).to(tl.float32)
                total = _shrink_plane(
                    total, weight, row_ptrs, plane_ptr, ranks, h_in,
                    8 >> digit, WARPS, OVERLAP, EMULATE,
                )  # fmt: skip
        result = tl.sum(total, axis=0)
        offset_word = tl.load(descriptor + 5)
        if offset_word >= 0:
            blocks = tl.arange(0, SUMS)
            offsets = (positions * sums_stride)[:, None] + (linear * sum_count + blocks)[None, :]
            sums_ptr += wait_for_previous(OVERLAP)
            sums = tl.load(sums_ptr + offsets, mask=(blocks < sum_count)[None, :], other=0.0)
            offset = tl.load(floats_ptr + offset_word + delta_ranks, mask=mask, other=0.0)
            result -= offset[:, None] * tl.sum(sums, axis=1)[None, :]
        out = (positions * max_rank)[None, :] + (tl.load(descriptor + 1) + delta_ranks)[:, None]
        tl.store(projected_ptr + out, result * s[:, None], mask=mask[:, None])


@triton.jit
def _block(words_ptr, blocks_ptr, block, end, tile, h_out, P: tl.constexpr, EMULATE: tl.constexpr):
    """A block of ranks of each warp: its first rank, its ranks, the bits below the plane, and the
    words of the tile for the first and the second half of the ranks."""
    HALF: tl.constexpr = _RANKS // 2
    SEGMENTS: tl.constexpr = _COLUMNS // 32
    block_ptr = blocks_ptr + tl.minimum(block, end - 1) * _BLOCK
    rank, count = tl.load(block_ptr), tl.load(block_ptr + 1)
    word_ptrs = (words_ptr + tl.load(block_ptr + 2))[:, None, None]
    below = tl.load(block_ptr + 3)
    word = tl.arange(0, SEGMENTS * P)[None, None, :]
    segments = tile * SEGMENTS + word // P
    upper = _rank_in_block(tl.arange(0, HALF)[None, :], count)[:, :, None]
    lower = _rank_in_block(tl.arange(0, HALF)[None, :] + HALF, count)[:, :, None]
    first = load_words(word_ptrs, upper, segments, word % P, h_out, P, EMULATE)
    second = load_words(word_ptrs, lower, segments, word % P, h_out, P, EMULATE)
    return rank, tl.where(block < end, count, 0), below, first, second


@triton.jit
def _prefetch_blocks(words_ptr, blocks_ptr, bounds_ptr, tile, h_out, WARPS: tl.constexpr):
    """Ask for the words of all blocks of a tile of outputs, one rank of a block a thread."""
    SEGMENTS: tl.constexpr = _COLUMNS // 32
    second, third = tl.load(bounds_ptr + 1), tl.load(bounds_ptr + 2)
    fourth, end = tl.load(bounds_ptr + 3), tl.load(bounds_ptr + 4)
    thread = tl.arange(0, WARPS * 32)
    index = thread % _RANKS
    for first in range(0, end, WARPS * 32 // _RANKS):
        block = first + thread // _RANKS
        digit = (block >= second).to(tl.int32) + (block >= third).to(tl.int32)
        plane = 8 >> (digit + (block >= fourth).to(tl.int32))
        block_ptr = blocks_ptr + block * _BLOCK
        count = tl.load(block_ptr + 1, mask=block < end, other=0)
        word = tl.load(block_ptr + 2, mask=block < end, other=0)
        word += index * ((h_out * plane + 31) // 32) + tile * SEGMENTS * plane
        prefetch(words_ptr + word, index < count)


@triton.jit
def _rank_in_block(index, count):
    """Ranks (warps, ranks) of a block; past the last one, the last."""
    return tl.minimum(index, tl.maximum(count - 1, 0)[:, None])


@triton.jit
def _terms(projected_ptr, rank, index, count, positions, max_rank, scale, EMULATE: tl.constexpr):
    """Projections (warps, ranks, rows) of ranks `index` of a block, times `scale` (warps)."""
    ranks = rank[:, None] + _rank_in_block(index, count)
    offsets = ranks[:, :, None] + (positions * max_rank)[None, None, :]
    t = load_bits(projected_ptr + offsets, EMULATE).to(tl.float32, bitcast=True)
    return tl.where((index < count[:, None])[:, :, None], t * scale[:, None, None], 0.0)


@triton.jit
def _expand_plane(
    acc, projected_ptr, max_rank, positions, words_ptr, blocks_ptr, begin, end, tile, h_out,
    P: tl.constexpr, TERMS: tl.constexpr, WARPS: tl.constexpr,
    OVERLAP: tl.constexpr, EMULATE: tl.constexpr,
):  # fmt: skip
    """Add the products of all planes of P bits to `acc` (warps, columns, rows).

    Blocks of ranks are strided over the warps. Column `32 * segment + i` of the tile is column
    `i * segments + segment` of `acc`, for every plane.
    """
    HALF: tl.constexpr = _RANKS // 2
    SEGMENTS: tl.constexpr = _COLUMNS // 32
    BLOCK_M: tl.constexpr = positions.shape[0]
    block = begin + tl.arange(0, WARPS)
    rank, count, below, first, second = _block(
        words_ptr, blocks_ptr, block, end, tile, h_out, P, EMULATE
    )
    projected_ptr += wait_for_previous(OVERLAP)
    for _ in range(tl.cdiv(end - begin, WARPS)):
        # The next block is asked for before this one is used.
        block += WARPS
        next_rank, next_count, next_below, next_first, next_second = _block(
            words_ptr, blocks_ptr, block, end, tile, h_out, P, EMULATE
        )
        scale = ((1024 if P == 8 else 64) << below).to(tl.float32)
        index = tl.arange(0, HALF)[None, :]
        even = _terms(projected_ptr, rank, index, count, positions, max_rank, scale, EMULATE)
        odd = _terms(projected_ptr, rank, index + HALF, count, positions, max_rank, scale, EMULATE)
        t = tl.reshape(tl.permute(tl.join(even, odd), (0, 1, 3, 2)), (WARPS, _RANKS, BLOCK_M))
        for DOWN in tl.static_range(0, 8 if P == 8 else 4, 4):
            codes = unpack(first, second, P, DOWN, tl.bfloat16, EMULATE)
            codes = tl.reshape(codes, (WARPS, HALF, SEGMENTS, P, 32 // P, 2))
            codes = tl.permute(codes, (0, 3, 4, 2, 1, 5))
            codes = tl.reshape(codes, (WARPS, _COLUMNS, _RANKS))
            term = round_to(t, tl.bfloat16, EMULATE)
            acc = dot(codes, term, acc, EMULATE)
            if TERMS == 2:  # The rounding error of bfloat16, for float16 outputs.
                term = round_to(t - term.to(tl.float32), tl.bfloat16, EMULATE)
                acc = dot(codes, term, acc, EMULATE)
        rank, count, below = next_rank, next_count, next_below
        first, second = next_first, next_second
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
def _rest(projected_ptr, max_rank, positions, offset_ptr, rank, BLOCK: tl.constexpr):
    """What U's offsets take from every output of a row: (rows)."""
    rest = tl.zeros((positions.shape[0], BLOCK), tl.float32)
    for first in range(0, rank, BLOCK):
        ranks = first + tl.arange(0, BLOCK)
        mask = (ranks < rank)[None, :]
        offsets = (positions * max_rank)[:, None] + ranks[None, :]
        t = tl.load(projected_ptr + offsets, mask=mask, other=0.0)
        rest += t * tl.load(offset_ptr + ranks[None, :], mask=mask, other=0.0)
    return tl.sum(rest, axis=1)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def expand_kernel(
    y_ptr, y_stride, projected_ptr, max_rank, rows_ptr, slots_ptr,
    addresses_ptr, descriptors_ptr, output_tiles_ptr,
    LINEARS: tl.constexpr, BLOCK_M: tl.constexpr, TERMS: tl.constexpr,
    WARPS: tl.constexpr, OVERLAP: tl.constexpr, EMULATE: tl.constexpr,
):  # fmt: skip
    """Add the deltas to one chunk of rows and one tile of a linear's outputs."""
    start_next(OVERLAP)
    output_tile_ptr, chunk = output_tiles_ptr + tl.program_id(0) * _OUTPUT_TILE, tl.program_id(1)
    slot = tl.load(slots_ptr + chunk)
    if slot == 0:
        wait_for_previous(OVERLAP)
        return
    linear = tl.load(output_tile_ptr)
    tile = tl.load(output_tile_ptr + 1)
    begin = tl.load(output_tile_ptr + 2)
    h_out = tl.load(output_tile_ptr + 3)
    descriptor = descriptors_ptr + (slot * LINEARS + linear) * _DESCRIPTOR
    rank, bias_word = tl.load(descriptor), tl.load(descriptor + 9)
    if (rank == 0) & (bias_word < 0):
        wait_for_previous(OVERLAP)
        return
    words_ptr = tl.load(addresses_ptr + slot * LINEARS + linear).to(tl.pointer_type(tl.int32))
    floats_ptr = words_ptr.to(tl.pointer_type(tl.float32), bitcast=True)
    positions = chunk * BLOCK_M + tl.arange(0, BLOCK_M)
    rows = tl.load(rows_ptr + positions)
    columns = tile * _COLUMNS + tl.arange(0, _COLUMNS)
    total = tl.zeros((_COLUMNS, BLOCK_M), tl.float32)
    if rank > 0:
        linear_projected_ptr = projected_ptr + tl.load(descriptor + 1)
        blocks_ptr = words_ptr + tl.load(descriptor + 10)
        if OVERLAP:
            _prefetch_blocks(words_ptr, blocks_ptr, descriptor + 11, tile, h_out, WARPS)
        acc = tl.zeros((WARPS, _COLUMNS, BLOCK_M), tl.float32)
        for DIGIT in tl.static_range(4):
            first_block = tl.load(descriptor + 11 + DIGIT)
            end = tl.load(descriptor + 12 + DIGIT)
            if first_block < end:
                acc = _expand_plane(
                    acc, linear_projected_ptr, max_rank, positions,
                    words_ptr, blocks_ptr, first_block, end, tile, h_out,
                    8 >> DIGIT, TERMS, WARPS, OVERLAP, EMULATE,
                )  # fmt: skip
        total = tl.reshape(_sum_over_warps(acc), (32, _COLUMNS // 32, BLOCK_M))
        total = tl.reshape(tl.permute(total, (1, 0, 2)), (_COLUMNS, BLOCK_M))
        offset_word = tl.load(descriptor + 6)
        if offset_word >= 0:
            total -= _rest(
                linear_projected_ptr, max_rank, positions, floats_ptr + offset_word, rank, 128
            )[None, :]
    scale_word = tl.load(descriptor + 7)
    if scale_word >= 0:
        scale = tl.load(floats_ptr + scale_word + columns, mask=columns < h_out, other=0.0)
        total *= scale[:, None]
    if bias_word >= 0:
        bias = tl.load(floats_ptr + bias_word + columns, mask=columns < h_out, other=0.0)
        total += bias[:, None]
    y_ptr += wait_for_previous(OVERLAP)  # of rank 0 none has waited
    out = y_ptr + rows.to(tl.int64)[None, :] * y_stride + (begin + columns)[:, None]
    mask = (rows >= 0)[None, :] & (columns < h_out)[:, None]
    y = tl.load(out, mask=mask, other=0.0).to(tl.float32) + total
    tl.store(out, round_to(y, y_ptr.dtype.element_ty, EMULATE), mask=mask)


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
        "BLOCK_M": CHUNK_ROWS,
        "OVERLAP": overlap,
        "EMULATE": emulate,
        "launch_pdl": overlap,
        "enable_fp_fusion": True,  # pinned: Triton 3.10 changes the default
    }
    xs = chunks.scaled.view(x.dtype)
    sum_count = table.padded_h_in // SUM_COLUMNS

    def prepare() -> object:
        return prepare_kernel[(chunks.count * CHUNK_ROWS, sum_count, table.linears)](
            xs, xs.stride(0), chunks.sums, chunks.sums.stride(0), x, x.stride(0),
            table.h_in, table.padded_h_in, chunks.rows, chunks.slots,
            table.addresses, table.descriptors,
            BLOCK_K=SUM_COLUMNS, num_warps=4, **shared,
        )  # fmt: skip

    def shrink() -> object:
        return shrink_kernel[(max(1, triton.cdiv(table.max_rank, TILE_RANKS)), chunks.count)](
            chunks.projected, chunks.max_rank, chunks.sums, chunks.sums.stride(0), sum_count,
            xs, xs.stride(0), table.h_in, table.padded_h_in,
            chunks.slots, table.addresses, table.descriptors,
            BLOCK_R=TILE_RANKS, SUMS=triton.next_power_of_2(sum_count),
            WARPS=variant.shrink_warps,
            num_warps=variant.shrink_warps, maxnreg=variant.shrink_registers, **shared,
        )  # fmt: skip

    def expand() -> object:
        return expand_kernel[(len(table.output_tiles), chunks.count)](
            y, y.stride(0), chunks.projected, chunks.max_rank, chunks.rows, chunks.slots,
            table.addresses, table.descriptors, table.output_tiles,
            TERMS=2 if x.dtype == torch.float16 else 1,
            WARPS=variant.expand_warps,
            num_warps=variant.expand_warps, maxnreg=variant.expand_registers, **shared,
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

    With `emulate` the kernels use neither inline assembly nor bfloat16 products, which Triton's
    interpreter lacks; on a GPU this is slow, and isolates errors in either.
    """
    if not chunks.count:
        return
    emulate = not x.is_cuda if emulate is None else emulate
    for launch in launches(y, x, table, chunks, variant or variant_of(x.device), emulate=emulate):
        launch()
