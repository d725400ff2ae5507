"""What calibration tells of every matrix: second moments of inputs, and of gradients at outputs.

The fine-tuned model runs forwards over the calibration text block by block. Where gradients are
asked for, it then runs backwards over a part of it, from the log likelihood of tokens sampled from
its own predictions: their second moment is the Fisher information of a layer's outputs.
All moments are means per token of the text, so that they are commensurable between layers.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from deltadock.compression.calibration.windows import CalibrationSet, spaced
from deltadock.compression.model.forward import BlockwiseModel
from deltadock.compression.model.weights import MatrixRef
from deltadock.compression.run import Run
from deltadock.compression.scratch import Scratch
from deltadock.compression.statistics.expert_moments import ExpertMoments
from deltadock.compression.statistics.moments import MomentCollector

GRADIENT_TOKENS: Final = 32 * 2048
"""Tokens of the calibration text that gradients are taken on."""

Role = Literal["linear", "head", "embedding"]


@dataclass(frozen=True, slots=True)
class Matrix:
    """A matrix that can be compressed: where it is stored, and what it does in the model.

    Attributes:
        ref: the map in the checkpoint.
        role: a layer of a block, the output head, or the input embedding (perhaps tied to it).
        block: number of the block; the head and the embedding follow the last.
    """

    ref: MatrixRef
    role: Role
    block: int


class Statistics:
    """Moments of the matrices, read from where `collect` has put them.

    Attributes:
        matrices: in the order of the model, the embedding last.
        notes: what did not go as planned, by the matrix's key.
    """

    def __init__(self, scratch: Scratch, matrices: Sequence[Matrix]) -> None:
        """See `collect`."""
        self.scratch = scratch
        self.matrices = list(matrices)
        self.notes: dict[str, list[str]] = {}

    def inputs(self, key: str) -> Tensor:
        """(h_in, h_in) float64: of the inputs; of the gradients behind an embedding's rows."""
        return self.scratch.get(f"inputs {key}").double()

    def held_inputs(self, key: str) -> Tensor | None:
        """(h_in, h_in) float64: of the inputs on held-out tokens; None for an embedding."""
        name = f"held {key}"
        return self.scratch.get(name).double() if name in self.scratch else None

    def outputs(self, key: str) -> Tensor:
        """(h_out, h_out) float64: of the gradients at the outputs; of an embedding or head its
        diagonal (h_out,).
        """
        return self.scratch.get(f"outputs {key}").double()


