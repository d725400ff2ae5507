"""Linear layers, embeddings and norms that apply each row's own weight deltas.

`replace_modules` puts them in place of a transformers model's modules.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Final, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deltadock.errors import UnsupportedModel
from deltadock.inference.model.families import Family
from deltadock.inference.model.routing import DeltaModule, Routing
from deltadock.inference.model.unpacked import change_embeddings, change_products
from deltadock.inference.model.weight_deltas import (
    LowRank,
    WeightDelta,
)
from deltadock.kernels import dispatch
from deltadock.kernels.decoder import RowNorm, add_rms_norm, rms_norm
from deltadock.kernels.linear import linear
from deltadock.kernels.svd_delta import (
    DeltaTable,
    PackedDelta,
    clear_slot,
    discard_rows,
    reference,
    svd_delta,
)

FUSED: Final = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
}
"""Linears that share their input, by the fused one's name, wherever one module has them all."""


class FusedLinear:
    """`x @ weight.T + bias` with weight (h_out, h_in) and an optional bias (h_out,).

    On the CPU, oneDNN reorders a float32 weight into a blocked layout of its own, which is up to
    twice as fast for the few rows of a batch.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, *, reorder: bool = True) -> None:
        """Take ownership of the tensors; `reorder` allows oneDNN's layout."""
        self.device, self.dtype = weight.device, weight.dtype
        self.reordered = (
            reorder
            and (self.device.type, self.dtype) == ("cpu", torch.float32)
            and torch.backends.mkldnn.is_available()
        )
        """Whether the weight is in oneDNN's layout."""
        self.bias = bias
        self._weight = (
            torch.ops.mkldnn._reorder_linear_weight(weight, None) if self.reordered else weight
        )

    @classmethod
    def fuse(cls, linears: Sequence[nn.Linear], *, reorder: bool = True) -> "FusedLinear":
        """Concatenate linears' outputs; either all have a bias or none.

        The linears' own weights become views, or meta tensors of the same shapes.
        """
        weight = _concatenated([linear.weight for linear in linears])
        biases = [linear.bias for linear in linears if linear.bias is not None]
        bias = _concatenated(biases) if biases else None
        fused = cls(weight.detach(), bias, reorder=reorder)
        if fused.reordered:
            for linear in linears:
                linear.weight = nn.Parameter(linear.weight.to("meta"), requires_grad=False)
        return fused

    def __call__(self, x: Tensor) -> Tensor:
        """(1, rows, h_in) to (1, rows, h_out)."""
        if not self.reordered:
            return linear(x[0], self._weight, self.bias)[None]
        product: Tensor = torch.ops.mkldnn._linear_pointwise(
            x, self._weight, self.bias, "none", [], ""
        )
        return product

    def copy(self) -> tuple[Tensor, Tensor | None]:
        """Copies of weight and bias in float32."""
        weight = (
            self._weight.to_dense() if self.reordered else self._weight.to(torch.float32, copy=True)
        )
        return weight, None if self.bias is None else self.bias.to(torch.float32, copy=True)


def _concatenated(parameters: Sequence[Tensor]) -> Tensor:
    """Concatenate parameters along their first axis; each becomes a view of the whole."""
    if len(parameters) == 1:
        return parameters[0]
    whole = torch.cat([parameter.data for parameter in parameters])
    sizes = [len(parameter) for parameter in parameters]
    for parameter, view in zip(parameters, whole.split(sizes), strict=True):
        parameter.data = view
    return whole


class _UnpackedDelta(NamedTuple):
    """A linear's weight delta that is not packed for the kernels."""

    weight: WeightDelta | None
    bias: Tensor | None
    """The bias itself if the weight is replaced, otherwise its difference from the base's."""


