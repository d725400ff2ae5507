"""A model without weights, whose parts are called functionally with given weights.

The modelling code is that of `transformers`, with the model on the meta device. Everything around
the blocks (rotary embeddings, masks, norms, scaled or capped logits) runs the model's code too,
with stubs in place of the blocks.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from deltadock.artifacts.compatibility import check_not_quantized
from deltadock.compression.checkpoints import TensorSource
from deltadock.compression.families import CALIBRATED
from deltadock.compression.model.families import (
    StoredParameter,
    build,
    is_experts,
    locate,
    restore_buffers,
)
from deltadock.errors import InvalidCheckpoint, UnsupportedModel

Weights = dict[str, Tensor]
"""Weights of a module, by name within the module."""

Arguments = tuple[tuple[Any, ...], dict[str, Any]]
"""Positional and keyword arguments of a block besides its hidden states."""


class _BlockStub(nn.Module):
    """Replaces a block: records its arguments, and returns `output` or else its input.

    With `in_tuple`, as the only entry of a tuple.
    """

    def __init__(self, block: nn.Module, output: Tensor | None, *, in_tuple: bool) -> None:
        super().__init__()
        # In a tuple, so that the block is not registered as a submodule.
        self.block = (block,)
        self.output = output
        self.in_tuple = in_tuple
        self.inputs: list[Tensor] = []
        self.arguments: Arguments = ((), {})

    def forward(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor | tuple[Tensor]:
        self.inputs.append(hidden)
        self.arguments = args, kwargs
        output = hidden if self.output is None else self.output
        return (output,) if self.in_tuple else output

    def __getattr__(self, name: str) -> Any:
        """The block's attributes, which models read before the call (attention type, say)."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["block"][0], name)


class _BodyStub(nn.Module):
    """Replaces everything below the output head: returns `hidden`.

    Models call it, or the body that it holds, `body` (OPT: `decoder`).
    """

    def __init__(self, hidden: Tensor, body: str) -> None:
        super().__init__()
        self.last_hidden_state = hidden
        self.body = body

    def forward(self, *_: Any, **__: Any) -> "_BodyStub":
        return self

    def __getitem__(self, index: int) -> Tensor:
        return (self.last_hidden_state,)[index]

    def __getattr__(self, name: str) -> Any:
        """Itself as the body; None for all other outputs (caches, attentions, ...)."""
        return self if name == self.__dict__["body"] else None


