"""The truth: decode a packed delta and add its product to each row, in plain PyTorch."""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from kernels.svd_delta.layout import PackedDelta, plane_words, planes


class Factors(NamedTuple):
    """`delta = u @ diag(s) @ v`, float32: u (h_out, rank), s (rank,), v (rank, h_in)."""

    u: Tensor
    s: Tensor
    v: Tensor


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
    u = delta.words.new_empty(delta.rank, delta.h_out, dtype=torch.float32)
    v = delta.words.new_empty(delta.rank, delta.h_in, dtype=torch.float32)
    for group, (rank, v_word, u_word) in zip(delta.groups, delta.segments(), strict=True):
        ranks = slice(rank, rank + group.ranks)
        v[ranks] = unpack_codes(delta.words[v_word:], group.ranks, delta.h_in, group.v_bits)
        u[ranks] = unpack_codes(delta.words[u_word:], group.ranks, delta.h_out, group.u_bits)
    s, v_zero, u_zero = delta.scales
    v -= v_zero[:, None]
    u -= u_zero[:, None]
    if delta.row_scale is not None:
        u *= delta.row_scale
    if delta.column_scale is not None:
        v *= delta.column_scale
    return Factors(u.T, s, v)


def svd_delta(
    y: Tensor, x: Tensor, factors: Mapping[int, Factors], by_slot: Mapping[int, Tensor]
) -> None:
    """Add `((x @ v.T) * s) @ u.T` to the rows of each slot, in place, in the factors' precision.

    Args:
        y: (rows, h_out), any float type.
        x: (rows, h_in), any float type.
        factors: by slot; rows of a slot that is absent stay as they are.
        by_slot: the row numbers of each slot, int64.
    """
    for slot, rows in by_slot.items():
        if slot in factors:
            u, s, v = factors[slot]
            delta = ((x[rows].to(v.dtype) @ v.T) * s) @ u.T
            y[rows] = (y[rows].to(delta.dtype) + delta).to(y.dtype)
