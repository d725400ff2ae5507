"""The modules that give each row of a batch its own delta's weights.

A pass runs over packed rows `(1, rows, ...)`, sorted by delta slot, so that a slot's rows are one
contiguous range. Slot 0 is the bare base: its rows belong to no group and cost nothing extra.
"""

import copy
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class LowRank(NamedTuple):
    """A weight difference `u @ v`; the singular values are folded into `v`."""

    u: Tensor
    """(h_out, rank)"""
    v: Tensor
    """(rank, h_in)"""


Change = LowRank | Tensor
"""What a delta does to one tensor: adds a low-rank difference, or replaces it."""


class Group(NamedTuple):
    """The rows `[begin, end)` belong to delta slot `slot`."""

    slot: int
    begin: int
    end: int


class Routing:
    """Which rows of the pass at hand belong to which slot; shared by all modules of a model."""

    def __init__(self) -> None:
        self.groups: list[Group] = []


class DeltaModule(nn.Module, ABC):
    """A module of the base model together with what each delta slot changes in it."""

    @abstractmethod
    def install(self, slot: int, changes: Mapping[str, Change]) -> None:
        """Let the rows of `slot` use `changes`, by parameter name ("weight", "bias")."""

    @abstractmethod
    def remove(self, slot: int) -> None:
        """Forget the changes of `slot`, if there are any."""


class _LinearDelta(NamedTuple):
    weight: Change | None
    bias: Tensor | None
    """The bias itself where the weight is replaced, otherwise its difference from the base's."""


class DeltaLinear(DeltaModule):
    """A linear layer: one product with the base weight for all rows, then each slot's part."""

    def __init__(self, linear: nn.Linear, routing: Routing) -> None:
        super().__init__()
        self.weight = linear.weight
        self.bias = linear.bias
        self.routing = routing
        self._deltas: dict[int, _LinearDelta] = {}

    def install(self, slot: int, changes: Mapping[str, Change]) -> None:
        weight, bias = changes.get("weight"), changes.get("bias")
        if isinstance(bias, LowRank):
            raise TypeError("A bias has no low-rank form.")
        if isinstance(weight, Tensor):
            bias = self.bias if bias is None else bias
        elif bias is not None:
            bias = bias - self.bias
        self._deltas[slot] = _LinearDelta(weight, bias)

    def remove(self, slot: int) -> None:
        self._deltas.pop(slot, None)

    def forward(self, x: Tensor) -> Tensor:
        """(1, rows, h_in) to (1, rows, h_out)."""
        y = F.linear(x, self.weight, self.bias)
        for slot, begin, end in self.routing.groups:
            delta = self._deltas.get(slot)
            if delta is None:
                continue
            rows = y[0, begin:end]
            if isinstance(delta.weight, Tensor):
                rows.copy_(F.linear(x[0, begin:end], delta.weight, delta.bias))
                continue
            if delta.weight is not None:
                u, v = delta.weight
                rows.addmm_(F.linear(x[0, begin:end], v), u.T)
            if delta.bias is not None:
                rows.add_(delta.bias)
        return y


class DeltaEmbedding(DeltaModule):
    """An embedding table: rows of a slot look their tokens up in that slot's table."""

    def __init__(self, embedding: nn.Embedding, routing: Routing) -> None:
        super().__init__()
        self.weight = embedding.weight
        self.routing = routing
        self._deltas: dict[int, Change] = {}

    def install(self, slot: int, changes: Mapping[str, Change]) -> None:
        self._deltas[slot] = changes["weight"]

    def remove(self, slot: int) -> None:
        self._deltas.pop(slot, None)

    def forward(self, tokens: Tensor) -> Tensor:
        """(1, rows) int64 to (1, rows, hidden)."""
        y = F.embedding(tokens, self.weight)
        for slot, begin, end in self.routing.groups:
            change = self._deltas.get(slot)
            if change is None:
                continue
            ids, rows = tokens[0, begin:end], y[0, begin:end]
            if isinstance(change, Tensor):
                rows.copy_(F.embedding(ids, change))
            else:
                rows.addmm_(F.embedding(ids, change.u), change.v)
        return y


class DeltaNorm(DeltaModule):
    """A normalisation of any family: a slot that changes its weight has a copy of the module."""

    def __init__(self, norm: nn.Module, routing: Routing) -> None:
        super().__init__()
        self.norm = norm
        self.routing = routing
        self._deltas: dict[int, nn.Module] = {}

    def install(self, slot: int, changes: Mapping[str, Change]) -> None:
        norm = copy.deepcopy(self.norm)
        for name, change in changes.items():
            if isinstance(change, LowRank):
                raise TypeError("A normalisation's weight has no low-rank form.")
            setattr(norm, name, nn.Parameter(change, requires_grad=False))
        self._deltas[slot] = norm

    def remove(self, slot: int) -> None:
        self._deltas.pop(slot, None)

    def forward(self, x: Tensor) -> Tensor:
        """(1, rows, ...) to the same shape."""
        y: Tensor = self.norm(x)
        for slot, begin, end in self.routing.groups:
            norm = self._deltas.get(slot)
            if norm is not None:
                y[:, begin:end] = norm(x[:, begin:end])
        return y


def delta_module(module: nn.Module, routing: Routing) -> DeltaModule | None:
    """The per-row form of a module that has parameters of its own; None for any unknown kind."""
    if isinstance(module, nn.Linear):
        return DeltaLinear(module, routing)
    if isinstance(module, nn.Embedding):
        return DeltaEmbedding(module, routing)
    parameters = dict(module.named_parameters(recurse=False))
    if parameters.keys() == {"weight"} and parameters["weight"].ndim == 1:
        return DeltaNorm(module, routing)
    return None


def to_groups(slots: list[int]) -> list[Group]:
    """The groups of rows whose slots, sorted, are `slots`; rows of slot 0 are in none."""
    groups: list[Group] = []
    for row, slot in enumerate(slots):
        if slot == 0:
            continue
        if groups and groups[-1].slot == slot:
            groups[-1] = groups[-1]._replace(end=row + 1)
        else:
            groups.append(Group(slot, row, row + 1))
    return groups


def low_rank(u: Tensor, s: Tensor, v: Tensor) -> LowRank:
    """Fold the singular values into V: (h_out, r), (r,), (r, h_in)."""
    return LowRank(u.contiguous(), torch.mul(v, s[:, None]).contiguous())
