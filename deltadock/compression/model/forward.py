"""Run a causal language model block by block, forward and backward.

One block's weights are in memory at a time. Hidden states stay on the caller's device, or
memory-mapped, and are moved a few thousand tokens at a time.
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from deltadock.compression.checkpoints import MatrixRef, TensorSource, tensor_names
from deltadock.compression.model.families import read_config
from deltadock.compression.model.observing import Observer, observed, sites
from deltadock.compression.model.skeleton import Skeleton, Weights

TOKENS_PER_STEP: Final = {"cpu": 1024, "cuda": 4096}
"""Tokens that run together: on a CPU few, so that activations stay in its cache."""
LOGITS_PER_STEP: Final = 1 << 24

Loss = Callable[[Tensor, slice], Tensor]
"""Loss, summed over the tokens, of logits (tokens, vocabulary) float32; the slice is their position
among all tokens."""
Backward = Callable[[Tensor], Tensor]
"""From the gradient at a block's outputs to that at its inputs."""


class _DetachedWeights:
    """Weights detached from the graph that computed them.

    Several backward passes accumulate their gradients, which are then backpropagated once.
    """

    def __init__(self, weights: Weights) -> None:
        self._origins = weights
        self.weights = {
            name: weight.detach().requires_grad_(weight.requires_grad)
            for name, weight in weights.items()
        }

    @property
    def wanted(self) -> bool:
        """Whether any weight requires a gradient."""
        return any(leaf.requires_grad for leaf in self.weights.values())

    def backpropagate(self) -> None:
        """Backpropagate the accumulated gradients into the original weights."""
        pairs = [
            (self._origins[name], leaf.grad)
            for name, leaf in self.weights.items()
            if leaf.grad is not None
        ]
        if pairs:
            torch.autograd.backward([origin for origin, _ in pairs], [grad for _, grad in pairs])


