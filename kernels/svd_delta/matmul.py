"""Matrix products with cached, unpacked factors: prefill on a GPU, and embedding lookups."""

from collections.abc import Hashable, Mapping
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from deltadock.kernels.cache import TensorCache
from deltadock.kernels.svd_delta import reference
from deltadock.kernels.svd_delta.chunks import RowIndex
from deltadock.kernels.svd_delta.layout import DeltaTable, PackedDelta


class FactorPair(NamedTuple):
    """`delta = u @ v`: u (h_out, rank), v (rank, h_in); `bias`, (h_out,) float32, is optional."""

    u: Tensor
    v: Tensor
    bias: Tensor | None

    @property
    def nbytes(self) -> int:
        """Bytes of memory."""
        return sum(tensor.nbytes for tensor in self if tensor is not None)


def unpack_pair(delta: PackedDelta, dtype: torch.dtype) -> FactorPair:
    """Unpack both factors to `dtype`, with all scales folded in.

    For a 16-bit dtype, rows of v are normalized to a maximum magnitude of 1 and u takes the rest
    of the scale, so that neither overflows.
    """
    u, s, v, bias = reference.unpack(delta)
    if dtype == torch.float32:
        return FactorPair(u, v.mul_(s[:, None]), bias)
    largest = v.abs().amax(dim=1).clamp_min(torch.finfo(torch.float32).tiny)
    return FactorPair((u * (s * largest)).to(dtype), (v / largest[:, None]).to(dtype), bias)


def add_products(
    y: Tensor, x: Tensor, table: DeltaTable, rows: Mapping[int, RowIndex], cache: TensorCache
) -> None:
    """Add the deltas of the slots in `rows` to those rows of `y`, in place.

    Args:
        y, x: as for `svd_delta`; the factors are unpacked to their dtype.
        table: the linears' deltas.
        rows: rows of each slot; empty slots are skipped.
        cache: cache for the unpacked factors.
    """
    for slot, index in rows.items():
        if slot not in table.deltas:
            continue
        inputs = x[index]
        end = 0
        for delta, h_out in zip(table.deltas[slot], table.h_outs, strict=True):
            begin, end = end, end + h_out
            if delta is not None:
                factors = cache.get(delta, partial(unpack_pair, delta, x.dtype))
                _add_product(y, index, slice(begin, end), inputs, factors)


def _add_product(y: Tensor, rows: RowIndex, columns: slice, x: Tensor, factors: FactorPair) -> None:
    u, v, bias = factors
    out = y[rows, columns].addmm_(x @ v.T, u.T)
    if bias is not None:
        out += bias
    if not isinstance(rows, slice):  # with a slice `out` is a view of y
        y[rows, columns] = out


def add_rows(y: Tensor, rows: Tensor, delta: PackedDelta, cache: TensorCache) -> None:
    """Add row `rows[i]` of a delta to `y[i]` in place: the delta of an embedding lookup.

    Only these rows of U are unpacked. V is cached under `("v", delta)`.

    Args:
        y: (n, h_in), any float dtype.
        rows: (n,) int64, from 0 to h_out - 1.
        delta: on the device of `y`.
        cache: cache for V.
    """
    v = cache.get(("v", delta), lambda: reference.unpack_v(delta))
    y += (reference.rows_of_u(delta, rows) * delta.s) @ v


def discard_rows(delta: Hashable, cache: TensorCache) -> None:
    """Discard what is cached of an embedding's delta, in whatever form."""
    cache.discard(("v", delta))
    cache.discard(delta)
