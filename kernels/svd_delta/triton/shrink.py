"""From a step's rows to their projections on each rank, `x V_hat^T`."""

import triton
import triton.language as tl

from deltadock.kernels.svd_delta.layout import TILE_FIELDS
from deltadock.kernels.svd_delta.table import ENTRY_FIELDS
from deltadock.kernels.svd_delta.triton.unpack import (
    UNSPECIALIZED,
    dot,
    load_words,
    round_to,
    row_words,
    unpack,
)

_ENTRY = tl.constexpr(ENTRY_FIELDS)
_TILE = tl.constexpr(TILE_FIELDS)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def prepare_kernel(
    xs_ptr, xs_stride, sums_ptr, sums_stride, x_ptr, x_stride, h_in, padded,
    rows_ptr, slots_ptr, addresses_ptr, entries_ptr,
    LINEARS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
    EMULATE: tl.constexpr,
):  # fmt: skip
    """A chunk's rows times each linear's column scale, zeros past the end, and their sums."""
    block, linear, chunk = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    slot = tl.load(slots_ptr + chunk)
    if slot == 0:
        return
    entry = entries_ptr + (slot * LINEARS + linear) * _ENTRY
    if tl.load(entry) == 0:
        return
    places = chunk * BLOCK_M + tl.arange(0, BLOCK_M)
    rows = tl.load(rows_ptr + places)
    columns = block * BLOCK_K + tl.arange(0, BLOCK_K)
    inside = (rows >= 0)[:, None] & (columns < h_in)[None, :]
    at = rows.to(tl.int64)[:, None] * x_stride + columns[None, :]
    x = tl.load(x_ptr + at, mask=inside, other=0.0)
    scale_word = tl.load(entry + 8)
    if scale_word >= 0:
        address = tl.load(addresses_ptr + slot * LINEARS + linear)
        scale_ptr = address.to(tl.pointer_type(tl.float32)) + scale_word
        scale = tl.load(scale_ptr + columns, mask=columns < h_in, other=0.0)
        x = round_to(x.to(tl.float32) * scale[None, :], x.dtype, EMULATE)
    at = places.to(tl.int64)[:, None] * xs_stride + (linear * padded + columns)[None, :]
    tl.store(xs_ptr + at, x)
    sums = sums_ptr + places * sums_stride + linear * tl.num_programs(0) + block
    tl.store(sums, tl.sum(x.to(tl.float32), axis=1))


