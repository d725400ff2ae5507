"""Plain matrix products with unpacked factors: on a GPU, for prefill; and an embedding's rows."""

from collections.abc import Mapping
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from deltadock.kernels.cache import TensorCache
from deltadock.kernels.svd_delta import reference
from deltadock.kernels.svd_delta.layout import PackedDelta
from deltadock.kernels.svd_delta.table import DeltaTable

Rows = slice | Tensor
"""Row numbers of a step: neighbours, or int64 of any."""


class Products(NamedTuple):
    """`delta = u @ v`: (h_out, rank), (rank, h_in); beside it the bias's difference, float32."""

    u: Tensor
    v: Tensor
    bias: Tensor | None

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return sum(tensor.nbytes for tensor in self if tensor is not None)


def unpack_products(delta: PackedDelta, dtype: torch.dtype) -> Products:
    """Both factors in `dtype`, the scales within them.

    In a 16-bit type the rows of v are at most 1, so that nothing overflows, and u has the rest.
    """
    u, s, v, bias = reference.unpack(delta)
    if dtype == torch.float32:
        return Products(u, v.mul_(s[:, None]), bias)
    largest = v.abs().amax(dim=1).clamp_min(torch.finfo(torch.float32).tiny)
    return Products((u * (s * largest)).to(dtype), (v / largest[:, None]).to(dtype), bias)


def add_products(
    y: Tensor, x: Tensor, table: DeltaTable, rows: Mapping[int, Rows], cache: TensorCache
) -> None:
    """Add the deltas of the slots in `rows`, to the rows named there.

    `y` and `x` are as in `kernels.svd_delta.svd_delta`, and the factors are of their type.
    """
    for slot, members in rows.items():
        if slot not in table.deltas:
            continue
        inputs = x[members]
        end = 0
        for delta, h_out in zip(table.deltas[slot], table.h_outs, strict=True):
            begin, end = end, end + h_out
            if delta is not None:
                factors = cache.get(delta, partial(unpack_products, delta, x.dtype))
                _add(y, members, slice(begin, end), inputs, factors)


def _add(y: Tensor, rows: Rows, columns: slice, x: Tensor, factors: Products) -> None:
    u, v, bias = factors
    out = y[rows, columns].addmm_(x @ v.T, u.T)
    if bias is not None:
        out += bias
    if not isinstance(rows, slice):  # otherwise `out` is a view
        y[rows, columns] = out


def add_rows(y: Tensor, rows: Tensor, delta: PackedDelta, cache: TensorCache) -> None:
    """Add row `rows[i]` of a delta to `y[i]`, in place: what it does to an embedding.

    Only these rows of U are unpacked, and V, which the cache keeps under `("v", delta)`.

    Args:
        y: (n, h_in), any float type.
        rows: (n,) int64, from 0 to h_out - 1.
        delta: on the device of `y`.
        cache: where V is kept.
    """
    v = cache.get(("v", delta), lambda: reference.unpack_v(delta))
    y += (reference.rows_of_u(delta, rows) * delta.s) @ v
