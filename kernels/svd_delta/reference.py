"""The truth: decode a packed delta and add its product to each row, in plain PyTorch."""

from collections.abc import Mapping
from functools import cache
from typing import Final, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from deltadock.kernels.svd_delta.layout import (
    PackedDelta,
    centres,
    plane_words,
    planes,
    segment_words,
)

SIDES: Final = {"v": 1, "u": 2}
"""The place of a side's width in a `Group`."""


class Factors(NamedTuple):
    """`delta = u @ diag(s) @ v`, float32: u (h_out, rank), s (rank,), v (rank, h_in).

    Beside it the difference of the bias, (h_out,), if there is one.
    """

    u: Tensor
    s: Tensor
    v: Tensor
    bias: Tensor | None = None


@cache
def _byte_table(plane: int, shift: int, device: torch.device) -> Tensor:
    """(256, 8 // plane) float32: the codes of a plane in each byte, times `2**shift`."""
    lanes = torch.arange(0, 8, plane)
    codes: Tensor = (torch.arange(256)[:, None] >> lanes) & (2**plane - 1)
    return (codes << shift).float().to(device)


def unpack_codes(words: Tensor, count: int, columns: int, bits: int) -> Tensor:
    """The (count, columns) codes, float32, of a segment's int32 words: a look-up a byte."""
    found = []
    position, shift = 0, bits
    for plane in planes(bits):
        shift -= plane
        size = count * plane_words(columns, plane)
        block = words[position : position + size].view(torch.uint8)  # little endian, as files are
        values = F.embedding(block.int(), _byte_table(plane, shift, words.device))
        found.append(values.view(count, -1)[:, :columns])
        position += size
    first, *others = found
    for values in others:
        first += values
    return first


def codes(delta: PackedDelta, name: str) -> Tensor:
    """(rank, columns) float32, the codes of a side: `v`, along h_in, or `u`, along h_out."""
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


def zeros(delta: PackedDelta, name: str) -> Tensor:
    """(rank,) float32, what a side's codes are more than their values."""
    centre = centres(delta.groups, SIDES[name]).to(delta.words.device)
    offset = delta.numbers(f"{name}_offset")
    return centre if offset is None else centre + offset


def _unpack_side(delta: PackedDelta, name: str) -> Tensor:
    """(rank, columns) float32 of a side, without the scales."""
    return codes(delta, name).sub_(zeros(delta, name)[:, None])


def unpack_v(delta: PackedDelta) -> Tensor:
    """V (rank, h_in) float32, the column scale in it."""
    v = _unpack_side(delta, "v")
    column_scale = delta.numbers("column_scale")
    return v if column_scale is None else v.mul_(column_scale)


def unpack(delta: PackedDelta) -> Factors:
    """The float32 factors of a packed delta, on its device, row and column scales in u and v."""
    u = _unpack_side(delta, "u")
    if (row_scale := delta.numbers("row_scale")) is not None:
        u *= row_scale
    return Factors(u.T, delta.s, unpack_v(delta), delta.numbers("bias"))


def dense(delta: PackedDelta) -> Tensor:
    """The difference of the weight, (h_out, h_in) float32."""
    u, s, v, _ = unpack(delta)
    return (u * s) @ v


def rows_of_u(delta: PackedDelta, rows: Tensor) -> Tensor:
    """(n, rank) float32, the rows of U that `rows` (n,) int64 names, the row scale in them.

    It reads a word a code and plane, wherever the row lies: U's vectors run along h_out.
    """
    words = delta.integers("u")
    values = words.new_empty(delta.rank, len(rows), dtype=torch.float32)
    rank = word = 0
    for group in delta.groups:
        count, shift, position = group.ranks, group.u_bits, word
        found = words.new_zeros(count, len(rows))
        for plane in planes(group.u_bits):
            shift -= plane
            size = plane_words(delta.h_out, plane)
            block = words[position : position + count * size].view(count, size)
            at = rows * plane
            found |= ((block[:, at // 32] >> (at % 32)) & (2**plane - 1)) << shift
            position += count * size
        values[rank : rank + count] = found
        rank += count
        word += segment_words(count, delta.h_out, group.u_bits)
    u = values.sub_(zeros(delta, "u")[:, None]).T
    row_scale = delta.numbers("row_scale")
    return u if row_scale is None else u * row_scale[rows, None]


def svd_delta(
    y: Tensor, x: Tensor, factors: Mapping[int, Factors], by_slot: Mapping[int, Tensor]
) -> None:
    """Add `((x @ v.T) * s) @ u.T + bias` to each slot's rows, in place, in the factors' precision.

    Args:
        y: (rows, h_out), any float type.
        x: (rows, h_in), any float type.
        factors: by slot; rows of a slot that is absent stay as they are.
        by_slot: the row numbers of each slot, int64.
    """
    for slot, rows in by_slot.items():
        if slot in factors:
            u, s, v, bias = factors[slot]
            delta = ((x[rows].to(v.dtype) @ v.T) * s) @ u.T
            if bias is not None:
                delta += bias
            y[rows] = (y[rows].to(delta.dtype) + delta).to(y.dtype)
