"""The sites of vLLM's model, and which part of each of the base's tensors this rank has.

All matrices of vLLM pass one place, `layer.quant_method`: `apply(layer, x, bias)` of linears and
the head, `embedding(layer, tokens)` of embeddings, before any all-reduce or gather. A subclass of
the method that the base uses (unquantized, FP8, AWQ, ...) adds the deltas to what that gives.
"""

import copy
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.linear import (
    ColumnParallelLinear,
    LinearBase,
    QKVParallelLinear,
    RowParallelLinear,
)
from vllm.model_executor.layers.vocab_parallel_embedding import (
    ParallelLMHead,
    VocabParallelEmbedding,
)

from deltadock.artifacts.names import is_head
from deltadock.errors import UnsupportedModel
from deltadock.inference.model.weight_deltas import NewRows, TensorDelta
from deltadock_vllm.many.sharding import PartDelta, part
from deltadock_vllm.many.sites import (
    EmbeddingSite,
    LinearSite,
    NormSite,
    Rows,
    Site,
    embedding,
    is_called,
    linear,
    norm,
)

WHOLE: Final = slice(None)


class Target(NamedTuple):
    """Where a tensor of the base takes effect."""

    site: Site
    linear: int = 0
    """Of a `LinearSite`, which of its linears."""
    bias: bool = False
    """Whether the tensor is that linear's bias."""
    rows: slice = WHOLE
    columns: slice = WHOLE
    """This rank's part of the tensor."""
    base: Tensor | None = None
    """Of a bias, the base's part, float32; None: another rank adds the bias."""

    def part(self, name: str, delta: TensorDelta, shape: torch.Size) -> PartDelta:
        """This rank's part of a tensor's delta.

        Raises:
            UnsupportedModel: it adds tokens.
        """
        if isinstance(delta, NewRows):
            raise UnsupportedModel(f"The fine-tune has added tokens, by {name!r}.")
        rows = slice(*self.rows.indices(shape[0]))
        rows = slice(rows.start, rows.stop)
        if len(shape) == 1:
            assert isinstance(delta, Tensor)
            return delta[rows].contiguous()
        columns = slice(*self.columns.indices(shape[1]))
        return part(delta, rows, slice(columns.start, columns.stop))


class Modules:
    """The model's modules with sites.

    Attributes:
        targets: by the name of the base's tensor; two of a tied embedding.
        sites: of all modules.
        elements: of this rank's matrices, however they are quantized.
    """

    def __init__(self, model: nn.Module, rows: Rows, slots: int, device: torch.device) -> None:
        """Give every module that has a counterpart a site of `slots` slots, slot 0 included."""
        self.targets: dict[str, list[Target]] = {}
        self.sites: list[Site] = []
        self.elements = 0
        self._rows, self._slots, self._device = rows, slots, device
        self._tied = bool(getattr(model.config, "tie_word_embeddings", False))
        packed = getattr(model, "packed_modules_mapping", None) or {}
        for path, module in list(model.named_modules(remove_duplicate=False)):
            parent, _, leaf = path.rpartition(".")
            if isinstance(module, LinearBase):
                names = [
                    ".".join(filter(None, (parent, name))) for name in packed.get(leaf, [leaf])
                ]
                self._add_linear(module, names)
            elif isinstance(module, VocabParallelEmbedding):
                self._add_vocabulary(module, path)
            elif isinstance(module, RMSNorm) and module.has_weight:
                site = NormSite(rows, slots, module.weight.data)
                setattr(model.get_submodule(parent), leaf, DeltaNorm(module, site))
                self._add(f"{path}.weight", Target(site))

    def _add(self, name: str, target: Target) -> None:
        self.targets.setdefault(name, []).append(target)
        if target.site not in self.sites:
            self.sites.append(target.site)

    def _add_linear(self, module: LinearBase, names: list[str]) -> None:
        h_outs = _local_outputs(module)
        if len(names) != len(h_outs):
            if len(names) > 1 or module.tp_size > 1:
                return  # a matrix of the base is spread over parts of this one: refused by name
            h_outs = [sum(h_outs)]
        first_rank = not isinstance(module, RowParallelLinear) or module.tp_rank == 0
        adds_bias = module.bias is not None and not module.skip_bias_add and first_rank
        columns = WHOLE
        if isinstance(module, RowParallelLinear):
            columns = _nth(module.tp_rank, module.input_size_per_partition)
        h_in = columns.stop - columns.start if columns != WHOLE else module.input_size
        site = LinearSite(
            self._rows, self._slots, h_in, h_outs,
            bias=module.bias if adds_bias else None, device=self._device,
        )  # fmt: skip
        _interpose(module).deltadock_linear = site.number
        self.elements += h_in * sum(h_outs)
        begin = 0
        for number, (name, h_out) in enumerate(zip(names, h_outs, strict=True)):
            rows = _local_rows(module, number, h_out)
            self._add(f"{name}.weight", Target(site, number, rows=rows, columns=columns))
            if module.bias is not None:
                base = module.bias.data[begin : begin + h_out].float().cpu() if first_rank else None
                self._add(f"{name}.bias", Target(site, number, bias=True, rows=rows, base=base))
            begin += h_out

    def _add_vocabulary(self, module: VocabParallelEmbedding, path: str) -> None:
        shard = module.shard_indices
        rows = slice(shard.org_vocab_start_index, shard.org_vocab_end_index)
        method = _interpose(module)
        head = is_head(f"{path}.weight")
        if not isinstance(module, ParallelLMHead) and method.deltadock_embedding is None:
            module.use_fused_embedding = False  # a kernel beside `quant_method`
            embedding_site = EmbeddingSite(self._rows)
            method.deltadock_embedding = embedding_site.number
            name = f"{path}.weight"
            self._add(name, Target(embedding_site, rows=rows))
            self._embedding = name
            self.elements += module.embedding_dim * (rows.stop - rows.start)
        if isinstance(module, ParallelLMHead) or head:
            site = LinearSite(
                self._rows, self._slots, module.embedding_dim, [rows.stop - rows.start],
                head=True, device=self._device,
            )  # fmt: skip
            method.deltadock_linear = site.number
            if not self._tied:
                self.elements += module.embedding_dim * (rows.stop - rows.start)
            name = self._embedding if self._tied else f"{path}.weight"
            self._add(name, Target(site, rows=rows))

    def tables(self, *, head: bool) -> Iterator[Any]:
        """The tables of the linears, or of the head."""
        for site in self.sites:
            if isinstance(site, LinearSite) and site.head == head:
                yield site.table

    def find(self, names: Mapping[str, Any]) -> dict[str, list[Target]]:
        """The targets of a delta's tensors; a head that is the tied embedding has none.

        Raises:
            UnsupportedModel: a tensor has no counterpart, such as an expert's.
        """
        found = {}
        for name, record in names.items():
            if name in self.targets:
                found[name] = self.targets[name]
            elif not (self._tied and is_head(name) and record["kind"] == "alias"):
                raise UnsupportedModel(
                    f"The delta changes {name!r}, which cannot differ by request in this engine. "
                    "Serve it with --load-format deltadock, which merges it."
                )
        return found


