"""Calibration statistics: second moments of every matrix's inputs and output gradients.

The fine-tuned model runs forward over the calibration text block by block. If gradients are needed,
it then runs backward over a part of the text, from the weighted log likelihood of labels sampled by
its own predictions: the gradients' second moment is the Fisher information of a layer's outputs.
All moments are means per token of the text, so that they are comparable between layers.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Final

import torch
from torch import Tensor
from torch.nn import functional as F

from deltadock.compression.calibration.windows import CalibrationSet, spaced
from deltadock.compression.checkpoints import CheckpointPair, MatrixRef, TensorSource
from deltadock.compression.matrices import DeltaMatrix, changed_matrices
from deltadock.compression.model.forward import BlockwiseModel
from deltadock.compression.progress import ProgressReporter
from deltadock.compression.scratch import Scratch
from deltadock.words import counted

GRADIENT_TOKENS: Final = 32 * 2048
"""Tokens of the calibration text that run backward."""

SHORTEST_STATE: Final = 0.1
"""Length of a hidden state, relative to the median, from which on its gradient counts in full."""


def gram(rows: Tensor) -> Tensor:
    """`X^T X` (n, n) float32 of rows X (tokens, n).

    A GPU multiplies 16-bit rows by its tensor cores: their products are exact in float32, in which
    they are summed, some ten times as fast as float32 rows. Else blocks below the diagonal are
    copied from those above it.
    """
    if rows.is_cuda and rows.dtype.itemsize == 2:
        return torch.mm(rows.t(), rows, out_dtype=torch.float32)
    rows, size = rows.float(), rows.shape[1]
    step = max(64, -(-size // 4))
    product = rows.new_empty(size, size)
    for start in range(0, size, step):
        stop = start + step
        product[start:stop, start:] = rows[:, start:stop].t() @ rows[:, start:]
        product[stop:, start:stop] = product[start:stop, stop:].t()
    return product


@dataclass(slots=True)
class MomentCollector:
    """Second moments `X^T X` of linear maps' inputs X, as an observer of `BlockwiseModel`.

    Maps with the same input (q, k and v; gate and up) share one sum.

    Attributes:
        tokens: number of tokens that reached each map, by its key.
    """

    tokens: dict[str, int] = field(default_factory=dict)
    _sums: dict[str, Tensor] = field(default_factory=dict)
    _owner: dict[str, str] = field(default_factory=dict)
    _last: tuple[Tensor, str] | None = None

    def __call__(self, key: str, inputs: Tensor) -> None:
        """Add one batch of a map's inputs (..., h_in)."""
        self.tokens[key] = self.tokens.get(key, 0) + inputs[..., 0].numel()
        if self._last is not None and self._last[0] is inputs:
            self._owner[key] = self._last[1]
            return
        self._owner[key] = key
        self._last = (inputs, key)
        product = gram(inputs.reshape(-1, inputs.shape[-1])).double()
        self._sums[key] = self._sums[key] + product if key in self._sums else product

    def owner(self, key: str) -> str:
        """The first of the maps that share the inputs of this one."""
        return self._owner[key]

    def moment(self, key: str) -> Tensor:
        """Sum over the tokens seen so far, (h_in, h_in) float64."""
        return self._sums[self._owner[key]]

    def filled_moment(self, ref: MatrixRef, block: Iterable[MatrixRef]) -> tuple[Tensor, list[str]]:
        """The moment of a map, of full rank also for experts that few tokens reach.

        An expert's moment has full rank from `h_in` tokens on; missing tokens are filled up with
        the mean moment of the layer's experts.

        Args:
            ref: the map.
            block: the maps of its block, with the other experts' among them.

        Returns:
            The moment, and what was filled up, in words.
        """
        if ref.mixture is None:
            return self.moment(ref.key), []
        peers = [peer.key for peer in block if peer.mixture == ref.mixture]
        seen = [key for key in peers if self.tokens.get(key)]
        total = torch.stack([self.moment(key) for key in seen]).sum(0)
        count = self.tokens.get(ref.key, 0)
        missing = len(total) - count
        if missing <= 0:
            return self.moment(ref.key), []
        filling = total * (missing / sum(self.tokens[key] for key in seen))
        moment = filling + self.moment(ref.key) if count else filling
        return moment, [
            f"{counted(count, 'token')} reached this expert; its moment is filled up to "
            f"{len(total)} tokens with the mean of the layer's experts"
        ]


