"""Which rows of a pass belong to which delta slot, and the interface of per-row delta modules."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from torch import Tensor, nn

from deltadock.inference.model.weight_deltas import WeightDelta
from deltadock.kernels.cache import TensorCache
from deltadock.kernels.svd_delta import Chunks

DENSE_ROWS: Final = 128
"""Rows of one delta in a pass from which on a GPU multiplies by its unpacked factors. By
`benchmarks.kernel_model` that is faster from 64 to 128 rows on; no CUDA graph can hold it, so that
a batch of decoding sequences should stay below."""


@dataclass(frozen=True, slots=True)
class DeltaLimits:
    """Sizes that the modules allocate for."""

    slots: int = 9
    """Delta slots, slot 0 (the bare base) included."""
    rows: int = 512
    """Rows of the largest pass."""
    cache_bytes: int = 1 << 30
    """Cache for unpacked tensors: on the CPU all that are used, on a GPU those that its kernels
    cannot read packed."""


DEFAULT_LIMITS: Final = DeltaLimits()


class Routing:
    """The current pass's rows by delta slot; shared by all modules of a model."""

    def __init__(self, limits: DeltaLimits) -> None:
        self.limits = limits
        self.cache = TensorCache(limits.cache_bytes)
        self.chunks: Chunks
        """Set once all delta tables exist."""
        self.merged_slot: int | None = None
        """The slot that also has merged weights."""
        self.merged = False
        """Whether all rows of the pass belong to that slot, so that the merged weights are used."""
        self._row_slots: list[int] | None = None
        """What the chunks are laid out for."""

    def assign(self, row_slots: Sequence[int]) -> None:
        """Lay out a pass in which row i belongs to slot `row_slots[i]`.

        If the last pass had the same rows, as of a batch that goes on decoding, they are already.
        """
        if self._row_slots != list(row_slots):
            self._row_slots = None
            self.chunks.assign(row_slots)
            self._row_slots = list(row_slots)
        merged = self.merged_slot
        self.merged = merged is not None and set(row_slots) == {merged}

    @property
    def row_slots(self) -> Tensor:
        """(rows,) int32, the slot of each row; a view of a static buffer."""
        slots: Tensor = self.chunks.row_slots[: self.chunks.row_count]
        return slots


class DeltaModule(nn.Module, ABC):
    """A module of the base model with the weight deltas of every slot."""

    def __init__(self, routing: Routing) -> None:
        super().__init__()
        self.routing = routing

    @abstractmethod
    def install(self, slot: int, deltas: Mapping[str, WeightDelta]) -> bool:
        """Apply `deltas`, by parameter name, to the rows of `slot`.

        Returns:
            Whether these rows are computed slot by slot, which a CUDA graph cannot hold.
        """

    @abstractmethod
    def remove(self, slot: int) -> None:
        """Remove the deltas of `slot`, if it has any."""
