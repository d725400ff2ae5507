"""Which rows of a pass belong to which delta, and what every module that knows deltas can do."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor, nn

from deltadock.inference.model.weight_deltas import EncodedDelta, RowsDelta, WeightDelta
from deltadock.kernels.cache import TensorCache
from deltadock.kernels.svd_delta import Chunks

DENSE_ROWS: Final = 256
"""Rows of one delta in a pass from which on a GPU multiplies with its unpacked factors."""


@dataclass(frozen=True, slots=True)
class DeltaLimits:
    """What the modules make room for."""

    slots: int = 9
    """The bare base's included."""
    rows: int = 512
    """Of the largest pass."""
    cache_bytes: int = 1 << 30
    """For what is unpacked: on the CPU all that is used, on a GPU what its kernels do not read."""


DEFAULT_LIMITS: Final = DeltaLimits()


class Routing:
    """Which rows of the pass at hand belong to which slot; shared by all modules of a model."""

    def __init__(self, limits: DeltaLimits) -> None:
        self.limits = limits
        self.cache = TensorCache(limits.cache_bytes)
        self.chunks: Chunks
        """Made once all tables are known."""
        self.merged_slot: int | None = None
        """The slot that has merged weights, too."""
        self.merged = False
        """Whether all rows of the pass are of that slot, so that they use these."""

    def assign(self, row_slots: Sequence[int]) -> None:
        """Lay out a pass in which row i belongs to slot `row_slots[i]`."""
        self.chunks.assign(row_slots)
        merged = self.merged_slot
        self.merged = merged is not None and set(row_slots) == {merged}

    @property
    def row_slots(self) -> Tensor:
        """(rows,) int32, the slot of each row; a view of a static buffer."""
        found: Tensor = self.chunks.row_slots[: self.chunks.row_count]
        return found


class DeltaModule(nn.Module, ABC):
    """A module of the base model together with what each delta slot changes in it."""

    def __init__(self, routing: Routing) -> None:
        super().__init__()
        self.routing = routing

    @abstractmethod
    def install(self, slot: int, changes: Mapping[str, WeightDelta]) -> bool:
        """Let the rows of `slot` use `changes`, by parameter name.

        Returns:
            Whether these rows need work slot by slot, which no CUDA graph can hold.
        """

    @abstractmethod
    def remove(self, slot: int) -> None:
        """Forget the changes of `slot`, if there are any."""

    def dense(self, change: EncodedDelta | RowsDelta, dtype: torch.dtype) -> Tensor:
        """A coded difference decoded, in the cache if there is room."""
        return self.routing.cache.get(change, lambda: change.dense().to(dtype))
