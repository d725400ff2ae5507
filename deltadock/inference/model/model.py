"""The base model, with per-row deltas on every weight."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from deltadock.artifacts.names import find_name
from deltadock.errors import InvalidArtifact
from deltadock.inference.model.added_tokens import EMBEDDING, LM_HEAD, AddedTokens, Logits
from deltadock.inference.model.attention import AttentionMetadata
from deltadock.inference.model.decoder import Decoder
from deltadock.inference.model.families import FAMILIES
from deltadock.inference.model.kv_cache import KVCache
from deltadock.inference.model.layers import DeltaLinears, DeltaNorm, is_tied, replace_modules
from deltadock.inference.model.rotary import DeltaRotary, Rope, context_limit
from deltadock.inference.model.routing import (
    DEFAULT_LIMITS,
    DENSE_ROWS,
    DeltaLimits,
    DeltaModule,
    Routing,
)
from deltadock.inference.model.weight_deltas import (
    NewRows,
    TensorDelta,
    WeightDelta,
    fits,
    placed,
)
from deltadock.kernels.svd_delta import Chunks, PackedDelta, empty_delta


class RowSettings(NamedTuple):
    """What the rows of a delta have for themselves besides weights."""

    ropes: Mapping[str, Rope]
    """By kind of layer."""
    epsilon: float
    """Of all norms."""


class DeltaModel:
    """A causal language model whose rows each use the weights of their own delta slot."""

    def __init__(self, model: Any, limits: DeltaLimits = DEFAULT_LIMITS) -> None:
        """Replace the modules of `model` (of `FAMILIES`).

        Raises:
            UnsupportedModel: a module with parameters has no per-row counterpart.
        """
        model.eval().requires_grad_(requires_grad=False)
        self.model = model
        self.config = model.config
        self.dtype: torch.dtype = model.dtype
        self.device: torch.device = model.device
        self._routing = Routing(limits)
        self._uncapturable_slots: set[int] = set()
        self.tied = is_tied(model)
        """Whether embedding and head are one tensor."""
        family = FAMILIES[self.config.model_type]
        self._embedding_scale = _embedding_scale(model)
        self._logit_divisor = self.config.logits_scaling if family.scaled_logits else 1.0
        self._logit_cap = self.config.final_logit_softcapping if family.capped_logits else None
        self._owners, self._parameters = replace_modules(model, self._routing, family)
        self._rotary = DeltaRotary(model.model, self._routing)
        self._decoder = Decoder(model.model, family, self._rotary, self._routing)
        self._added = AddedTokens(self.config.vocab_size, self._routing, tied=self.tied)
        self._linears = [module for module in self._modules if isinstance(module, DeltaLinears)]
        self._merges = 0
        """Merges so far: a graph holds the addresses of one merge's weights."""
        self._routing.chunks = Chunks(
            limits.rows,
            limits.slots,
            [module.table for module in self._linears],
            dense_rows=DENSE_ROWS,
            device=self.device,
        )

    @property
    def _modules(self) -> set[DeltaModule]:
        return {module for owners in self._owners.values() for module, _ in owners}

    @property
    def context_tokens(self) -> int:
        """The longest sequence that the model supports with one set of rotary frequencies."""
        return context_limit(self.config)

    def make_cache(self, slots: int, length: int) -> KVCache:
        """Allocate a key/value cache for `slots` sequences of up to `length` tokens."""
        config = self.config
        heads = config.num_attention_heads
        return KVCache(
            layers=config.num_hidden_layers,
            slots=slots,
            kv_heads=config.num_key_value_heads,
            length=length,
            head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
            dtype=self.dtype,
            device=self.device,
        )

    def forward(self, tokens: Tensor, metadata: AttentionMetadata, slots: Sequence[int]) -> Tensor:
        """Hidden states (1, rows, hidden) of the packed `tokens` (rows,); writes to the cache.

        Row i belongs to the delta slot `slots[i]`. Adjacent rows of one slot are fastest.
        """
        self.route(slots)
        return self.body(self.embed(tokens), metadata)

    def route(self, slots: Sequence[int]) -> None:
        """Begin a pass over rows that belong to `slots`, on static buffers."""
        self._routing.cache.begin_step()
        self._routing.assign(slots)

    @property
    def graph_key(self) -> tuple[int, int] | None:
        """Identifies the CUDA graphs of `body` that can replay this pass.

        None: some rows are computed slot by slot, which a graph cannot hold.
        """
        chunks = self._routing.chunks
        if self._routing.merged:
            return chunks.row_count, -self._merges
        if chunks.dense or not self._uncapturable_slots.isdisjoint(chunks.by_slot):
            return None
        return chunks.row_count, chunks.count

    @property
    def cache_bytes(self) -> int:
        """Bytes of unpacked tensors in the cache."""
        return self._routing.cache.nbytes

    def embed(self, tokens: Tensor) -> Tensor:
        """(1, rows, hidden) of the tokens (rows,) of the pass that `route` began."""
        embedded = self._added.embed(tokens, self.model.model.embed_tokens)
        return embedded if self._embedding_scale == 1 else embedded * self._embedding_scale

    def body(self, embedded: Tensor, metadata: AttentionMetadata) -> Tensor:
        """Run all layers on the output of `embed`. On a GPU, without host synchronization."""
        return self._decoder(embedded, metadata)

    def logits(self, hidden: Tensor, slots: Sequence[int]) -> Logits:
        """Logits of hidden states (1, rows, hidden), whose rows belong to `slots`."""
        self._routing.assign(slots)
        base: Tensor = self.model.lm_head(hidden)[0].float()
        return self._added.logits(base, hidden[0], slots, self._finish_logits)

    def _finish_logits(self, products: Tensor) -> Tensor:
        if self._logit_divisor != 1:
            products.div_(self._logit_divisor)
        cap = self._logit_cap
        return products if cap is None else products.div_(cap).tanh_().mul_(cap)

    def vocabulary(self, slot: int) -> int:
        """Vocabulary size of the rows of `slot`: the base's plus the delta's added tokens."""
        return self._added.vocabulary(slot)

    def vocabulary_with(self, deltas: Mapping[str, TensorDelta]) -> int:
        """Vocabulary size of rows with these deltas.

        Raises:
            InvalidArtifact: the deltas add different numbers of tokens.
        """
        return self._added.vocabulary(0) + self._added.count(deltas)

    def parameter_name(self, name: str) -> str:
        """The model's parameter for a tensor of the base's checkpoint.

        Raises:
            InvalidArtifact: the base has no such tensor.
        """
        found = find_name(name, self._parameters, self.config.model_type)
        if found is None:
            raise InvalidArtifact(f"The delta changes {name!r}, a tensor that its base lacks.")
        return found

    def base_shape(self, name: str) -> torch.Size:
        """The shape of the base's tensor of this name.

        Raises:
            InvalidArtifact: the base has no such tensor.
        """
        if name not in self._parameters:
            raise InvalidArtifact(f"The delta changes {name!r}, a tensor that its base lacks.")
        return self._parameters[name].shape

    def prepare(self, deltas: Mapping[str, TensorDelta]) -> dict[str, TensorDelta]:
        """Fit and place a delta's tensors, by name, for `install`.

        Raises:
            InvalidArtifact: one does not fit the base's tensor.
        """
        return self.place(self.fit(deltas))

    def place(self, deltas: Mapping[str, TensorDelta]) -> dict[str, TensorDelta]:
        """Copy the output of `fit` to the model's device; what is already there is not copied."""
        return placed(deltas, self.device, self.dtype)

    def fit(self, deltas: Mapping[str, TensorDelta]) -> dict[str, TensorDelta]:
        """Check a delta's tensors, by name, and fold biases into packed weights, in host memory.

        Raises:
            InvalidArtifact: one does not fit the base's tensor, or the others.
        """
        fitted = {name: self._checked(name, delta) for name, delta in deltas.items()}
        for name, bias in deltas.items():
            path, _, parameter = name.rpartition(".")
            weight = fitted.get(f"{path}.weight")
            if parameter != "bias" or not isinstance(bias, Tensor) or isinstance(weight, Tensor):
                continue
            difference = bias.cpu().float() - self._parameters[name].cpu().float()
            if weight is None:
                weight = empty_delta(*self.base_shape(f"{path}.weight"))
            if isinstance(weight, PackedDelta):
                fitted[f"{path}.weight"] = weight.with_bias(difference)
                del fitted[name]
            else:
                fitted[name] = difference
        self._added.count(fitted)  # raises if the tables have different lengths
        return fitted

    def _checked(self, name: str, delta: TensorDelta) -> TensorDelta:
        shape = self.base_shape(name)
        if not fits(delta, shape):
            raise InvalidArtifact(
                f"The delta's {name!r} does not fit its base's, which has the shape {tuple(shape)}."
            )
        return delta

    def row_settings(self, config: Any) -> RowSettings:
        """What rows of a delta with this `transformers` configuration have for themselves.

        Raises:
            ArchitectureMismatch, InvalidArtifact: as `DeltaRotary.ropes`.
        """
        ropes = self._rotary.ropes(config, self.context_tokens)
        return RowSettings(ropes, float(config.rms_norm_eps))

    def install(
        self, slot: int, deltas: Mapping[str, TensorDelta], settings: RowSettings | None = None
    ) -> None:
        """Install prepared deltas in `slot`, which no running sequence may use.

        `settings` None: those of the base.
        """
        by_module: dict[DeltaModule, dict[str, WeightDelta]] = defaultdict(dict)
        for name, tensor_delta in deltas.items():
            delta = tensor_delta.old if isinstance(tensor_delta, NewRows) else tensor_delta
            if delta is not None:
                for module, parameter in self._appliers(name, deltas):
                    by_module[module][parameter] = delta
        uncapturable = [module.install(slot, own) for module, own in by_module.items()]
        if any(uncapturable):
            self._uncapturable_slots.add(slot)
        self._added.install(slot, deltas)
        if settings is not None:
            self._rotary.install(slot, settings.ropes)
            if settings.epsilon != self.config.rms_norm_eps:
                for module in self._modules:
                    if isinstance(module, DeltaNorm):
                        module.set_epsilon(slot, settings.epsilon)

    def _appliers(
        self, name: str, deltas: Mapping[str, TensorDelta]
    ) -> list[tuple[DeltaModule, str]]:
        """The modules that apply a tensor's delta.

        That of a tied embedding is the head's too, unless the head has one of its own.
        """
        if self.tied and name == EMBEDDING and LM_HEAD not in deltas:
            return [*self._owners[EMBEDDING], *self._owners[LM_HEAD]]
        return self._owners[name]

    @property
    def merged_slot(self) -> int | None:
        """The slot that has merged weights."""
        return self._routing.merged_slot

    def merge(self, slot: int) -> None:
        """Compute merged weights of `slot`; once the device is done, `use_merged` enables them.

        They take the memory of the base's linear layers once more, until `remove` or until another
        slot is merged. No running sequence may use the slot that was merged before. Passes may run
        meanwhile, but no delta may be installed or removed.
        """
        self._unmerge()
        try:
            for module in self._linears:
                module.merge(slot)
        except BaseException:
            self._unmerge()
            raise

    def use_merged(self, slot: int) -> None:
        """Let passes whose rows all belong to `slot` run on its merged weights."""
        self._merges += 1
        self._routing.merged_slot = slot

    def _unmerge(self) -> None:
        self._routing.merged_slot = None
        for module in self._linears:
            module.unmerge()

    def remove(self, slot: int) -> None:
        """Remove the deltas of `slot`, which no running sequence may use."""
        if slot == self.merged_slot:
            self._unmerge()
        for module in self._modules:
            module.remove(slot)
        self._uncapturable_slots.discard(slot)
        self._rotary.remove(slot)
        self._added.remove(slot)


def _embedding_scale(model: Any) -> float:
    """The factor of embeddings, rounded as transformers rounds it."""
    scale = getattr(model.model.embed_tokens, "embed_scale", None)
    if scale is not None:
        return float(scale.to(model.dtype))
    return float(getattr(model.model, "embedding_multiplier", 1.0))