class Statistics:
    """Moments of the matrices, loaded from the scratch space that `collect` stores them in.

    Attributes:
        matrices: in the order of the model, the embedding last.
        notes: deviations during calibration, by the matrix's key.
    """

    def __init__(self, scratch: Scratch, matrices: Sequence[DeltaMatrix]) -> None:
        """See `collect`."""
        self._scratch = scratch
        self.matrices = list(matrices)
        self.notes: dict[str, list[str]] = {}
        self._owner: dict[str, str] = {}

    def put_inputs(self, key: str, owner: str, moment: Tensor, held: Tensor) -> None:
        """Store the moments of a map's inputs; those of one `owner` are stored once."""
        self._owner[key] = owner
        if f"inputs {owner}" not in self._scratch:
            self._scratch.put(f"inputs {owner}", moment.float())
            self._scratch.put(f"held {owner}", held.float())

    def last_states(self) -> tuple[Tensor, Tensor] | None:
        """The windows that ran backward, (n, length), and the last block's outputs for them,
        (n, length, hidden); None without gradients."""
        if "windows" not in self._scratch:
            return None
        return self._scratch.get("windows"), self._scratch.get("last states")

    def held_last_states(self) -> Tensor:
        """The last block's outputs for the reporting windows, (n, length, hidden)."""
        return self._scratch.get("held last states")

    def inputs(self, key: str, device: torch.device | str = "cpu") -> Tensor:
        """Moment of the inputs, (h_in, h_in) float64; of an embedding, of its rows' gradients."""
        return self._scratch.get(f"inputs {self._owner.get(key, key)}", device).double()

    def held_inputs(self, key: str, device: torch.device | str = "cpu") -> Tensor | None:
        """Moment of the inputs on the reporting windows, for the report only.

        (h_in, h_in) float64; None for an embedding.
        """
        name = f"held {self._owner.get(key, key)}"
        return self._scratch.get(name, device).double() if name in self._scratch else None

    def outputs(self, key: str, device: torch.device | str = "cpu") -> Tensor:
        """Moment of the output gradients, (h_out, h_out) float64; of an embedding or head, its
        diagonal (h_out,).
        """
        return self._scratch.get(f"outputs {key}", device).double()


