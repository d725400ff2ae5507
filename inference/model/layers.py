"""The modules that give each row of a batch its own delta's weights.

A pass runs over packed rows `(1, rows, ...)`. Slot 0 is the bare base: its rows cost nothing
extra. What a delta changes in linears as packed factors, and in norms, is computed for all slots
at once on static buffers, so that a CUDA graph can hold it; other changes go slot by slot.
"""

import copy
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from inference.model.changes import Change, Coded, CodedRows, LowRank
from inference.model.product import BaseProduct
from kernels.cache import TensorCache
from kernels.svd_delta import Chunks, DeltaTable, PackedDelta, add_rows, svd_delta

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
    def install(self, slot: int, changes: Mapping[str, Change]) -> bool:
        """Let the rows of `slot` use `changes`, by parameter name.

        Returns:
            Whether these rows need work slot by slot, which no CUDA graph can hold.
        """

    @abstractmethod
    def remove(self, slot: int) -> None:
        """Forget the changes of `slot`, if there are any."""

    def dense(self, change: Coded | CodedRows, dtype: torch.dtype) -> Tensor:
        """A coded difference decoded, in the cache if there is room."""
        return self.routing.cache.get(change, lambda: change.dense().to(dtype))


class _Exception(NamedTuple):
    """A change of one linear that is no packed delta."""

    weight: Change | None
    bias: Tensor | None
    """The bias itself where the weight is replaced, otherwise its difference from the base's."""


class DeltaLinears(DeltaModule):
    """Linear layers that share their input: one product with the base's weights for all rows,
    then the deltas of all slots."""

    def __init__(
        self, linears: Mapping[str, nn.Linear], routing: Routing, *, tied: bool = False
    ) -> None:
        """Take over the linears, whose parameters become one product's.

        All have a bias, or none has. The weight of one that is `tied` is an embedding, too.
        """
        super().__init__(routing)
        self._names = tuple(linears)
        self._base = BaseProduct(list(linears.values()), keep=tied)
        self._h_outs, h_in = self._base.h_outs, self._base.h_in
        self.table = DeltaTable(
            routing.limits.slots,
            h_in,
            self._h_outs,
            max_rank=sum(min(h_out, h_in) for h_out in self._h_outs),
            device=self._base.device,
        )
        self._exceptions: dict[int, list[_Exception | None]] = {}
        self._input: Tensor | None = None
        self._outputs: tuple[Tensor, ...] = ()

    def install(self, slot: int, changes: Mapping[str, Change]) -> bool:
        """Packed weights go into the table, with their biases in them; see `BaseModel.prepare`."""
        packed: list[PackedDelta | None] = []
        exceptions: list[_Exception | None] = []
        for name in self._names:
            weight, bias = changes.get(f"{name}.weight"), changes.get(f"{name}.bias")
            assert bias is None or isinstance(bias, Tensor)
            packed.append(weight if isinstance(weight, PackedDelta) else None)
            other = None if isinstance(weight, PackedDelta) else weight
            exceptions.append(None if other is bias is None else _Exception(other, bias))
        if any(packed):
            self.table.install(slot, *packed)
        if any(exceptions):
            self._exceptions[slot] = exceptions
        return any(exceptions)

    def remove(self, slot: int) -> None:
        for key in (deltas := self.table.deltas.get(slot, ())), *deltas:
            self.routing.cache.discard(key)
        self.table.remove(slot)
        for exception in self._exceptions.pop(slot, ()):
            if exception is not None:
                self.routing.cache.discard(exception.weight)

    def forward(self, x: Tensor) -> Tensor:
        """(1, rows, h_in) to (1, rows, h_out), the linears' outputs side by side."""
        y = self._base(x)
        chunks = self.routing.chunks
        if x.is_cuda or (
            self.table.deltas and chunks.by_slot
        ):  # a graph must hold what is installed later, too
            svd_delta(y[0], x[0], self.table, chunks, self.routing.cache)
        if self._exceptions:
            for slot, rows in chunks.by_slot.items():
                begin = 0
                for exception, h_out in zip(
                    self._exceptions.get(slot, ()), self._h_outs, strict=False
                ):
                    part = (0, rows, slice(begin, begin + h_out))
                    if exception is not None:
                        y[part] = self._changed(y[part], x[0, rows], exception)
                    begin += h_out
        return y

    def _changed(self, y: Tensor, x: Tensor, exception: _Exception) -> Tensor:
        weight, bias = exception
        if isinstance(weight, Tensor):
            return F.linear(x, weight, bias)
        if isinstance(weight, LowRank):
            y = torch.addmm(y, F.linear(x, weight.v), weight.u.T)
        elif isinstance(weight, Coded | CodedRows):
            y = torch.addmm(y, x, self.dense(weight, x.dtype).T)
        return y if bias is None else y + bias

    def output(self, x: Tensor, number: int) -> Tensor:
        """One linear's outputs; the first linear that sees an input computes all."""
        if self._input is not x:
            self._input, self._outputs = x, self(x).split(self._h_outs, dim=-1)
        found = self._outputs[number]
        if number == len(self._h_outs) - 1:
            self._input, self._outputs = None, ()
        return found


class Output(nn.Module):
    """One of the linears of a DeltaLinears, in its place in the model."""

    def __init__(self, linears: DeltaLinears, number: int) -> None:
        super().__init__()
        self._linears, self._number = linears, number

    def forward(self, x: Tensor) -> Tensor:
        """(1, rows, h_in) to (1, rows, h_out)."""
        return self._linears.output(x, self._number)


class DeltaEmbedding(DeltaModule):
    """An embedding table: rows of a slot look their tokens up in that slot's table, too.

    It is no part of a CUDA graph.
    """

    def __init__(self, embedding: nn.Embedding, routing: Routing) -> None:
        super().__init__(routing)
        self.weight = embedding.weight
        self._deltas: dict[int, Change] = {}

    def install(self, slot: int, changes: Mapping[str, Change]) -> bool:
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

    def _changed(self, y: Tensor, tokens: Tensor, change: Change) -> Tensor:
        if isinstance(change, PackedDelta):
            add_rows(y, tokens, change, self.routing.cache)
            return y
        if isinstance(change, LowRank):
            return torch.addmm(y, F.embedding(tokens, change.u), change.v)
        if isinstance(change, CodedRows):
            return y + change.rows(tokens).to(y.dtype)
        if isinstance(change, Coded):
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

    def install(self, slot: int, changes: Mapping[str, Change]) -> bool:
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