def _nth(rank: int, size: int) -> slice:
    return slice(rank * size, (rank + 1) * size)


def _local_outputs(module: LinearBase) -> list[int]:
    """This rank's outputs of each of the layer's matrices."""
    if isinstance(module, ColumnParallelLinear):
        return list(module.output_partition_sizes)
    return [module.output_size]


def _local_rows(module: LinearBase, number: int, h_out: int) -> slice:
    """This rank's outputs of the layer's matrix `number`."""
    if not isinstance(module, ColumnParallelLinear) or module.tp_size == 1:
        return WHOLE
    rank = module.tp_rank
    if isinstance(module, QKVParallelLinear) and number > 0:
        rank //= module.num_kv_head_replicas
    return _nth(rank, h_out)


class _DeltaMethod:
    """Mixed into the class of a layer's quantization method.

    The numbers are of the layer's sites; an embedding that is also the head has both.
    """

    deltadock_linear: int | None = None
    deltadock_embedding: int | None = None

    def apply(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        y: Tensor = super().apply(layer, x, bias)  # type: ignore[misc]
        if self.deltadock_linear is not None and is_called(self.deltadock_linear):
            linear(y, x, self.deltadock_linear)
        return y

    def embedding(self, layer: nn.Module, tokens: Tensor) -> Tensor:
        y: Tensor = super().embedding(layer, tokens)  # type: ignore[misc]
        if self.deltadock_embedding is not None and is_called(self.deltadock_embedding):
            embedding(y, tokens, self.deltadock_embedding)
        return y


def _interpose(layer: nn.Module) -> Any:
    """Give a layer a method that is its own, and adds deltas."""
    method = layer.quant_method
    if isinstance(method, _DeltaMethod):
        return method
    kind = type(f"Delta{type(method).__name__}", (_DeltaMethod, type(method)), {})
    found: Any = object.__new__(kind)
    vars(found).update(vars(method))
    layer.quant_method = found
    return found


class DeltaNorm(nn.Module):
    """In the place of a norm: the same, or normalized without a weight and then each row's own."""

    def __init__(self, base: Any, site: NormSite) -> None:
        super().__init__()
        self.base, self._site = base, site
        bare = copy.copy(base)
        bare.pass_weight = bare.pass_weight_add = False
        self._bare = partial(type(bare).forward_native, bare)
        self.weight: Tensor = base.weight
        self.variance_epsilon: float = base.variance_epsilon

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Any:
        """As the base's norm: y, or y and the new residual."""
        if not is_called(self._site.number):
            return self.base(x) if residual is None else self.base(x, residual)
        found = self._bare(x, residual)
        norm(found if residual is None else found[0], self._site.number)
        return found
