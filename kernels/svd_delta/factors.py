"""Unpacked factors: the delta without a GPU, and on one for a slot with many rows."""

from collections import OrderedDict
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from kernels.svd_delta import reference
from kernels.svd_delta.layout import PackedDelta
from kernels.svd_delta.reference import Factors
from kernels.svd_delta.table import DeltaTable


class FactorCache:
    """Unpacked factors of the deltas used last, within a limit; one serves all linears."""

    def __init__(self, limit_bytes: int) -> None:
        self._limit_bytes = limit_bytes
        self._factors: OrderedDict[PackedDelta, Factors] = OrderedDict()
        self.nbytes = 0
        """Bytes held, at most the limit."""

    def get(self, delta: PackedDelta, dtype: torch.dtype = torch.float32) -> Factors:
        """The factors of a delta; one too large for the cache is unpacked at every call.

        Other types than float32 fit a GPU's matrix products: see `lowered`. A delta is always
        asked for in one type.
        """
        if delta in self._factors:
            self._factors.move_to_end(delta)
            return self._factors[delta]
        factors = reference.unpack(delta)
        if dtype != torch.float32:
            factors = lowered(factors, dtype)
        size = _nbytes(factors)
        if size > self._limit_bytes:
            return factors
        while self.nbytes + size > self._limit_bytes:
            self.discard(next(iter(self._factors)))
        self._factors[delta] = factors
        self.nbytes += size
        return factors

    def discard(self, delta: PackedDelta) -> None:
        """Forget a delta's factors, if they are held."""
        factors = self._factors.pop(delta, None)
        if factors is not None:
            self.nbytes -= _nbytes(factors)


def _nbytes(factors: Factors) -> int:
    return sum(tensor.nbytes for tensor in factors if tensor is not None)


def lowered(factors: Factors, dtype: torch.dtype) -> Factors:
    """The factors in a 16-bit type: rows of v at most 1, what is left of the scales in u."""
    u, s, v, bias = factors
    largest = v.abs().amax(dim=1).clamp_min(torch.finfo(torch.float32).tiny)
    scaled = (v / largest[:, None]).to(dtype)
    return Factors((u * (s * largest)).to(dtype), torch.ones_like(s, dtype=dtype), scaled, bias)


def add_products(
    y: Tensor, x: Tensor, table: DeltaTable, rows: Mapping[int, Tensor], cache: FactorCache
) -> None:
    """Add the deltas of the slots in `rows`, to the rows named there, by plain matrix products.

    `y` and `x` are as in `kernels.svd_delta.svd_delta`; float32 factors on the CPU, `x.dtype` on a
    GPU.
    """
    dtype = x.dtype if x.is_cuda else torch.float32
    end = 0
    for linear, h_out in enumerate(table.h_outs):
        begin, end = end, end + h_out
        reference.svd_delta(y[:, begin:end], x, _found(table, linear, rows, cache, dtype), rows)


def _found(
    table: DeltaTable, linear: int, slots: Iterable[int], cache: FactorCache, dtype: torch.dtype
) -> dict[int, Factors]:
    return {
        slot: cache.get(delta, dtype)
        for slot in slots
        if slot in table.deltas and (delta := table.deltas[slot][linear]) is not None
    }
