"""Embeddings and norms whose rows each have their own delta's weights."""

import copy
from collections.abc import Mapping
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deltadock.inference.model.routing import DeltaModule, Routing
from deltadock.inference.model.weight_deltas import EncodedDelta, LowRank, RowsDelta, WeightDelta
from deltadock.kernels.svd_delta import PackedDelta, add_rows


class DeltaEmbedding(DeltaModule):
    """An embedding table: rows of a slot look their tokens up in that slot's table, too.

    It is no part of a CUDA graph.
    """

    def __init__(self, embedding: nn.Embedding, routing: Routing) -> None:
        super().__init__(routing)
        self.weight = embedding.weight
        self._deltas: dict[int, WeightDelta] = {}

    def install(self, slot: int, changes: Mapping[str, WeightDelta]) -> bool:
        self._deltas[slot] = changes["weight"]
        return False

    def remove(self, slot: int) -> None:
        change = self._deltas.pop(slot, None)
        self.routing.cache.discard(("v", change))
        self.routing.cache.discard(change)

    def forward(self, tokens: Tensor) -> Tensor:
        """(1, rows) int64 to (1, rows, hidden)."""
        y = F.embedding(tokens, self.weight)
        if self._deltas:
            for slot, rows in self.routing.chunks.by_slot.items():
                if slot in self._deltas:
                    y[0, rows] = self._changed(y[0, rows], tokens[0, rows], self._deltas[slot])
        return y

    def _changed(self, y: Tensor, tokens: Tensor, change: WeightDelta) -> Tensor:
        if isinstance(change, PackedDelta):
            add_rows(y, tokens, change, self.routing.cache)
            return y
        if isinstance(change, LowRank):
            return torch.addmm(y, F.embedding(tokens, change.u), change.v)
        if isinstance(change, RowsDelta):
            return y + change.rows(tokens).to(y.dtype)
        if isinstance(change, EncodedDelta):
            return y + F.embedding(tokens, self.dense(change, y.dtype))
        return F.embedding(tokens, change)


class DeltaNorm(DeltaModule):
    """A normalisation that multiplies by its weight: each row by that of its slot."""

    def __init__(self, norm: nn.Module, routing: Routing) -> None:
        super().__init__(routing)
        self._norm = norm
        self.weight: Tensor = norm.weight.data  # type: ignore[assignment]
        self._changed: set[int] = set()
        self._weights: Tensor | None = None
        """(slots, width), once there is a change; always on a GPU, for the graphs' sake."""
        self._by_row = copy.deepcopy(norm)
        del self._by_row.weight
        if self.weight.is_cuda:
            self._weights = self._make_weights()

    def _make_weights(self) -> Tensor:
        return self.weight.repeat(self.routing.limits.slots, 1)

    def install(self, slot: int, changes: Mapping[str, WeightDelta]) -> bool:
        weight = changes["weight"]
        assert isinstance(weight, Tensor)
        if self._weights is None:
            self._weights = self._make_weights()
        self._weights[slot] = weight
        self._changed.add(slot)
        return False

    def remove(self, slot: int) -> None:
        if slot in self._changed:
            assert self._weights is not None
            self._weights[slot] = self.weight
            self._changed.remove(slot)

    def forward(self, x: Tensor) -> Tensor:
        """(1, rows, ..., width) to the same shape."""
        if self._weights is None or not (self._changed or x.is_cuda):
            y: Tensor = self._norm(x)
            return y
        own = self._weights[self.routing.row_slots]
        self._by_row.weight = own.view(1, len(own), *[1] * (x.ndim - 3), -1)
        return cast("Tensor", self._by_row(x))