def collect(
    run: Run,
    model: BlockwiseModel,
    data: CalibrationSet,
    scratch: Scratch,
    *,
    gradients: bool,
    progress: Callable[[float, str], None],
) -> Statistics:
    """Gather the moments of all matrices that differ from the base.

    Args:
        run: the two checkpoints.
        model: skeleton of the fine-tuned model.
        data: the calibration text.
        scratch: takes the moments, and the blocks' inputs on the way back.
        gradients: whether the outputs' moments are wanted too, and the embedding with them.
        progress: told the share done and what is being done.
    """
    matrices = matrices_of(run, model, with_embedding=gradients)
    result = Statistics(scratch, matrices)
    forward = _Forward(run, model, data, result)
    share = 0.5 if gradients else 1.0
    wanted = max(1, GRADIENT_TOKENS // data.train.shape[1]) if gradients else 0
    sequences = spaced(len(data.train), wanted)
    forward.run(sequences, lambda done, text: progress(share * done, text))
    if gradients:
        _Backward(run, model, data.train[sequences], result).run(
            lambda done, text: progress(share + (1 - share) * done, text)
        )
    return result


def matrices_of(run: Run, model: BlockwiseModel, *, with_embedding: bool) -> list[Matrix]:
    """The matrices that differ from the base, in the order of the model, the embedding last."""
    found = [
        Matrix(ref, "linear", index)
        for index, name in enumerate(model.blocks)
        for ref in model.matrices[name]
    ]
    if model.head is not None:
        found.append(Matrix(model.head, "head", len(model.blocks)))
    if with_embedding:
        found.append(Matrix(MatrixRef(model.embedding), "embedding", len(model.blocks) + 1))
    return [m for m in found if run.changed(m.ref.name) and run.is_float(m.ref.name)]


class _Forward:
    """The pass that sees every layer's inputs."""

    def __init__(
        self, run: Run, model: BlockwiseModel, data: CalibrationSet, result: Statistics
    ) -> None:
        self._run, self._model, self._data, self._result = run, model, data, result

    def run(self, sequences: Tensor, progress: Callable[[float, str], None]) -> None:
        """Put every matrix's input moments, and the blocks' inputs for `sequences` (n,) int64."""
        model, source, scratch = self._model, self._run.finetuned, self._result.scratch
        states = model.embed(self._data.train, source)
        held = model.embed(self._data.held_out, source)
        count = len(model.blocks)
        for index, name in enumerate(model.blocks):
            progress(index / (count + 1), f"block {index + 1} of {count}, inputs")
            if len(sequences):
                scratch.put(f"states {index}", states[sequences])
            seen, seen_held = ExpertMoments(MomentCollector()), ExpertMoments(MomentCollector())
            states = model.run_block(index, states, source, seen, out=states)
            held = model.run_block(index, held, source, seen_held, out=held)
            refs = model.matrices[name]
            for matrix in self._result.matrices:
                if matrix.block == index:
                    self._put(matrix.ref, refs, seen, seen_held)
        progress(count / (count + 1), "output head, inputs")
        if len(sequences):
            scratch.put(f"states {count}", states[sequences])
        tokens, held_tokens = states[..., 0].numel(), held[..., 0].numel()
        for matrix in self._result.matrices:
            key, tied = matrix.ref.key, model.head is None
            if matrix.role == "head" or (matrix.role == "embedding" and tied):
                moment = _second_moment(model.final_hidden(states, source)) / tokens
                scratch.put(f"{'as head' if tied else 'inputs'} {key}", moment)
            if matrix.role == "head":
                moment = _second_moment(model.final_hidden(held, source)) / held_tokens
                scratch.put(f"held {key}", moment)

    def _put(
        self,
        ref: MatrixRef,
        refs: Sequence[MatrixRef],
        seen: ExpertMoments,
        held: ExpertMoments,
    ) -> None:
        moment, notes = seen.moment(ref, refs)
        if not moment.any():
            notes = [*notes, "its inputs on the calibration text are all zero, so they count alike"]
        self._result.notes[ref.key] = notes
        scratch = self._result.scratch
        scratch.put(f"inputs {ref.key}", (moment / self._data.train.numel()).float())
        moment, _ = held.moment(ref, refs)
        scratch.put(f"held {ref.key}", (moment / self._data.held_out.numel()).float())


class _Backward:
    """The pass that sees the gradients at every layer's outputs."""

    def __init__(self, run: Run, model: BlockwiseModel, tokens: Tensor, result: Statistics) -> None:
        self._run, self._model, self._tokens, self._result = run, model, tokens, result

    def run(self, progress: Callable[[float, str], None]) -> None:
        """Put every matrix's output moments."""
        model, source, scratch = self._model, self._run.finetuned, self._result.scratch
        count = len(model.blocks)
        progress(0.0, "output head, gradients")
        spread, gradient = self._head(scratch.get(f"states {count}"))
        for index in reversed(range(count)):
            progress((count - index) / (count + 1), f"block {index + 1} of {count}, gradients")
            seen = ExpertMoments(MomentCollector())
            gradient = model.backward_block(
                index, scratch.get(f"states {index}"), gradient, source, observe_gradients=seen
            )
            refs = model.matrices[model.blocks[index]]
            for matrix in self._result.matrices:
                if matrix.block == index:
                    moment, _ = seen.moment(matrix.ref, refs)
                    reached = seen.tokens.get(matrix.ref.key, 0)
                    if matrix.ref.mixture is not None:
                        reached = max(reached, len(moment))
                    scratch.put(f"outputs {matrix.ref.key}", (moment / max(reached, 1)).float())
        for matrix in self._result.matrices:
            if matrix.role == "head":
                scratch.put(f"outputs {matrix.ref.key}", spread)
            elif matrix.role == "embedding":
                self._embedding(matrix.ref.key, gradient, spread)

    def _head(self, states: Tensor) -> tuple[Tensor, Tensor]:
        """Mean `p (1 - p)` of each token (vocabulary,), and the gradient at the last block."""
        generator = torch.Generator(self._model.device).manual_seed(self._run.options.seed)
        spread = torch.zeros(0)

        def loss(logits: Tensor, _piece: slice) -> Tensor:
            nonlocal spread
            chances = logits.detach().softmax(-1)
            sums = (chances * (1 - chances)).sum(0).double().cpu()
            spread = sums if spread.numel() == 0 else spread + sums
            drawn = torch.multinomial(chances, 1, generator=generator).squeeze(1)
            return F.cross_entropy(logits, drawn, reduction="sum")

        _, gradient = self._model.backward_head(states, self._run.finetuned, loss)
        return spread / self._tokens.numel(), gradient

    def _embedding(self, key: str, gradient: Tensor, spread: Tensor) -> None:
        """Two moments that stand for an embedding's: `diag(rows)` and (hidden, hidden).

        As a lookup, row v costs `f_v e_v B e_v^T`, with the token's frequency f and the gradients'
        moment B. Tied to the head it costs `b_v e_v A e_v^T` besides. Of that sum the nearest
        product is kept: row weights with both traces, and the mean of the two moments.
        """
        scratch, count = self._result.scratch, self._tokens.numel()
        table = self._run.finetuned.tensor(key)
        size = len(table)
        frequency = torch.bincount(self._tokens.flatten(), minlength=size).double() / count
        moment = _second_moment(gradient) / count * self._multiplier(table) ** 2
        rows, columns = frequency * moment.trace(), moment
        if f"as head {key}" in scratch:
            as_head = scratch.get(f"as head {key}").double()
            spread = spread[:size]
            rows = rows + spread * as_head.trace()
            first, second = frequency.sum() * moment.trace(), spread.sum() * as_head.trace()
            columns = (
                moment * (first / moment.trace().clamp_min(1e-300))
                + as_head * (second / as_head.trace().clamp_min(1e-300))
            ) / (first + second).clamp_min(1e-300)
        scratch.put(f"outputs {key}", rows / columns.trace().clamp_min(1e-300))
        scratch.put(f"inputs {key}", columns)

    def _multiplier(self, table: Tensor) -> float:
        """What the model multiplies its embeddings by before the first block (Gemma does)."""
        some = self._tokens[:1]
        before = table[some.flatten()].double()
        after = self._model.embed(some, self._run.finetuned).flatten(0, 1).double().cpu()
        return float((before * after).sum() / before.square().sum().clamp_min(1e-300))


def _second_moment(states: Tensor) -> Tensor:
    """`X^T X` of (..., n), (n, n) float64, a piece at a time."""
    flat = states.flatten(0, -2)
    total = torch.zeros(flat.shape[-1], flat.shape[-1], dtype=torch.float64)
    for piece in flat.split(1 << 14):
        rows = piece.float()
        total += (rows.t() @ rows).double().cpu()
    return total