@triton.jit
def _shrink_plane(
    total, weight, xs_ptr, xs_stride, words_ptr, ranks, h_in, places,
    P: tl.constexpr, WARPS: tl.constexpr, WORDS: tl.constexpr,
    ALIGNED: tl.constexpr, EMULATE: tl.constexpr,
):  # fmt: skip
    """Add a plane's share of the projection, times `weight`, to `total` (warps, ranks, rows)."""
    DT: tl.constexpr = xs_ptr.dtype.element_ty
    PER: tl.constexpr = 32 // P
    BLOCK_K: tl.constexpr = 2 * WORDS * PER
    BLOCK_M: tl.constexpr = places.shape[0]
    words = row_words(h_in, P, ALIGNED)
    warp = tl.arange(0, WARPS)[:, None, None]
    acc = tl.zeros(total.shape, tl.float32)
    for step in range(tl.cdiv(words, 2 * WORDS * WARPS)):
        block = step * WARPS + warp
        columns = block * (2 * WORDS) + tl.arange(0, WORDS)[None, None, :]
        rows = (ranks * words)[None, :, None]
        first = load_words(words_ptr, rows, columns, words, ALIGNED)
        second = load_words(words_ptr, rows, columns + WORDS, words, ALIGNED)
        at = (places * xs_stride)[None, :, None] + tl.arange(0, BLOCK_K)[None, None, :]
        x = tl.load(xs_ptr + (at + block * BLOCK_K))
        x = tl.reshape(x, (WARPS, BLOCK_M, 2, WORDS, PER))
        x = tl.reshape(tl.permute(x, (0, 4, 3, 2, 1)), (WARPS, BLOCK_K, BLOCK_M))
        for DOWN in tl.static_range(0, 8 if P == 8 else 4, 4):
            codes = unpack(first, second, P, DOWN, DT, EMULATE)
            codes = tl.permute(codes, (0, 1, 3, 2, 4))
            codes = tl.reshape(codes, (WARPS, ranks.shape[0], BLOCK_K))
            acc = dot(codes, x, acc, EMULATE)
    UNIT: tl.constexpr = (6 if tl.bfloat16 == DT else 9) + (4 if P == 8 else 0)
    return total + acc * (weight * 2.0**UNIT)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def shrink_kernel(
    projected_ptr, max_rank, sums_ptr, sums_stride, sum_count, xs_ptr, xs_stride, h_in, padded,
    slots_ptr, addresses_ptr, entries_ptr,
    LINEARS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr, SUMS: tl.constexpr,
    WARPS: tl.constexpr, WORDS: tl.constexpr, ALIGNED: tl.constexpr, EMULATE: tl.constexpr,
):  # fmt: skip
    """`s * (xs V_hat^T)` for one chunk of rows and every so manieth tile of ranks."""
    chunk = tl.program_id(1)
    slot = tl.load(slots_ptr + chunk)
    if slot == 0:
        return
    entries_ptr += slot * LINEARS * _ENTRY
    count = 0
    for other in tl.static_range(LINEARS):
        count += tl.load(entries_ptr + other * _ENTRY + 2)
    places = chunk * BLOCK_M + tl.arange(0, BLOCK_M)
    for tile in range(tl.program_id(0), count, tl.num_programs(0)):
        linear = 0
        own = tile
        for other in tl.static_range(LINEARS - 1):
            tiles = tl.load(entries_ptr + other * _ENTRY + 2)
            past = (linear == other) & (own >= tiles)
            linear += past.to(tl.int32)
            own -= tl.where(past, tiles, 0)
        entry = entries_ptr + linear * _ENTRY
        address = tl.load(addresses_ptr + slot * LINEARS + linear)
        words_ptr = address.to(tl.pointer_type(tl.int32))
        tile_ptr = words_ptr + tl.load(entry + 3) + own * _TILE
        bits = tl.load(tile_ptr)
        inside = tl.load(tile_ptr + 2)
        ranks = tl.minimum(tl.arange(0, BLOCK_R), inside - 1)
        total = tl.zeros((WARPS, BLOCK_R, BLOCK_M), tl.float32)
        rows_ptr = xs_ptr + linear * padded
        for digit in tl.static_range(4):
            if bits & (8 >> digit):
                plane_ptr = words_ptr + tl.load(tile_ptr + 3 + digit)
                weight = (1 << (bits & ((8 >> digit) - 1))).to(tl.float32)
                total = _shrink_plane(
                    total, weight, rows_ptr, xs_stride, plane_ptr, ranks, h_in, places,
                    8 >> digit, WARPS, WORDS, ALIGNED, EMULATE,
                )  # fmt: skip
        numbers = tl.arange(0, BLOCK_R)
        ranks = tl.load(tile_ptr + 1) + numbers
        mask = numbers < inside
        floats_ptr = address.to(tl.pointer_type(tl.float32))
        result = tl.sum(total, axis=0)
        offset_word = tl.load(entry + 5)
        if offset_word >= 0:
            blocks = tl.arange(0, SUMS)
            at = (places * sums_stride)[:, None] + (linear * sum_count + blocks)[None, :]
            sums = tl.load(sums_ptr + at, mask=(blocks < sum_count)[None, :], other=0.0)
            offset = tl.load(floats_ptr + offset_word + ranks, mask=mask, other=0.0)
            result -= offset[:, None] * tl.sum(sums, axis=1)[None, :]
        s = tl.load(floats_ptr + tl.load(entry + 4) + ranks, mask=mask, other=0.0)
        out = (places * max_rank)[None, :] + (tl.load(entry + 1) + ranks)[:, None]
        tl.store(projected_ptr + out, result * s[:, None], mask=mask[:, None])
