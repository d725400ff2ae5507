"""Reference in plain PyTorch: unpack a delta, and add its product to each row."""

from collections.abc import Mapping
from functools import cache
from typing import Final, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from deltadock.kernels.svd_delta.layout import (
    PackedDelta,
    midpoints,
    plane_words,
    planes,
    segment_words,
)

SIDES: Final = {"v": 1, "u": 2}
"""Index of a side's width in a `Group`."""


class UnpackedFactors(NamedTuple):
    """`delta = u @ diag(s) @ v`, float32: u (h_out, rank), s (rank,), v (rank, h_in).

    `bias` is the optional bias delta, (h_out,).
    """

    u: Tensor
    s: Tensor
    v: Tensor
    bias: Tensor | None = None


@cache
def _byte_table(plane: int, shift: int, device: torch.device) -> Tensor:
    """(256, 8 // plane) float32: the codes that each byte of a plane holds, times `2**shift`."""
    lanes = torch.arange(0, 8, plane)
    codes: Tensor = (torch.arange(256)[:, None] >> lanes) & (2**plane - 1)
    return (codes << shift).float().to(device)


def unpack_codes(words: Tensor, count: int, columns: int, bits: int) -> Tensor:
    """Unpack a segment's int32 words to (count, columns) float32 codes, one lookup per byte."""
    per_plane = []
    position, shift = 0, bits
    for plane in planes(bits):
        shift -= plane
        size = count * plane_words(columns, plane)
        block = words[position : position + size].view(torch.uint8)  # little endian, as in the file
        values = F.embedding(block.int(), _byte_table(plane, shift, words.device))
        per_plane.append(values.view(count, -1)[:, :columns])
        position += size
    total, *lower = per_plane
    for values in lower:
        total += values
    return total


def codes(delta: PackedDelta, name: str) -> Tensor:
    """The codes of a side, `v` (rank, h_in) or `u` (rank, h_out), float32."""
    words, side = delta.integers(name), SIDES[name]
    columns = delta.h_in if name == "v" else delta.h_out
    values = words.new_empty(delta.rank, columns, dtype=torch.float32)
    rank = word = 0
    for group in delta.groups:
        count, bits = group.ranks, group[side]
        values[rank : rank + count] = unpack_codes(words[word:], count, columns, bits)
        rank += count
        word += segment_words(count, columns, bits)
    return values


def zero_points(delta: PackedDelta, name: str) -> Tensor:
    """The zero points of a side, `value = code - zero`, (rank,) float32."""
    midpoint = midpoints(delta.groups, SIDES[name]).to(delta.words.device)
    offset = delta.floats(f"{name}_offset")
    return midpoint if offset is None else midpoint + offset


def _unpack_side(delta: PackedDelta, name: str) -> Tensor:
    """The values of a side without scales, (rank, columns) float32."""
    return codes(delta, name).sub_(zero_points(delta, name)[:, None])


def unpack_v(delta: PackedDelta) -> Tensor:
    """V (rank, h_in) float32, multiplied by the column scale."""
    v = _unpack_side(delta, "v")
    column_scale = delta.floats("column_scale")
    return v if column_scale is None else v.mul_(column_scale)


def unpack(delta: PackedDelta) -> UnpackedFactors:
    """The float32 factors of a delta, on its device, with row and column scales folded in."""
    u = _unpack_side(delta, "u")
    if (row_scale := delta.floats("row_scale")) is not None:
        u *= row_scale
    return UnpackedFactors(u.T, delta.s, unpack_v(delta), delta.floats("bias"))


def dense(delta: PackedDelta) -> Tensor:
    """The weight delta, (h_out, h_in) float32."""
    u, s, v, _ = unpack(delta)
    return (u * s) @ v


def rows_of_u(delta: PackedDelta, rows: Tensor) -> Tensor:
    """Rows `rows` (n,) int64 of U, (n, rank) float32, multiplied by the row scale.

    U's vectors are packed along h_out, so each code and plane reads one word of its vector.
    """
    words = delta.integers("u")
    values = words.new_empty(delta.rank, len(rows), dtype=torch.float32)
    rank = word = 0
    for group in delta.groups:
        count, shift, position = group.ranks, group.u_bits, word
        group_codes = words.new_zeros(count, len(rows))
        for plane in planes(group.u_bits):
            shift -= plane
            size = plane_words(delta.h_out, plane)
            block = words[position : position + count * size].view(count, size)
            bit = rows * plane
            group_codes |= ((block[:, bit // 32] >> (bit % 32)) & (2**plane - 1)) << shift
            position += count * size
        values[rank : rank + count] = group_codes
        rank += count
        word += segment_words(count, delta.h_out, group.u_bits)
    u = values.sub_(zero_points(delta, "u")[:, None]).T
    row_scale = delta.floats("row_scale")
    return u if row_scale is None else u * row_scale[rows, None]


def svd_delta(
    y: Tensor, x: Tensor, factors: Mapping[int, UnpackedFactors], by_slot: Mapping[int, Tensor]
) -> None:
    """Add `((x @ v.T) * s) @ u.T + bias` to each slot's rows in place, in the factors' dtype.

    Args:
        y: (rows, h_out), any float dtype.
        x: (rows, h_in), any float dtype.
        factors: by slot; rows of other slots are not modified.
        by_slot: row numbers of each slot, int64.
    """
    for slot, rows in by_slot.items():
        if slot in factors:
            u, s, v, bias = factors[slot]
            delta = ((x[rows].to(v.dtype) @ v.T) * s) @ u.T
            if bias is not None:
                delta += bias
            y[rows] = (y[rows].to(delta.dtype) + delta).to(y.dtype)
