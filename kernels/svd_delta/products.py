"""Prefill on a GPU: both factors are unpacked, then multiplied as any matrices.

Two products with factors of rank r take `2 rows r (h_in + h_out)` floating-point operations, adding
the delta to a dense weight `2 r h_in h_out`: fewer only for more rows than `h_in h_out / (h_in +
h_out)`, which is 1,792 for a square matrix of Qwen2.5-7B and 3,014 for one of its MLP. Unpacking
writes 16 bits for every code once per call, so that nothing needs to be kept.
"""

from collections.abc import Mapping, Sequence
from typing import Final

import torch
import triton
import triton.language as tl
from torch import Tensor

from deltadock.kernels.interpreter import round_to
from deltadock.kernels.svd_delta.chunks import RowIndex
from deltadock.kernels.svd_delta.layout import TILE_FIELDS, TILE_RANKS, DeltaTable, PackedDelta

BLOCK_COLUMNS: Final = 128
"""Columns of a vector that a program unpacks."""
_TILE = tl.constexpr(TILE_FIELDS)
_RANKS = tl.constexpr(TILE_RANKS)


@triton.jit
def _plane_codes(plane_ptr, rows, quad, columns, P: tl.constexpr):
    """The codes of a plane of P bits, in the bytes of words (rows, quads of columns)."""
    row_ptrs = plane_ptr + rows * ((columns * P + 31) // 32)
    words = tl.load(row_ptrs[:, None] + (quad * P // 8)[None, :])
    codes = words >> (quad * (4 * P) % 32)[None, :]
    if P == 4:
        codes = (codes & 0xFF) | ((codes & 0xFF00) << 8)
        codes = (codes | (codes << 4)) & 0x0F0F0F0F
    elif P == 2:
        codes = (codes & 0xF) | ((codes & 0xF0) << 12)
        codes = (codes | (codes << 6)) & 0x03030303
    elif P == 1:
        codes = ((codes & 0xF) * 0x00204081) & 0x01010101
    return codes


@triton.jit
def unpack_kernel(
    out_ptr, words_ptr, tiles_word, tiles, rank, padded_rank, columns,
    offset_word, rank_scale_word, column_scale_word, BLOCK: tl.constexpr, EMULATE: tl.constexpr,
):  # fmt: skip
    """Unpack a tile of ranks of a block of columns; the last tile is the padding.

    With `rank_scale_word`, that of `s`, it unpacks U, else V. Of a width of b bits, V is divided by
    2**b and U multiplied by it, so that neither leaves the range of a 16-bit float.
    """
    tile = tl.program_id(0)
    of_u = rank_scale_word >= 0
    floats_ptr = words_ptr.to(tl.pointer_type(tl.float32), bitcast=True)
    tile_ptr = words_ptr + tiles_word + tl.minimum(tile, tiles - 1) * _TILE
    v_bits = tl.load(tile_ptr)
    first = tl.where(tile < tiles, tl.load(tile_ptr + 1), rank)
    count = tl.where(tile < tiles, tl.load(tile_ptr + 2), 0)
    side_ptr = tile_ptr + tl.where(of_u, 8, 3)
    bits = tl.load(tile_ptr + tl.where(of_u, 7, 0))
    index = tl.arange(0, _RANKS)
    ranks = first + index
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    present = index < count
    within = column < columns
    # Past the last rank or column, codes of the last, which are not used.
    rows = tl.minimum(index, tl.maximum(count - 1, 0))
    quad = tl.minimum(
        tl.program_id(1) * (BLOCK // 4) + tl.arange(0, BLOCK // 4), (columns - 1) // 4
    )
    packed = tl.zeros((_RANKS, BLOCK // 4), tl.int32)
    for DIGIT in tl.static_range(4):
        if bits & (8 >> DIGIT):
            plane_ptr = words_ptr + tl.load(side_ptr + DIGIT)
            part = _plane_codes(plane_ptr, rows, quad, columns, 8 >> DIGIT)
            packed |= part << (bits & ((8 >> DIGIT) - 1))
    even = tl.join(packed & 0xFF, (packed >> 16) & 0xFF)
    odd = tl.join((packed >> 8) & 0xFF, (packed >> 24) & 0xFF)
    codes = tl.reshape(tl.join(even, odd), (_RANKS, BLOCK))
    zero = tl.zeros((_RANKS,), tl.float32) + ((1 << bits) - 1).to(tl.float32) * 0.5
    if offset_word >= 0:
        zero += tl.load(floats_ptr + offset_word + ranks, mask=present, other=0.0)
    power = ((127 - v_bits) << 23).to(tl.float32, bitcast=True)
    scale = tl.zeros((_RANKS,), tl.float32) + power
    if of_u:
        s = tl.load(floats_ptr + rank_scale_word + ranks, mask=present, other=0.0)
        scale = s * ((127 + v_bits) << 23).to(tl.float32, bitcast=True)
    scale = tl.where(present, scale, 0.0)
    values = (codes.to(tl.float32) - zero[:, None]) * scale[:, None]
    if column_scale_word >= 0:
        values *= tl.load(floats_ptr + column_scale_word + column, mask=within, other=0.0)[None, :]
    end = tl.where(tile < tiles, first + count, padded_rank)
    out_ptrs = out_ptr + ranks.to(tl.int64)[:, None] * columns + column[None, :]
    written = (ranks < end)[:, None] & within[None, :]
    tl.store(out_ptrs, round_to(values, out_ptr.dtype.element_ty, EMULATE), mask=written)


def padded(rank: int) -> int:
    """The rank with its padding."""
    return -(-rank // TILE_RANKS) * TILE_RANKS


def unpack_factors(delta: PackedDelta, v: Tensor) -> Tensor:
    """Unpack a delta `U^T V` of rank 1 or more; V to `v` (padded rank, h_in).

    Ranks are padded with zeros to a multiple of `TILE_RANKS`: products of rows that are not aligned
    to 16 bytes are slow.

    Returns:
        U (padded rank, h_out).
    """
    u = torch.empty(len(v), delta.h_out, dtype=v.dtype, device=v.device)
    begins = {name: region.begin for name, region in delta.regions.items()}
    for out, side, scale in ((v, "v", "column_scale"), (u, "u", "row_scale")):
        columns = out.shape[1]
        unpack_kernel[(delta.tile_count + 1, triton.cdiv(columns, BLOCK_COLUMNS))](
            out, delta.words, begins["tiles"], delta.tile_count, delta.rank, len(out), columns,
            begins.get(f"{side}_offset", -1), begins["s"] if side == "u" else -1,
            begins.get(scale, -1),
            BLOCK=BLOCK_COLUMNS, EMULATE=not v.is_cuda, num_warps=4,
            enable_fp_fusion=True,  # pinned: Triton 3.10 changes the default
        )  # fmt: skip
    return u


def add_products(y: Tensor, x: Tensor, table: DeltaTable, rows: Mapping[int, RowIndex]) -> None:
    """Add the deltas of the slots in `rows` to those rows of `y`, in place.

    Args:
        y, x: as for `svd_delta`.
        table: the linears' deltas.
        rows: rows of each slot; empty slots are skipped.
    """
    for slot, index in rows.items():
        if deltas := table.deltas.get(slot):
            _add_products(y, x[index], index, deltas, table.h_outs)


def _add_products(
    y: Tensor,
    x: Tensor,
    rows: RowIndex,
    deltas: Sequence[PackedDelta | None],
    h_outs: Sequence[int],
) -> None:
    """One slot's: one product with all of V, then one with each U."""
    sizes = [0 if delta is None else padded(delta.rank) for delta in deltas]
    v = torch.empty(sum(sizes), x.shape[1], dtype=x.dtype, device=x.device)
    unpacked = [
        unpack_factors(delta, part) if delta is not None and delta.rank else None
        for delta, part in zip(deltas, torch.split(v, sizes), strict=True)
    ]
    projected = torch.split(x @ v.T, sizes, dim=1)
    end = 0
    for delta, u, part, h_out in zip(deltas, unpacked, projected, h_outs, strict=True):
        begin, end = end, end + h_out
        if delta is None:
            continue
        out = y[rows, begin:end]
        if u is not None:
            out.addmm_(part, u)
        if (bias := delta.floats("bias")) is not None:
            out += bias
        if not isinstance(rows, slice):  # with a slice `out` is a view of y
            y[rows, begin:end] = out
