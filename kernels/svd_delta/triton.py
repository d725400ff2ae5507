"""The grouped delta on a GPU: shrink (`x V_hat^T`), then expand into the base's output.

Both kernels read the packed words as the artifact holds them. A code enters the product as
`code - 2**(bits - 1)`, which every activation type holds exactly; what remains of the zero point
is one number a rank, and adds that rank's share of the row's sum. Each output is summed by one
program in a fixed order, without atomics.
"""

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from kernels.svd_delta.chunks import HEIGHT, Chunks
from kernels.svd_delta.layout import GROUP_FIELDS, DeltaTable

BLOCK_R = 32
"""Ranks of a tile in both kernels."""
BLOCK_K = 128
"""Inputs of a step of the shrink kernel."""
BLOCK_N = 128
"""Outputs of a tile of the expand kernel."""

SHRINK_STAGES = 3
EXPAND_STAGES = 2
"""Tiles in flight in each kernel's loop."""


@triton.jit
def _load_words(units_ptr, INDEX: tl.constexpr, STEP: tl.constexpr, PLANE: tl.constexpr):
    """Words INDEX, INDEX + STEP, ... of each unit of PLANE words, (ranks, units, 2, ..., 2).

    A join keeps its two values in the thread that had them: nothing moves between threads.
    """
    if STEP == PLANE:
        words = tl.load(units_ptr + INDEX)
    else:
        even = _load_words(units_ptr, INDEX, 2 * STEP, PLANE)
        odd = _load_words(units_ptr, INDEX + STEP, 2 * STEP, PLANE)
        words = tl.join(even, odd)
    return words


@triton.jit
def _unpack_plane(plane_ptr, ranks, first, row_words, PLANE: tl.constexpr, BLOCK: tl.constexpr):
    """One plane of (ranks, BLOCK) codes, int32, from column `first` on; a unit is 32 columns."""
    unit = first // 32 + tl.arange(0, BLOCK // 32)
    units_ptr = plane_ptr + (ranks * row_words)[:, None] + (unit * PLANE)[None, :]
    words = _load_words(units_ptr, 0, 1, PLANE)
    for doubling in tl.static_range(5):
        if PLANE << doubling < 32:
            words = tl.join(words, words)
    lane = tl.arange(0, BLOCK) % (32 // PLANE)
    return (tl.reshape(words, (ranks.shape[0], BLOCK)) >> (lane * PLANE)[None, :]) & (2**PLANE - 1)


@triton.jit
def _unpack(segment_ptr, ranks, count, first, columns, BITS: tl.constexpr, BLOCK: tl.constexpr):
    """A group's (ranks, BLOCK) codes less `2**(BITS - 1)`, float32, from column `first` on.

    Ranks past the group's last are copies of it, and columns past the end hold any other code:
    whoever multiplies them has zeros there, or drops the result.
    """
    ranks = tl.minimum(ranks, count - 1)
    plane_ptr = segment_ptr
    # The bits of the float32 2**23 + code: cheaper than a conversion.
    codes = tl.full((ranks.shape[0], BLOCK), 0x4B000000, tl.int32)
    for digit in tl.static_range(4):
        if BITS & (8 >> digit):
            row_words = (columns * (8 >> digit) + 31) // 32
            plane = _unpack_plane(plane_ptr, ranks, first, row_words, 8 >> digit, BLOCK)
            codes |= plane << (BITS & ((8 >> digit) - 1))
            plane_ptr += count * row_words
    return codes.to(tl.float32, bitcast=True) - (8388608.0 + 2.0 ** (BITS - 1))


@triton.jit
def _dot(a, b, acc, UPCAST: tl.constexpr):
    if UPCAST:  # Triton's interpreter multiplies bfloat16 wrongly.
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, acc)


@triton.jit
def _load_rows(x_ptr, x_stride, rows, first, h_in, BLOCK_K: tl.constexpr):
    """(rows, BLOCK_K) inputs from column `first` on; 0 for no row and past the end."""
    columns = first + tl.arange(0, BLOCK_K)
    at = rows.to(tl.int64)[:, None] * x_stride + columns[None, :]
    inside = (rows >= 0)[:, None] & (columns < h_in)[None, :]
    return tl.load(x_ptr + at, mask=inside, other=0.0)