class DeltaLinears(DeltaModule):
    """Linear layers that share their input: one product with the base's weights for all rows,
    then the deltas of all slots."""

    def __init__(
        self, linears: Mapping[str, nn.Linear], routing: Routing, *, tied: bool = False
    ) -> None:
        """Fuse the linears, of which either all have a bias or none.

        A `tied` linear's weight is also an embedding.
        """
        super().__init__(routing)
        self._names = tuple(linears)
        layers = list(linears.values())
        self._h_outs, h_in = [linear.out_features for linear in layers], layers[0].in_features
        self._base = FusedLinear.fuse(layers, reorder=not tied)
        self._merged: FusedLinear | None = None
        self.table = DeltaTable(
            routing.limits.slots,
            h_in,
            self._h_outs,
            max_rank=sum(min(h_out, h_in) for h_out in self._h_outs),
            device=self._base.device,
        )
        self._unpacked: dict[int, list[_UnpackedDelta | None]] = {}

    def install(self, slot: int, deltas: Mapping[str, WeightDelta]) -> bool:
        """Packed weights, biases included, go into the table; see `DeltaModel.prepare`."""
        packed: list[PackedDelta | None] = []
        unpacked: list[_UnpackedDelta | None] = []
        for name in self._names:
            weight, bias = deltas.get(f"{name}.weight"), deltas.get(f"{name}.bias")
            assert bias is None or isinstance(bias, Tensor)
            packed.append(weight if isinstance(weight, PackedDelta) else None)
            other = None if isinstance(weight, PackedDelta) else weight
            if bias is None and isinstance(other, Tensor) and self._base.bias is not None:
                bias = self._base.bias.split(self._h_outs)[len(unpacked)]
            unpacked.append(None if other is bias is None else _UnpackedDelta(other, bias))
        if any(packed):
            self.table.install(slot, *packed)
        if any(unpacked):
            self._unpacked[slot] = unpacked
        return any(unpacked)

    def remove(self, slot: int) -> None:
        clear_slot(self.table, slot, self.routing.cache)
        for delta in self._unpacked.pop(slot, ()):
            if delta is not None:
                self.routing.cache.discard(delta.weight)

    def merge(self, slot: int) -> None:
        """Compute base plus delta of `slot` in float32, rounded once; kept until `unmerge`."""
        packed, unpacked = self.table.deltas.get(slot), self._unpacked.get(slot)
        if packed is None and unpacked is None:
            return
        weight, bias = self._base.copy()
        begin = 0
        for number, h_out in enumerate(self._h_outs):
            rows = slice(begin, begin + h_out)
            if packed is not None and (delta := packed[number]) is not None:
                _add_delta(weight[rows], bias, rows, delta, delta.floats("bias"))
            if unpacked is not None and (other := unpacked[number]) is not None:
                _add_delta(weight[rows], bias, rows, other.weight, other.bias)
            begin += h_out
        rounded = None if bias is None else bias.to(self._base.dtype)
        self._merged = FusedLinear(weight.to(self._base.dtype), rounded)

    def unmerge(self) -> None:
        """Free the merged weights, if there are any."""
        self._merged = None

    def forward(self, x: Tensor) -> Tensor:
        """(1, rows, h_in) to (1, rows, h_out), the linears' outputs concatenated."""
        if self.routing.merged:
            return (self._merged or self._base)(x)
        y = self._base(x)
        chunks = self.routing.chunks
        # On a GPU always: a captured graph must also serve deltas that are installed later.
        if dispatch.on_gpu(x) or (self.table.deltas and chunks.by_slot):
            svd_delta(y[0], x[0], self.table, chunks, self.routing.cache)
        if self._unpacked:
            for slot, rows in chunks.by_slot.items():
                begin = 0
                for delta, h_out in zip(self._unpacked.get(slot, ()), self._h_outs, strict=False):
                    part = (0, rows, slice(begin, begin + h_out))
                    if delta is not None:
                        y[part] = change_products(y[part], x[0, rows], *delta, self.routing.cache)
                    begin += h_out
        return y


def _add_delta(
    weight: Tensor,
    biases: Tensor | None,
    rows: slice,
    delta: WeightDelta | None,
    bias: Tensor | None,
) -> None:
    """Add a delta to one linear's rows of the fused weight and biases, both float32."""
    if isinstance(delta, Tensor):
        weight.copy_(delta)
    elif isinstance(delta, PackedDelta):
        weight += reference.dense(delta)
    elif isinstance(delta, LowRank):
        weight += delta.u.float() @ delta.v.float()
    elif delta is not None:
        weight += delta.dense()
    if biases is not None and bias is not None:
        biases[rows] = bias if isinstance(delta, Tensor) else biases[rows] + bias


class DeltaEmbedding(DeltaModule):
    """An embedding table with the deltas of every slot; it runs outside of CUDA graphs."""

    def __init__(self, embedding: nn.Embedding, routing: Routing) -> None:
        super().__init__(routing)
        self.weight = embedding.weight
        self._deltas: dict[int, WeightDelta] = {}

    def install(self, slot: int, deltas: Mapping[str, WeightDelta]) -> bool:
        self._deltas[slot] = deltas["weight"]
        return False

    def remove(self, slot: int) -> None:
        discard_rows(self._deltas.pop(slot, None), self.routing.cache)

    def forward(self, tokens: Tensor) -> Tensor:
        """(1, rows) int64 to (1, rows, hidden)."""
        y = F.embedding(tokens, self.weight)
        if self._deltas:
            for slot, rows in self.routing.chunks.by_slot.items():
                if slot in self._deltas:
                    y[0, rows] = change_embeddings(
                        y[0, rows], tokens[0, rows], self._deltas[slot], self.routing.cache
                    )
        return y


