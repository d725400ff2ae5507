"""The truth: decode a packed delta and add its product to each row, in plain PyTorch."""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from kernels.svd_delta.layout import PackedDelta, centres, plane_words, planes, segment_words


class Factors(NamedTuple):
    """`delta = u @ diag(s) @ v`, float32: u (h_out, rank), s (rank,), v (rank, h_in).

    Beside it the difference of the bias, (h_out,), if there is one.
    """

    u: Tensor
    s: Tensor
    v: Tensor
    bias: Tensor | None = None


def unpack_codes(words: Tensor, count: int, columns: int, bits: int) -> Tensor:
    """The (count, columns) codes, uint8, of a segment's int32 words."""
    codes = torch.zeros(count, columns, dtype=torch.uint8, device=words.device)
    position, shift = 0, bits
    for plane in planes(bits):
        shift -= plane
        size = plane_words(columns, plane)
        block = words[position : position + count * size].reshape(count, size, 1)
        lanes = torch.arange(0, 32, plane, dtype=torch.int32, device=words.device)
        values = (block >> lanes) & (2**plane - 1)
        codes |= values.reshape(count, -1)[:, :columns].to(torch.uint8) << shift
        position += count * size
    return codes


def unpack(delta: PackedDelta) -> Factors:
    """The float32 factors of a packed delta, on its device, row and column scales in u and v."""
    sides = []
    for name, columns, side in (("v", delta.h_in, 1), ("u", delta.h_out, 2)):
        words = delta.integers(name)
        values = words.new_empty(delta.rank, columns, dtype=torch.float32)
        rank = word = 0
        for group in delta.groups:
            count, bits = group.ranks, group[side]
            values[rank : rank + count] = unpack_codes(words[word:], count, columns, bits)
            rank += count
            word += segment_words(count, columns, bits)
        zero = centres(delta.groups, side).to(words.device)
        if (offset := delta.numbers(f"{name}_offset")) is not None:
            zero += offset
        sides.append(values.sub_(zero[:, None]))
    v, u = sides
    if (row_scale := delta.numbers("row_scale")) is not None:
        u *= row_scale
    if (column_scale := delta.numbers("column_scale")) is not None:
        v *= column_scale
    s = delta.integers("s").view(torch.float32)
    return Factors(u.T, s, v, delta.numbers("bias"))


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