def collect(
    pair: CheckpointPair,
    model: BlockwiseModel,
    data: CalibrationSet,
    scratch: Scratch,
    *,
    gradients: bool,
    seed: int,
    progress: ProgressReporter,
) -> Statistics:
    """Collect the moments of all matrices that differ from the base.

    Args:
        pair: the two checkpoints.
        model: skeleton of the fine-tuned model.
        data: the calibration text.
        scratch: stores the moments, and the blocks' inputs for the backward pass.
        gradients: collect the output moments too, and the embedding's.
        seed: of the sampled labels.
        progress: reports every block.
    """
    statistics = Statistics(scratch, changed_matrices(pair, model, with_embedding=gradients))
    source = pair.finetuned
    wanted = max(1, GRADIENT_TOKENS // data.train.shape[1]) if gradients else 0
    sequences = spaced(len(data.train), wanted)
    forward = _ForwardPass(model, source, data, statistics, scratch)
    forward.run(sequences, progress)
    if gradients:
        backward = _BackwardPass(model, source, data.train[sequences], statistics, scratch, seed)
        backward.run(progress)
    return statistics


class _ForwardPass:
    """Collects the moments of every matrix's inputs."""

    def __init__(
        self,
        model: BlockwiseModel,
        source: TensorSource,
        data: CalibrationSet,
        statistics: Statistics,
        scratch: Scratch,
    ) -> None:
        self._model, self._source, self._scratch = model, source, scratch
        self._data, self._statistics = data, statistics

    def run(self, sequences: Tensor, progress: ProgressReporter) -> None:
        """Store all input moments, and the blocks' inputs for `sequences` (n,) int64."""
        model, source, scratch = self._model, self._source, self._scratch
        states = model.embed(self._data.train, source)
        held = model.embed(self._data.report, source)
        count = len(model.blocks)
        for index, name in enumerate(model.blocks):
            progress.report("inputs", index, count, f"block {index + 1} of {count}, inputs")
            if len(sequences):
                scratch.put(f"states {index}", states[sequences])
            train_moments, held_moments = MomentCollector(), MomentCollector()
            states = model.run_block(index, states, source, train_moments, out=states)
            held = model.run_block(index, held, source, held_moments, out=held)
            refs = model.matrices[name]
            for matrix in self._statistics.matrices:
                if matrix.block == index:
                    self._put(matrix.ref, refs, train_moments, held_moments)
        progress.report("inputs", count, count, "output head, inputs")
        scratch.put("held last states", held)
        if len(sequences):
            scratch.put("windows", self._data.train[sequences])
            scratch.put("last states", states[sequences])
        tokens, held_tokens = states[..., 0].numel(), held[..., 0].numel()
        for matrix in self._statistics.matrices:
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
        train: MomentCollector,
        held: MomentCollector,
    ) -> None:
        moment, notes = train.filled_moment(ref, refs)
        if not moment.any():
            notes = [*notes, "its inputs on the calibration text are all zero; identity is used"]
        self._statistics.notes[ref.key] = notes
        held_moment, _ = held.filled_moment(ref, refs)
        self._statistics.put_inputs(
            ref.key,
            ref.key if ref.mixture is not None else train.owner(ref.key),
            moment / self._data.train.numel(),
            held_moment / self._data.report.numel(),
        )


class _BackwardPass:
    """Collects the moments of the gradients at every matrix's outputs."""

    def __init__(
        self,
        model: BlockwiseModel,
        source: TensorSource,
        tokens: Tensor,
        statistics: Statistics,
        scratch: Scratch,
        seed: int,
    ) -> None:
        self._model, self._source, self._tokens = model, source, tokens
        self._scratch = scratch
        self._statistics, self._seed = statistics, seed

    def run(self, progress: ProgressReporter) -> None:
        """Store all output moments."""
        model, source, scratch = self._model, self._source, self._scratch
        count = len(model.blocks)
        progress.report("gradients", 0, count + 1, "output head, gradients")
        states = scratch.get("last states", model.device)
        variance, gradient = self._head(states)
        bound_gradient(gradient, states)
        for index in reversed(range(count)):
            message = f"block {index + 1} of {count}, gradients"
            progress.report("gradients", count - index, count + 1, message)
            moments = MomentCollector()
            states = scratch.get(f"states {index}", model.device)
            gradient = model.backward_block(
                index, states, gradient, source, observe_gradients=moments
            )
            bound_gradient(gradient, states)
            refs = model.matrices[model.blocks[index]]
            for matrix in self._statistics.matrices:
                if matrix.block == index:
                    moment, _ = moments.filled_moment(matrix.ref, refs)
                    reached = moments.tokens.get(matrix.ref.key, 0)
                    if matrix.ref.mixture is not None:
                        reached = max(reached, len(moment))
                    scratch.put(f"outputs {matrix.ref.key}", (moment / max(reached, 1)).float())
        for matrix in self._statistics.matrices:
            if matrix.role == "head":
                scratch.put(f"outputs {matrix.ref.key}", variance)
            elif matrix.role == "embedding":
                self._embedding(matrix.ref.key, gradient, variance)

    def _head(self, states: Tensor) -> tuple[Tensor, Tensor]:
        """Mean `p (1 - p)` of each token (vocabulary,), and the gradient at the last block."""
        generator = torch.Generator(self._model.device).manual_seed(self._seed)
        variance = torch.zeros(())

        def loss(logits: Tensor, _piece: slice) -> Tensor:
            nonlocal variance
            p = logits.detach().softmax(-1)
            sums = (p * (1 - p)).sum(0).double()
            variance = variance.to(sums) + sums
            labels, weights = draw(p, generator)
            return weights @ F.cross_entropy(logits, labels, reduction="none")

        _, gradient = self._model.backward_head(states, self._source, loss)
        return variance.cpu() / self._tokens.numel(), gradient

    def _embedding(self, key: str, gradient: Tensor, variance: Tensor) -> None:
        """Store an embedding's two moments: a diagonal (rows,) and (hidden, hidden).

        As a lookup, an error e_v of row v costs `f_v e_v B e_v^T`, with the token's frequency f
        and the gradients' moment B. Tied to the head it costs `b_v e_v A e_v^T` as well. The sum is
        approximated by one product: row weights with both traces, and the mean of both moments.
        """
        scratch, count = self._scratch, self._tokens.numel()
        table = self._source.tensor(key)
        size = len(table)
        frequency = torch.bincount(self._tokens.flatten(), minlength=size).double() / count
        moment = _second_moment(gradient) / count * self._multiplier(table) ** 2
        rows, columns = frequency * moment.trace(), moment
        if f"as head {key}" in scratch:
            as_head = scratch.get(f"as head {key}").double()
            variance = variance[:size]
            rows = rows + variance * as_head.trace()
            first, second = frequency.sum() * moment.trace(), variance.sum() * as_head.trace()
            columns = (
                moment * (first / moment.trace().clamp_min(1e-300))
                + as_head * (second / as_head.trace().clamp_min(1e-300))
            ) / (first + second).clamp_min(1e-300)
        scratch.put(f"outputs {key}", rows / columns.trace().clamp_min(1e-300))
        scratch.put(f"inputs {key}", columns)

    def _multiplier(self, table: Tensor) -> float:
        """Factor that the model multiplies its embeddings by (Gemma: the root of hidden size)."""
        tokens = self._tokens[:1]
        before = table[tokens.flatten()].double()
        after = self._model.embed(tokens, self._source).flatten(0, 1).double().cpu()
        return float((before * after).sum() / before.square().sum().clamp_min(1e-300))