class BlockwiseModel:
    """A model built from `folder`'s configuration, run with the weights of any source.

    It computes in float32 on the CPU and in bfloat16, with float32 logits, elsewhere. Of a
    vision-language model the language model is run.

    Attributes:
        blocks: names of the decoder blocks, in order, such as `model.layers.0`.
        matrices: each block's linear maps, in the order of the modules.
        embedding: the checkpoint's tensor with the input embedding.
        head: the output head, or None where it is tied to the embedding.
    """

    def __init__(
        self,
        folder: Path,
        device: str = "cpu",
        names: Collection[str] | None = None,
        vocabulary: int | None = None,
    ) -> None:
        """Build the skeleton for sources with the tensors `names`; None: those of `folder`.

        `vocabulary` is their number of tokens; None: as the configuration says.

        Raises:
            UnsupportedModel: the family is not supported, `transformers` cannot build the model,
                or its weights are quantized.
        """
        self.device = torch.device(device)
        self.dtype = torch.float32 if self.device.type == "cpu" else torch.bfloat16
        config = read_config(folder)
        if vocabulary is not None:
            config.get_text_config(decoder=True).vocab_size = vocabulary
        self._skeleton = Skeleton(
            config,
            tensor_names(folder) if names is None else names,
            self.device,
            self.dtype,
        )
        self.config: Any = self._skeleton.config
        self.blocks = self._skeleton.blocks
        self._sites = {
            name: sites(self._skeleton.module(name), name, self._skeleton.stored)
            for name in self.blocks
        }
        self.matrices = {
            name: [site.ref for site in places] for name, places in self._sites.items()
        }
        self.embedding = self._skeleton.tensor_of(self._skeleton.embedding)
        self.head = (
            None
            if self._skeleton.tied
            else MatrixRef(self._skeleton.tensor_of(self._skeleton.head))
        )
        self._arguments: dict[tuple[int, ...], Any] = {}

    @property
    def max_length(self) -> int:
        """Longest sequence in tokens that the configuration allows."""
        return getattr(self.config, "max_position_embeddings", None) or 1 << 30

    def check(self, shapes: Mapping[str, Sequence[int]]) -> None:
        """Compare the checkpoint's tensors (name to shape) with those that config.json describes.

        Raises:
            InvalidCheckpoint: naming the first tensor that is missing or of another shape.
            UnsupportedModel: the weights are quantized.
        """
        self._skeleton.check(shapes)

    def _batches(self, sequences: int, length: int) -> Iterator[slice]:
        """Slices of the sequences that run together."""
        return _slices(sequences, self._tokens_per_step // length)

    def _pieces(self, tokens: int) -> Iterator[slice]:
        """Slices of the tokens whose logits are in memory at a time."""
        step = min(self._tokens_per_step, LOGITS_PER_STEP // self.config.vocab_size)
        return _slices(tokens, step)

    @property
    def _tokens_per_step(self) -> int:
        return TOKENS_PER_STEP[self.device.type]

    def _inputs(self, hidden: Tensor) -> Tensor:
        """A batch of the caller's hidden states, detached, on the model's device."""
        hidden = hidden.detach().to(self.device, self.dtype)
        return hidden.clone() if hidden.is_inference() else hidden

    @torch.no_grad()
    def embed(self, tokens: Tensor, source: TensorSource) -> Tensor:
        """Input of the first block, (sequences, length, hidden), for `tokens` of equal lengths."""
        weights = self._skeleton.body_weights(source, embedding=True)
        return torch.cat(
            [
                self._skeleton.embed(weights, tokens[rows].to(self.device))
                for rows in self._batches(*tokens.shape)
            ]
        )

    @torch.enable_grad()
    def embed_backward(self, tokens: Tensor, gradient: Tensor, source: TensorSource) -> None:
        """Backpropagate `gradient`, that of `embed`'s result, into weights that require it."""
        leaves = _DetachedWeights(self._skeleton.body_weights(source, embedding=True))
        if not leaves.wanted:
            return
        for rows in self._batches(*tokens.shape):
            hidden = self._skeleton.embed(leaves.weights, tokens[rows].to(self.device))
            if hidden.requires_grad:
                hidden.backward(self._inputs(gradient[rows]))
        leaves.backpropagate()

    @torch.no_grad()
    def run_block(
        self,
        index: int,
        hidden: Tensor,
        source: TensorSource,
        observe: Observer | None = None,
        out: Tensor | None = None,
    ) -> Tensor:
        """Outputs of block `index` for its inputs `hidden` (sequences, length, hidden).

        `observe` is called with every linear map's key and inputs; an expert's are those routed to
        it. Maps that share an input (q, k and v; gate and up) are observed consecutively, with the
        same tensor object. The outputs are written to `out`, which may be `hidden` itself; by
        default to a new tensor on the same device.
        """
        weights = self._skeleton.block_weights(index, source)
        out = torch.empty_like(hidden) if out is None else out
        with self._observed(index, observe, None):
            for rows in self._batches(*hidden.shape[:2]):
                out[rows] = self._call(index, weights, self._inputs(hidden[rows]))
        return out

    @torch.enable_grad()
    def backward_block(
        self,
        index: int,
        hidden: Tensor,
        gradient: Tensor,
        source: TensorSource,
        observe_inputs: Observer | None = None,
        observe_gradients: Observer | None = None,
    ) -> Tensor:
        """Gradient with respect to block `index`'s inputs `hidden` (sequences, length, hidden).

        Args:
            index: of the block.
            hidden: the inputs of `run_block`; the block runs again on them.
            gradient: with respect to the block's outputs, shape of `hidden`.
            source: weights; those that require gradients are backpropagated into.
            observe_inputs: called with every linear map's inputs, as in `run_block`.
            observe_gradients: called with the gradient at every linear map's outputs.
        """
        leaves = _DetachedWeights(self._skeleton.block_weights(index, source))
        result = torch.empty_like(gradient)
        with self._observed(index, observe_inputs, observe_gradients):
            for rows in self._batches(*hidden.shape[:2]):
                batch = self._inputs(hidden[rows]).requires_grad_()
                self._call(index, leaves.weights, batch).backward(self._inputs(gradient[rows]))
                assert batch.grad is not None
                result[rows] = batch.grad
        leaves.backpropagate()
        return result

    @torch.enable_grad()
    def record_block(
        self, index: int, hidden: Tensor, source: TensorSource
    ) -> tuple[Tensor, Backward]:
        """Outputs of block `index`, as of `run_block`, and its backward pass without running again.

        Its graph (`graph_bytes`) is in memory until both are dropped; all of `hidden` is one batch.
        """
        weights = self._skeleton.block_weights(index, source)
        inputs = self._inputs(hidden).requires_grad_()
        outputs = self._call(index, weights, inputs)

        def backward(gradient: Tensor) -> Tensor:
            outputs.backward(self._inputs(gradient))
            assert inputs.grad is not None
            return inputs.grad

        return outputs.detach(), backward

    def graph_bytes(self, tokens: int) -> int:
        """About what the graphs of all blocks hold for so many tokens: each linear map's inputs and
        outputs in float32, and as much again for what lies between the maps."""
        return 2 * 4 * tokens * sum(self._skeleton.width(name) for name in self.blocks)

    def _observed(self, index: int, inputs: Observer | None, gradients: Observer | None) -> Any:
        name = self.blocks[index]
        places = self._sites[name] if inputs is not None or gradients is not None else []
        return observed(self._skeleton.module(name), places, inputs, gradients)

    def _call(self, index: int, weights: Weights, hidden: Tensor) -> Tensor:
        shape = tuple(hidden.shape)
        if shape not in self._arguments:
            self._arguments[shape] = self._skeleton.arguments(shape)
        return self._skeleton.call_block(index, weights, hidden, self._arguments[shape][index])

    @torch.no_grad()
    def final_hidden(self, hidden: Tensor, source: TensorSource) -> Tensor:
        """The last block's outputs after the final norm: the head's inputs."""
        weights = self._skeleton.body_weights(source, embedding=False)
        out = torch.empty_like(hidden)
        for rows in self._batches(*hidden.shape[:2]):
            batch = self._inputs(hidden[rows])
            out[rows] = self._skeleton.finish(weights, batch.flatten(0, 1)).view(batch.shape)
        return out

    @torch.no_grad()
    def logits(self, hidden: Tensor, source: TensorSource) -> Iterator[Tensor]:
        """Logits of flat `hidden` (tokens, hidden): (tokens of a piece, vocabulary) float32."""
        weights = self._skeleton.head_weights(source)
        for piece in self._pieces(len(hidden)):
            yield self._skeleton.logits(weights, self._inputs(hidden[piece]))

    @torch.enable_grad()
    def backward_head(
        self, hidden: Tensor, source: TensorSource, loss: Loss
    ) -> tuple[float, Tensor]:
        """The loss, summed, and its gradient with respect to the last block's outputs `hidden`.

        Args:
            hidden: (sequences, length, hidden).
            source: weights; those that require gradients are backpropagated into.
            loss: called for a piece of the tokens at a time.
        """
        body = _DetachedWeights(self._skeleton.body_weights(source, embedding=False))
        head = _DetachedWeights(self._skeleton.head_weights(source))
        flat = hidden.flatten(0, 1)
        gradient = torch.empty(flat.shape, dtype=hidden.dtype, device=hidden.device)
        total = 0.0
        for piece in self._pieces(len(flat)):
            batch = self._inputs(flat[piece]).requires_grad_()
            final = self._skeleton.finish(body.weights, batch)
            value = loss(self._skeleton.logits(head.weights, final), piece)
            value.backward()
            total += float(value.detach())
            assert batch.grad is not None
            gradient[piece] = batch.grad
        body.backpropagate()
        head.backpropagate()
        return total, gradient.view(hidden.shape)


def _slices(count: int, step: int) -> Iterator[slice]:
    for begin in range(0, count, max(step, 1)):
        yield slice(begin, min(begin + max(step, 1), count))
