"""The base model: transformers' modelling code with every weight open to per-row deltas."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from deltadock.errors import InvalidArtifact
from deltadock.inference.model.added_tokens import EMBEDDING, LM_HEAD, AddedTokens
from deltadock.inference.model.attention import AttentionMetadata
from deltadock.inference.model.kv_cache import KVCache
from deltadock.inference.model.linears import DeltaLinears
from deltadock.inference.model.logits import Logits
from deltadock.inference.model.routing import (
    DEFAULT_LIMITS,
    DENSE_ROWS,
    DeltaLimits,
    DeltaModule,
    Routing,
)
from deltadock.inference.model.takeover import replace_modules
from deltadock.inference.model.weight_deltas import NewRows, TensorDelta, WeightDelta, fits, place
from deltadock.kernels.svd_delta import Chunks, PackedDelta, empty_delta


class BaseModel:
    """A causal language model whose rows each run with their own delta slot's weights."""

    def __init__(self, model: Any, limits: DeltaLimits = DEFAULT_LIMITS) -> None:
        """Take over `model` (of `loading.FAMILIES`, built with attn_implementation=ATTENTION).

        Raises:
            UnsupportedModel: it holds weights in a kind of module that has no per-row form.
        """
        model.eval().requires_grad_(requires_grad=False)
        self.model = model
        self.config = model.config
        self.dtype: torch.dtype = model.dtype
        self.device: torch.device = model.device
        self._routing = Routing(limits)
        self._slow_slots: set[int] = set()
        self._owners, self._parameters = replace_modules(model, self._routing)
        tied: bool = self.config.tie_word_embeddings
        self._added = AddedTokens(self.config.vocab_size, self._routing, tied=tied)
        if tied:
            # One tensor under two names: a change of either acts on both sides of the model.
            owners = self._owners[EMBEDDING] + self._owners[LM_HEAD]
            self._owners[EMBEDDING] = self._owners[LM_HEAD] = owners
        self._linears = [module for module in self._modules if isinstance(module, DeltaLinears)]
        self._merges = 0
        """Merged weights so far: graphs hold the addresses of each."""
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
        """The longest sequence that the model was made for."""
        return int(self.config.max_position_embeddings)

    def make_cache(self, slots: int, length: int) -> KVCache:
        """A key/value cache for `slots` sequences of up to `length` tokens."""
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

    def forward(self, tokens: Tensor, step: AttentionMetadata, slots: Sequence[int]) -> Tensor:
        """Hidden states (1, rows, hidden) of the packed `tokens` (rows,); fills the cache.

        Row i belongs to the delta slot `slots[i]`. Rows of a slot that lie together are fastest.
        """
        self.route(slots)
        return self.body(self.embed(tokens), step)

    def route(self, slots: Sequence[int]) -> None:
        """Begin a pass over rows that belong to `slots`, on buffers that stay in place."""
        self._routing.cache.begin_step()
        self._routing.assign(slots)

    @property
    def graph_key(self) -> tuple[int, int] | None:
        """What a CUDA graph of this pass's `body` serves: all passes with this key.

        None: some rows need work slot by slot, which no graph can hold.
        """
        chunks = self._routing.chunks
        if self._routing.merged:
            return chunks.row_count, -self._merges
        if chunks.dense or not self._slow_slots.isdisjoint(chunks.by_slot):
            return None
        return chunks.row_count, chunks.count

    @property
    def cache_bytes(self) -> int:
        """Memory that unpacked deltas take at the moment."""
        return self._routing.cache.nbytes

    def embed(self, tokens: Tensor) -> Tensor:
        """(1, rows, hidden) of the tokens (rows,) of the pass that `route` began."""
        return self._added.embed(tokens, self.model.model.embed_tokens)

    def body(self, embedded: Tensor, step: AttentionMetadata) -> Tensor:
        """All layers over what `embed` gave. On a GPU it neither waits nor reads host memory."""
        hidden: Tensor = self.model.model(
            inputs_embeds=embedded, position_ids=step.positions[None], use_cache=False, step=step
        ).last_hidden_state
        return hidden

    def logits(self, hidden: Tensor, slots: Sequence[int]) -> Logits:
        """Of hidden states (1, rows, hidden), whose rows belong to `slots`."""
        self._routing.assign(slots)
        known: Tensor = self.model.lm_head(hidden)[0].float()
        return self._added.logits(known, hidden[0], slots)

    def vocabulary(self, slot: int) -> int:
        """Tokens that the rows of `slot` know: the base's, and what its delta adds."""
        return self._added.vocabulary(slot)

    def vocabulary_with(self, changes: Mapping[str, TensorDelta]) -> int:
        """Tokens that rows with these changes know.

        Raises:
            InvalidArtifact: the changes contradict each other in what they add.
        """
        return self._added.vocabulary(0) + self._added.count(changes)

    def base_shape(self, name: str) -> torch.Size:
        """The shape of the base's tensor of this name.

        Raises:
            InvalidArtifact: the base has no such tensor.
        """
        if name not in self._parameters:
            raise InvalidArtifact(f"The delta changes {name!r}, a tensor that its base lacks.")
        return self._parameters[name].shape

    def prepare(self, changes: Mapping[str, TensorDelta]) -> dict[str, TensorDelta]:
        """Bring a delta's changes, by name, to the model's device and dtype, for `install`.

        Raises:
            InvalidArtifact: one does not fit the base's tensor.
        """
        return self.place(self.fit(changes))

    def place(self, changes: Mapping[str, TensorDelta]) -> dict[str, TensorDelta]:
        """Copy what `fit` gave to the model's device; what is there already stays as it is."""
        return {name: place(change, self.device, self.dtype) for name, change in changes.items()}

    def fit(self, changes: Mapping[str, TensorDelta]) -> dict[str, TensorDelta]:
        """A delta's changes, by name, as `install` takes them, in host memory.

        What a bias changes goes into its weight's packed delta.

        Raises:
            InvalidArtifact: one does not fit the base's tensor, or the others.
        """
        found = {name: self._fitting(name, change) for name, change in changes.items()}
        for name, bias in changes.items():
            path, _, kind = name.rpartition(".")
            weight = found.get(f"{path}.weight")
            if kind != "bias" or not isinstance(bias, Tensor) or isinstance(weight, Tensor):
                continue
            difference = bias.cpu().float() - self._parameters[name].cpu().float()
            if weight is None:
                weight = empty_delta(*self.base_shape(f"{path}.weight"))
            if isinstance(weight, PackedDelta):
                found[f"{path}.weight"] = weight.with_bias(difference)
                del found[name]
            else:
                found[name] = difference
        self._added.count(found)  # refuses tables of different lengths
        return found

    def _fitting(self, name: str, change: TensorDelta) -> TensorDelta:
        shape = self.base_shape(name)
        if not fits(change, shape):
            raise InvalidArtifact(
                f"The delta's {name!r} does not fit its base's, which has the shape {tuple(shape)}."
            )
        return change

    def install(self, slot: int, changes: Mapping[str, TensorDelta]) -> None:
        """Give `slot` its prepared changes. No running sequence may be on the slot."""
        by_module: dict[DeltaModule, dict[str, WeightDelta]] = defaultdict(dict)
        for name, found in changes.items():
            change = found.old if isinstance(found, NewRows) else found
            if change is not None:
                for module, parameter in self._owners[name]:
                    by_module[module][parameter] = change
        slow = [module.install(slot, own) for module, own in by_module.items()]
        if any(slow):
            self._slow_slots.add(slot)
        self._added.install(slot, changes)

    @property
    def merged_slot(self) -> int | None:
        """The slot that has merged weights."""
        return self._routing.merged_slot

    def merge(self, slot: int) -> None:
        """Make merged weights of `slot`, for `use_merged` once the device has computed them.

        They take the memory of the base's linear layers once more, until `remove`, or until
        another slot has them; no running sequence may be on the one that had them. Passes may go
        on meanwhile, but no changes come or go.
        """
        self._unmerge()
        try:
            for module in self._linears:
                module.merge(slot)
        except BaseException:
            self._unmerge()
            raise

    def use_merged(self, slot: int) -> None:
        """Let passes whose rows are all of `slot` use what `merge` made of it."""
        self._merges += 1
        self._routing.merged_slot = slot

    def _unmerge(self) -> None:
        self._routing.merged_slot = None
        for module in self._linears:
            module.unmerge()

    def remove(self, slot: int) -> None:
        """Forget the changes of `slot`. No running sequence may be on the slot."""
        if slot == self.merged_slot:
            self._unmerge()
        for module in self._modules:
            module.remove(slot)
        self._slow_slots.discard(slot)
        self._added.remove(slot)
