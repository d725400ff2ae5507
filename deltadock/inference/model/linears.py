"""Linear layers whose rows each have their own delta's weights."""

from collections.abc import Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deltadock.inference.model.product import Product, joined
from deltadock.inference.model.routing import DeltaModule, Routing
from deltadock.inference.model.weight_deltas import EncodedDelta, LowRank, RowsDelta, WeightDelta
from deltadock.kernels.svd_delta import DeltaTable, PackedDelta, reference, svd_delta


class _Other(NamedTuple):
    """A change of one linear that is no packed delta."""

    weight: WeightDelta | None
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
        found = list(linears.values())
        self._h_outs, h_in = [linear.out_features for linear in found], found[0].in_features
        self._base = joined(found, plain=tied)
        self._merged: Product | None = None
        self.table = DeltaTable(
            routing.limits.slots,
            h_in,
            self._h_outs,
            max_rank=sum(min(h_out, h_in) for h_out in self._h_outs),
            device=self._base.device,
        )
        self._others: dict[int, list[_Other | None]] = {}
        self._input: Tensor | None = None
        self._outputs: tuple[Tensor, ...] = ()

    def install(self, slot: int, changes: Mapping[str, WeightDelta]) -> bool:
        """Packed weights go into the table, with their biases in them; see `BaseModel.prepare`."""
        packed: list[PackedDelta | None] = []
        others: list[_Other | None] = []
        for name in self._names:
            weight, bias = changes.get(f"{name}.weight"), changes.get(f"{name}.bias")
            assert bias is None or isinstance(bias, Tensor)
            packed.append(weight if isinstance(weight, PackedDelta) else None)
            own = None if isinstance(weight, PackedDelta) else weight
            if bias is None and isinstance(own, Tensor) and self._base.bias is not None:
                bias = self._base.bias.split(self._h_outs)[len(others)]
            others.append(None if own is bias is None else _Other(own, bias))
        if any(packed):
            self.table.install(slot, *packed)
        if any(others):
            self._others[slot] = others
        return any(others)

    def remove(self, slot: int) -> None:
        for key in (deltas := self.table.deltas.get(slot, ())), *deltas:
            self.routing.cache.discard(key)
        self.table.remove(slot)
        for other in self._others.pop(slot, ()):
            if other is not None:
                self.routing.cache.discard(other.weight)

    def merge(self, slot: int) -> None:
        """Keep the weights of `slot` as one product, until `unmerge`: what it changes is added in
        float32 and rounded once."""
        packed, others = self.table.deltas.get(slot), self._others.get(slot)
        if packed is None and others is None:
            return
        weight, bias = self._base.copy()
        begin = 0
        for number, h_out in enumerate(self._h_outs):
            own = slice(begin, begin + h_out)
            if packed is not None and (delta := packed[number]) is not None:
                _apply(weight[own], bias, own, delta, delta.floats("bias"))
            if others is not None and (other := others[number]) is not None:
                _apply(weight[own], bias, own, other.weight, other.bias)
            begin += h_out
        plain = None if bias is None else bias.to(self._base.dtype)
        self._merged = Product(weight.to(self._base.dtype), plain)

    def unmerge(self) -> None:
        """Forget merged weights, if there are any."""
        self._merged = None

    def forward(self, x: Tensor) -> Tensor:
        """(1, rows, h_in) to (1, rows, h_out), the linears' outputs side by side."""
        if self.routing.merged:
            return (self._merged or self._base)(x)
        y = self._base(x)
        chunks = self.routing.chunks
        if x.is_cuda or (
            self.table.deltas and chunks.by_slot
        ):  # a graph must hold what is installed later, too
            svd_delta(y[0], x[0], self.table, chunks, self.routing.cache)
        if self._others:
            for slot, rows in chunks.by_slot.items():
                begin = 0
                for other, h_out in zip(self._others.get(slot, ()), self._h_outs, strict=False):
                    part = (0, rows, slice(begin, begin + h_out))
                    if other is not None:
                        y[part] = self._changed(y[part], x[0, rows], other)
                    begin += h_out
        return y

    def _changed(self, y: Tensor, x: Tensor, other: _Other) -> Tensor:
        weight, bias = other
        if isinstance(weight, Tensor):
            return F.linear(x, weight, bias)
        if isinstance(weight, LowRank):
            y = torch.addmm(y, F.linear(x, weight.v), weight.u.T)
        elif isinstance(weight, EncodedDelta | RowsDelta):
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


def _apply(
    weight: Tensor,
    biases: Tensor | None,
    own: slice,
    change: WeightDelta | None,
    bias: Tensor | None,
) -> None:
    """Apply a change to one linear's part of the joined weights and biases, both float32."""
    if isinstance(change, Tensor):
        weight.copy_(change)
    elif isinstance(change, PackedDelta):
        weight += reference.dense(change)
    elif isinstance(change, LowRank):
        weight += change.u.float() @ change.v.float()
    elif change is not None:
        weight += change.dense()
    if biases is not None and bias is not None:
        biases[own] = bias if isinstance(change, Tensor) else biases[own] + bias


class Output(nn.Module):
    """One of the linears of a DeltaLinears, in its place in the model."""

    def __init__(self, linears: DeltaLinears, number: int) -> None:
        super().__init__()
        self._linears, self._number = linears, number

    def forward(self, x: Tensor) -> Tensor:
        """(1, rows, h_in) to (1, rows, h_out)."""
        return self._linears.output(x, self._number)
