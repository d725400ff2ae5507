"""The delta without a GPU: unpacked factors, kept as long as they fit."""

from collections import OrderedDict

from torch import Tensor

from kernels.svd_delta import reference
from kernels.svd_delta.chunks import Chunks
from kernels.svd_delta.layout import DeltaTable, PackedDelta
from kernels.svd_delta.reference import Factors


class FactorCache:
    """Unpacked factors of the deltas used last, within a limit; one serves all linears."""

    def __init__(self, limit_bytes: int) -> None:
        self._limit_bytes = limit_bytes
        self._factors: OrderedDict[PackedDelta, Factors] = OrderedDict()
        self.nbytes = 0
        """Bytes held, at most the limit."""

    def get(self, delta: PackedDelta) -> Factors:
        """The factors of a delta; one too large for the cache is unpacked at every call."""
        if delta in self._factors:
            self._factors.move_to_end(delta)
            return self._factors[delta]
        factors = reference.unpack(delta)
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
    return sum(tensor.nbytes for tensor in factors)


def svd_delta(y: Tensor, x: Tensor, table: DeltaTable, chunks: Chunks, cache: FactorCache) -> None:
    """Add each row's delta to `y` in place; see `kernels.svd_delta.svd_delta`."""
    used = {slot: table.deltas[slot] for slot in chunks.by_slot if slot in table.deltas}
    factors = {slot: cache.get(delta) for slot, delta in used.items()}
    reference.svd_delta(y, x, factors, chunks.by_slot)