class DeltaNorm(DeltaModule):
    """RMS normalization with the weight and the epsilon of each row's slot.

    Attributes:
        width: of what is normalized.
        table: weights and epsilons of all slots.
    """

    def __init__(self, norm: Any, routing: Routing, family: Family) -> None:
        super().__init__(routing)
        self._family = family
        self._weight = self._factors(norm.weight.data)
        self.width = len(self._weight)
        self._epsilon = float(getattr(norm, "variance_epsilon", None) or norm.eps)
        slots = routing.limits.slots
        self.table = RowNorm(
            self._weight.repeat(slots, 1),
            torch.full((slots,), self._epsilon, device=self._weight.device),
        )
        self._changed: set[int] = set()

    def _factors(self, weight: Tensor) -> Tensor:
        """What rows are multiplied by, for a weight as in checkpoints."""
        return weight.float() + self._family.norm_offset if self._family.float32_norms else weight

    def install(self, slot: int, deltas: Mapping[str, WeightDelta]) -> bool:
        weight = deltas["weight"]
        assert isinstance(weight, Tensor)
        self.table.weights[slot] = self._factors(weight)
        self._changed.add(slot)
        return False

    def set_epsilon(self, slot: int, epsilon: float) -> None:
        """Use `epsilon` for the rows of `slot`, until it is removed."""
        self.table.epsilons[slot] = epsilon
        self._changed.add(slot)

    def remove(self, slot: int) -> None:
        if slot in self._changed:
            self.table.weights[slot] = self._weight
            self.table.epsilons[slot] = self._epsilon
            self._changed.remove(slot)

    def forward(self, x: Tensor) -> Tensor:
        """(1, rows, width) to the same shape."""
        return rms_norm(x[0], self.table, self.routing.row_slots)[None]

    def add(self, residual: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """`residual + x` (1, rows, width), and the same normalized."""
        total, out = add_rms_norm(x[0], residual[0], self.table, self.routing.row_slots)
        return total[None], out[None]


class NoNorm:
    """In the place of a norm that a family's layers lack."""

    def __call__(self, x: Tensor) -> Tensor:
        """The same."""
        return x

    def add(self, residual: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """`residual + x` twice."""
        total = residual + x
        return total, total


NO_NORM: Final = NoNorm()
Owners = dict[str, list[tuple[DeltaModule, str]]]
"""By tensor name: the modules that apply its deltas, with their name for the parameter."""


def replace_modules(
    model: Any, routing: Routing, family: Family
) -> tuple[Owners, dict[str, Tensor]]:
    """Replace every module of `model` that has parameters of its own by one with per-row deltas.

    Returns:
        The owners of each tensor, and the tensors, by the checkpoint's names.

    Raises:
        UnsupportedModel: a module with parameters has no per-row counterpart.
    """
    owners: Owners = {}
    tensors: dict[str, Tensor] = {}

    def register(path: str, module: nn.Module, owner: DeltaModule, prefix: str = "") -> None:
        for name, parameter in module.named_parameters():
            owners[f"{path}.{name}"] = [(owner, prefix + name)]
            tensors[f"{path}.{name}"] = parameter

    def replace_linears(parent: str, linears: dict[str, nn.Linear], replacement: str) -> None:
        tied = "lm_head" in linears and is_tied(model)
        fused = DeltaLinears(linears, routing, tied=tied)
        owner = model.get_submodule(parent)
        for name, layer in linears.items():
            register(f"{parent}.{name}".lstrip("."), layer, fused, f"{name}.")
            delattr(owner, name)
        owner.add_module(replacement, fused)

    for path, module in list(model.named_modules()):
        for fused_name, names in FUSED.items():
            if linears := _fusable(path, module, names):
                replace_linears(path, linears, fused_name)
        parameters = dict(module.named_parameters(recurse=False))
        if not parameters or any(f"{path}.{name}" in owners for name in parameters):
            continue
        if isinstance(module, nn.Linear):
            parent, _, name = path.rpartition(".")
            replace_linears(parent, {name: module}, name)
            continue
        if isinstance(module, nn.Embedding):
            replacement: DeltaModule = DeltaEmbedding(module, routing)
        elif parameters.keys() == {"weight"} and parameters["weight"].ndim == 1:
            replacement = DeltaNorm(module, routing, family)
        else:
            raise UnsupportedModel(f"{path} is a {type(module).__name__}, which cannot be served.")
        register(path, module, replacement)
        model.set_submodule(path, replacement)
    return owners, tensors


def is_tied(model: Any) -> bool:
    """Whether embedding and head are one tensor, whatever config.json says."""
    return "lm_head.weight" in model.all_tied_weights_keys


def _fusable(path: str, module: nn.Module, names: tuple[str, ...]) -> dict[str, nn.Linear]:
    """The module's linears of these names, if it has all of them.

    Raises:
        UnsupportedModel: some have a bias and some have none.
    """
    children = {name: getattr(module, name, None) for name in names}
    linears = {name: child for name, child in children.items() if isinstance(child, nn.Linear)}
    if len(linears) < len(names):
        return {}
    if len({linear.bias is None for linear in linears.values()}) > 1:
        raise UnsupportedModel(f"Not all of {path}'s {', '.join(names)} have a bias.")
    return linears