@triton.jit
def _shrink_tile(
    acc, x_ptr, x_stride, rows, segment_ptr, ranks, count, h_in,
    BITS: tl.constexpr, BLOCK_K: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    for first in range(0, h_in, BLOCK_K):
        x = _load_rows(x_ptr, x_stride, rows, first, h_in, BLOCK_K)
        codes = _unpack(segment_ptr, ranks, count, first, h_in, BITS, BLOCK_K)
        acc = _dot(x, tl.trans(codes.to(x.dtype)), acc, UPCAST)
    return acc


@triton.jit
def shrink_kernel(
    projected_ptr, sums_ptr, x_ptr, x_stride, h_in, rows_ptr, slots_ptr,
    addresses_ptr, groups_ptr, max_rank,
    MAX_GROUPS: tl.constexpr, FIELDS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """`x (V_codes - 2**(v_bits - 1))^T` for one chunk of rows and one tile of a group's ranks.

    The programs of tile 0 sum the rows instead.
    """
    chunk, tile = tl.program_id(0), tl.program_id(1) - 1
    slot = tl.load(slots_ptr + chunk)
    if slot == 0:
        return
    places = chunk * BLOCK_M + tl.arange(0, BLOCK_M)
    rows = tl.load(rows_ptr + places)
    if tile < 0:
        total = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
        for first in range(0, h_in, BLOCK_K):
            total += _load_rows(x_ptr, x_stride, rows, first, h_in, BLOCK_K).to(tl.float32)
        tl.store(sums_ptr + places, tl.sum(total, axis=1))
        return

    table_ptr = groups_ptr + slot * MAX_GROUPS * FIELDS
    index = tl.arange(0, MAX_GROUPS)
    tiles = tl.cdiv(tl.load(table_ptr + index * FIELDS), BLOCK_R)
    group = tl.sum((tl.cumsum(tiles) <= tile).to(tl.int32))
    if group == MAX_GROUPS:
        return
    fields_ptr = table_ptr + group * FIELDS
    count = tl.load(fields_ptr)
    first_rank = tl.load(fields_ptr + 1)
    bits = tl.load(fields_ptr + 2)
    words_ptr = tl.load(addresses_ptr + slot).to(tl.pointer_type(tl.int32))
    segment_ptr = words_ptr + tl.load(fields_ptr + 4)
    ranks = (tile - tl.sum(tl.where(index < group, tiles, 0))) * BLOCK_R + tl.arange(0, BLOCK_R)
    acc = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    for BITS in tl.static_range(1, 9):
        if bits == BITS:
            acc = _shrink_tile(
                acc, x_ptr, x_stride, rows, segment_ptr, ranks, count, h_in, BITS, BLOCK_K, UPCAST
            )
    out = places.to(tl.int64)[:, None] * max_rank + (first_rank + ranks)[None, :]
    tl.store(projected_ptr + out, acc, mask=(rows >= 0)[:, None] & (ranks < count)[None, :])


@triton.jit
def _expand_group(
    acc, rest, projected_ptr, sums, scales_ptr, places, rows, max_rank,
    segment_ptr, count, v_centre, first, h_out,
    BITS: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    for begin in range(0, count, BLOCK_R):
        ranks = begin + tl.arange(0, BLOCK_R)
        inside = ranks < count
        s = tl.load(scales_ptr + ranks, mask=inside, other=0.0)
        v_zero = tl.load(scales_ptr + max_rank + ranks, mask=inside, other=0.0)
        u_zero = tl.load(scales_ptr + 2 * max_rank + ranks, mask=inside, other=0.0)
        at = places.to(tl.int64)[:, None] * max_rank + ranks[None, :]
        t = tl.load(projected_ptr + at, mask=(rows >= 0)[:, None] & inside[None, :], other=0.0)
        t = (t - sums[:, None] * (v_zero - v_centre)[None, :]) * s[None, :]
        rest += t * (u_zero - 2 ** (BITS - 1))[None, :]
        codes = _unpack(segment_ptr, ranks, count, first, h_out, BITS, BLOCK_N).to(tl.bfloat16)
        # Two bfloat16 terms keep 16 bits of t and its exponent.
        high = t.to(tl.bfloat16)
        low = (t - high.to(tl.float32)).to(tl.bfloat16)
        acc = _dot(high, codes, acc, UPCAST)
        acc = _dot(low, codes, acc, UPCAST)
    return acc, rest


@triton.jit
def expand_kernel(
    y_ptr, y_stride, h_out, projected_ptr, sums_ptr, rows_ptr, slots_ptr,
    addresses_ptr, sizes_ptr, groups_ptr, scales_ptr, max_rank,
    MAX_GROUPS: tl.constexpr, FIELDS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    """`y += (projected * s) U_hat^T` for one chunk of rows and one tile of outputs, all ranks."""
    chunk, tile = tl.program_id(0), tl.program_id(1)
    slot = tl.load(slots_ptr + chunk)
    if slot == 0:
        return
    size = tl.load(sizes_ptr + slot)
    if size == 0:
        return
    words_ptr = tl.load(addresses_ptr + slot).to(tl.pointer_type(tl.int32))
    places = chunk * BLOCK_M + tl.arange(0, BLOCK_M)
    rows = tl.load(rows_ptr + places)
    sums = tl.load(sums_ptr + places)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    rest = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    for group in range(size):
        fields_ptr = groups_ptr + (slot * MAX_GROUPS + group) * FIELDS
        count = tl.load(fields_ptr)
        first_rank = tl.load(fields_ptr + 1)
        v_centre = (1 << (tl.load(fields_ptr + 2) - 1)).to(tl.float32)
        bits = tl.load(fields_ptr + 3)
        segment_ptr = words_ptr + tl.load(fields_ptr + 5)
        for BITS in tl.static_range(1, 9):
            if bits == BITS:
                acc, rest = _expand_group(
                    acc, rest, projected_ptr + first_rank, sums,
                    scales_ptr + slot * 3 * max_rank + first_rank, places, rows, max_rank,
                    segment_ptr, count, v_centre, tile * BLOCK_N, h_out,
                    BITS, BLOCK_R, BLOCK_N, UPCAST,
                )  # fmt: skip
    columns = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    out = y_ptr + rows.to(tl.int64)[:, None] * y_stride + columns[None, :]
    inside = (rows >= 0)[:, None] & (columns < h_out)[None, :]
    y = tl.load(out, mask=inside, other=0.0).to(tl.float32) + acc - tl.sum(rest, axis=1)[:, None]
    tl.store(out, y.to(y_ptr.dtype.element_ty), mask=inside)


def svd_delta(y: Tensor, x: Tensor, table: DeltaTable, chunks: Chunks) -> None:
    """Add each row's delta to `y` in place; see `kernels.svd_delta.svd_delta`."""
    if not chunks.count:
        return
    shared: dict[str, Any] = {
        "MAX_GROUPS": table.max_groups,
        "FIELDS": GROUP_FIELDS,
        "BLOCK_M": HEIGHT,
        "BLOCK_R": BLOCK_R,
        "UPCAST": not x.is_cuda,
        # What Triton does of its own accord changes in 3.10.
        "enable_fp_fusion": True,
    }
    # One tile for the sums, and at most one a group that is not full.
    tiles = 1 + table.max_rank // BLOCK_R + table.max_groups
    shrink_kernel[(chunks.count, tiles)](
        chunks.projected, chunks.sums, x, x.stride(0), table.h_in, chunks.rows, chunks.slots,
        table.addresses, table.groups, table.max_rank,
        BLOCK_K=BLOCK_K, num_stages=SHRINK_STAGES, **shared,
    )  # fmt: skip
    expand_kernel[(chunks.count, triton.cdiv(table.h_out, BLOCK_N))](
        y, y.stride(0), table.h_out, chunks.projected, chunks.sums, chunks.rows, chunks.slots,
        table.addresses, table.sizes, table.groups, table.scales, table.max_rank,
        BLOCK_N=BLOCK_N, num_stages=EXPAND_STAGES, **shared,
    )  # fmt: skip
