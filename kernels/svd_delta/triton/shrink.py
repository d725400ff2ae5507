"""Projections on the singular vectors, `s * (x V_hat^T)`."""

import triton
import triton.language as tl

from deltadock.kernels.operands import PAIRED
from deltadock.kernels.overlap import prefetch, start_next, wait_for_previous
from deltadock.kernels.svd_delta.chunks import BLOCK_INPUTS, CHUNK_ROWS
from deltadock.kernels.svd_delta.layout import DESCRIPTOR_FIELDS, TILE_FIELDS, TILE_RANKS
from deltadock.kernels.svd_delta.triton.fixed_point import (
    FINITE,
    codes_of,
    dot_bytes,
    spread,
    sum_over_warps,
)
from deltadock.kernels.svd_delta.triton.forms import SUM_PARTS, UNSPECIALIZED
from deltadock.kernels.svd_delta.triton.words import (
    ceil_div,
    load_bits,
    load_inputs,
    load_words,
    row_addresses,
    store_bits,
)

_DESCRIPTOR = tl.constexpr(DESCRIPTOR_FIELDS)
_TILE = tl.constexpr(TILE_FIELDS)
_RANKS = tl.constexpr(TILE_RANKS)
_ROWS = tl.constexpr(CHUNK_ROWS)
_BLOCK_INPUTS = tl.constexpr(BLOCK_INPUTS)
_PARTS = tl.constexpr(SUM_PARTS)
_PAIRED = tl.constexpr(PAIRED)


@triton.jit
def _prefetch_tile(words_ptr, plane_words, bits, rank_count, h_in, WARPS: tl.constexpr):
    """Ask for all words of a tile of V."""
    index = tl.arange(0, WARPS * 32) * 16
    for DIGIT in tl.static_range(4):
        if bits & (8 >> DIGIT):
            words = ceil_div(h_in * (8 >> DIGIT), 32) * rank_count
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
    stride = 4 * ceil_div(h_in * P, 32)
    words_addresses = row_addresses(words_address + byte, rank, last, stride, EMULATE)
    words_addresses = words_addresses[:, :, :, None] + (index // 4)[None, None, None, :]
    x_addresses = (xs_addresses[None, :, None] + byte * FIELDS)[:, :, :, None]
    x_addresses += (index // 4)[None, None, None, :]
    words = load_words(words_addresses, VECTOR, EMULATE)
    for _ in range(ceil_div(h_in, INPUTS * _PARTS) * (_PARTS // WARPS)):
        acc = tl.zeros((WARPS, _RANKS, 2 * _ROWS), tl.int32)
        for run in tl.static_range(RUNS):
            # The next words are asked for before these are used.
            words_addresses += 64 if run + 1 < RUNS else 64 * (1 + RUNS * (WARPS - 1))
            next_words = load_words(words_addresses, VECTOR, EMULATE)
            for field in tl.static_range(FIELDS):
                codes = spread(codes_of(words, P, field), EMULATE)
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


@triton.jit
def _sum_of_parts(parts):
    """Sum parts in pairs, in the order in which `sum_over_warps` would if each had its warps."""
    return parts[0] if len(parts) == 1 else _sum_of_parts(parts[::2]) + _sum_of_parts(parts[1::2])


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
        result = sum_over_warps(_sum_of_parts(totals))
        result -= v_zero[:, None] * tl.sum(sums, axis=1)[None, :]
        result *= s[:, None]  # 0 past the last rank
        out = projected_ptr + ((positions * max_tiles + tile) * _RANKS)[None, :] + index[:, None]
        store_bits(out.to(tl.int64), result.to(tl.int32, bitcast=True), EMULATE)
        magnitudes = result.to(tl.int32, bitcast=True) & FINITE
        peak, rest = tl.reduce((magnitudes, result * u_zero[:, None]), 0, _largest_and_sum)
        places = (chunk * max_tiles + tile) * _ROWS + tl.arange(0, _ROWS)
        tl.store(peaks_ptr + places, peak)
        tl.store(rests_ptr + places, rest)