def bound_gradient(gradient: Tensor, states: Tensor) -> None:
    """Scale gradients at short hidden states (..., n), in place, to what longer ones would have.

    A norm divides by its input's length, so that the gradient at a state of almost none (`bos` and
    padding tokens often have rows of zeros) exceeds all others by orders, while no finite error
    there costs more than elsewhere: the norm's output is bounded. Such a position would decide the
    second moments alone, at every norm more. Its gradient is taken as if the state were of
    `SHORTEST_STATE` of the median length.
    """
    length = torch.linalg.vector_norm(states, dim=-1, keepdim=True, dtype=torch.float32)
    least = (SHORTEST_STATE * length.median()).clamp_min(torch.finfo(torch.float32).tiny)
    gradient *= (length / least).clamp_max(1).to(gradient)


def _second_moment(states: Tensor) -> Tensor:
    """`X^T X` of (..., n), (n, n) float64, computed in pieces."""
    flat = states.flatten(0, -2)
    size = flat.shape[-1]
    total = torch.zeros(size, size, dtype=torch.float64, device=flat.device)
    for piece in flat.split(1 << 14):
        total += gram(piece).double()
    return total.cpu()


def draw(p: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draw one label (n,) for each row of probabilities (n, vocabulary), and its weight (n,).

    The weighted gradients `sqrt(p / q) (p - e)` at the logits, where e is the label's unit vector
    and q the probability that it is drawn with, have the Fisher information as their second moment
    for any q. With q in proportion to `p |p - e|^2` they all have the same length: a confident
    prediction counts a little at every draw, instead of a lot at a rare one.
    """
    rounding = torch.finfo(p.dtype).eps ** 2
    squares = (1 - 2 * p + p.square().sum(1, keepdim=True)).clamp_min(rounding)
    shares = p * squares
    # Inverting the sums takes a fraction of what `torch.multinomial` does on a CPU.
    sums = shares.cumsum(1)
    levels = torch.rand(len(p), 1, generator=generator, device=p.device) * sums[:, -1:]
    labels = torch.searchsorted(sums, levels, right=True).clamp_max(p.shape[1] - 1)
    return labels.squeeze(1), (sums[:, -1:] / squares.gather(1, labels)).sqrt().squeeze(1)