class Skeleton:
    """The language model of a configuration, and the checkpoint tensors of its parameters.

    Attributes:
        config: of the language model.
        blocks: names of the decoder blocks, in order.
        body: name of the module that holds them.
        stored: the checkpoint tensors of each parameter.
        embedding, head: names of the input embedding's and output head's weights.
        tied: whether both are the same parameter.
    """

    def __init__(
        self, config: Any, names: Collection[str], device: torch.device, dtype: torch.dtype
    ) -> None:
        """Build it for the checkpoint with the tensors `names`.

        As in `transformers`, a head that differs from the embedding is not tied to it; that shows
        if `names` maps to the tensors' entries.

        Raises:
            UnsupportedModel: `transformers` cannot build it, or its blocks are not found.
        """
        self._device, self._dtype = device, dtype
        self._model = build(config, dtype).eval()
        self.config = config.get_text_config(decoder=True)
        self._in_tuples = CALIBRATED[config.model_type].tuples
        self._body = self._model.get_decoder()
        modules = {id(module): name for name, module in self._model.named_modules()}
        self.body = modules[id(self._body)]
        self._layers_name, self._layers = self._find_blocks()
        self.blocks = [f"{self.body}.{self._layers_name}.{k}" for k in range(len(self._layers))]
        restore_buffers(self._body, device)
        self.embedding = f"{modules[id(self._body.get_input_embeddings())]}.weight"
        self.head = f"{modules[id(self._model.get_output_embeddings())]}.weight"
        self.tied = self.head in self._model.all_tied_weights_keys
        self.stored = self._locate(config.model_type, names)
        if isinstance(names, Mapping) and self.tied:
            both = (names.get(self.tensor_of(one)) for one in (self.embedding, self.head))
            self.tied = len({(one.sha256, one.dtype) for one in both if one is not None}) == 1

    def _find_blocks(self) -> tuple[str, nn.ModuleList]:
        """The list of decoder blocks, and its name within the body."""
        for name, module in self._body.named_children():
            if isinstance(module, nn.ModuleList) and len(module) == self.config.num_hidden_layers:
                return name, module
        raise UnsupportedModel(
            f"The decoder blocks of a {self.config.model_type!r} model are not found."
        )

    def _locate(self, model_type: str, names: Collection[str]) -> dict[str, StoredParameter]:
        stored = {}
        base = self._model.base_model_prefix
        for name, parameter in self._model.state_dict().items():
            if name.startswith(f"{base}.") and not name.startswith(f"{self.body}."):
                continue  # The vision tower and projector are never run.
            owner = self._model.get_submodule(name.rpartition(".")[0])
            experts = parameter.shape[0] if is_experts(owner) else 0
            stored[name] = locate(name, experts, model_type, base, names)
        if self.tied:
            present = [
                stored[name]
                for name in (self.embedding, self.head)
                if set(stored[name].all_names()) <= set(names)
            ]
            for name in (self.embedding, self.head):
                if present and stored[name] not in present:
                    stored[name] = present[0]
        return stored

    def tensor_of(self, name: str) -> str:
        """The checkpoint's tensor of a parameter that is stored in one."""
        (tensor,) = self.stored[name].all_names()
        return tensor

    def check(self, shapes: Mapping[str, Sequence[int]]) -> None:
        """Compare a checkpoint's tensors (name to shape) with those that config.json describes.

        Raises:
            InvalidCheckpoint: naming the first tensor that is missing or of another shape.
            UnsupportedModel: the weights are quantized.
        """
        check_not_quantized({}, shapes)
        for name, parameter in self._model.state_dict().items():
            if name not in self.stored:
                continue
            stored, expected = self.stored[name], list(parameter.shape)
            for tensor in stored.all_names():
                found = shapes.get(tensor)
                if stored.stacked:
                    expected = [parameter.shape[1] // len(stored.names[0]), parameter.shape[2]]
                if found is None or list(found) != expected:
                    raise InvalidCheckpoint(
                        f"config.json describes {tensor!r} with shape {expected}, but the "
                        f"weights have {'no such tensor' if found is None else list(found)}."
                    )

    def module(self, name: str) -> nn.Module:
        """The module of this name."""
        found: nn.Module = self._model.get_submodule(name)
        return found

    def width(self, name: str) -> int:
        """Inputs and outputs of the linear maps of a module that one token passes, summed."""
        routed = getattr(self.config, "num_experts_per_tok", 1)
        return sum(
            (1 if parameter.ndim == 2 else routed) * sum(parameter.shape[-2:])
            for parameter in self.module(name).parameters()
            if parameter.ndim > 1
        )

    def _weight(self, name: str, source: TensorSource) -> Tensor:
        return self.stored[name].tensor(source).to(self._device, self._dtype)

    def block_weights(self, index: int, source: TensorSource) -> Weights:
        """Load the weights of block `index`."""
        block = self.blocks[index]
        return {
            key: self._weight(f"{block}.{key}", source) for key in self._layers[index].state_dict()
        }

    def _outside_blocks(self, *, embedding: bool) -> dict[str, Tensor]:
        """The body's parameters outside the blocks, on meta."""
        return {
            key: parameter
            for key, parameter in self._body.state_dict().items()
            if not key.startswith(f"{self._layers_name}.")
            and (embedding or f"{self.body}.{key}" != self.embedding)
        }

    def body_weights(self, source: TensorSource, *, embedding: bool) -> Weights:
        """Load the body's weights outside the blocks, with or without the input embedding."""
        keys = self._outside_blocks(embedding=embedding)
        return {key: self._weight(f"{self.body}.{key}", source) for key in keys}

    def head_weights(self, source: TensorSource) -> Weights:
        """Load the model's weights outside its base model."""
        outside = [
            name for name in self.stored if not name.startswith(f"{self._model.base_model_prefix}.")
        ]
        return {name: self._weight(name, source) for name in outside}

    def _run_body(
        self, weights: Weights, output: Tensor | None, **inputs: Any
    ) -> tuple[list[_BlockStub], Any]:
        """Run the body with stubs as blocks, which return their input, or `output`."""
        stands = [_BlockStub(block, output, in_tuple=self._in_tuples) for block in self._layers]
        with _replaced(self._body, self._layers_name, nn.ModuleList(stands)):
            result = functional_call(self._body, weights, kwargs={**inputs, "use_cache": False})
        return stands, result

    def embed(self, weights: Weights, tokens: Tensor) -> Tensor:
        """The first block's inputs for `tokens` (sequences, length), on the model's device."""
        return self._run_body(weights, None, input_ids=tokens)[0][0].inputs[0]

    def call_block(
        self, index: int, weights: Weights, hidden: Tensor, arguments: Arguments
    ) -> Tensor:
        """Call block `index` with `hidden` and `arguments`."""
        args, kwargs = arguments
        output: Any = functional_call(self._layers[index], weights, (hidden, *args), kwargs)
        found: Tensor = output[0] if isinstance(output, tuple) else output
        return found

    @torch.no_grad()
    def arguments(self, shape: Sequence[int]) -> list[Arguments]:
        """Each block's arguments besides hidden states of `shape`.

        These depend on positions only, so that no weights are needed.
        """
        zeros = {
            key: torch.zeros(parameter.shape, dtype=self._dtype, device=self._device)
            for key, parameter in self._outside_blocks(embedding=False).items()
        }
        hidden = torch.zeros(*shape, dtype=self._dtype, device=self._device)
        return [stand.arguments for stand in self._run_body(zeros, None, inputs_embeds=hidden)[0]]

    def finish(self, weights: Weights, hidden: Tensor) -> Tensor:
        """Apply the final norm to the last block's outputs (tokens, hidden)."""
        # One sequence per token, so that no mask of (tokens, tokens) is allocated.
        tokens = hidden[:, None]
        embeddings = torch.zeros_like(tokens)
        result = self._run_body(weights, tokens, inputs_embeds=embeddings)[1]
        final: Tensor = result.last_hidden_state
        return final[:, 0]

    def logits(self, weights: Weights, hidden: Tensor) -> Tensor:
        """Logits (tokens, vocabulary) float32 for the body's outputs (tokens, hidden)."""
        stub = _BodyStub(hidden[None], self.body.rpartition(".")[2])
        with _replaced(self._model, self._model.base_model_prefix, stub):
            logits: Tensor = functional_call(
                self._model, weights, kwargs={"input_ids": None, "use_cache": False}
            ).logits
        return logits[0].float()


@contextmanager
def _replaced(owner: Any, name: str, module: nn.Module) -> Iterator[None]:
    original = owner.get_submodule(name)
    owner.set_submodule(name, module)
    try:
        yield
    finally:
        owner.set_submodule(name, original)
