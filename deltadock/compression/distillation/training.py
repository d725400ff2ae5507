"""Scale distillation: the scales trained end to end towards the fine-tuned model's predictions.

The codes stay as they are, and so does every byte count. The loss is the KL divergence from the
fine-tuned model on calibration text; gradients are checkpointed by block, so that one block's
weights are in memory at a time. The outcome is kept only where it is better on held-out text.
"""

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Final

import torch
from torch import Tensor
from torch.nn import functional as F

from deltadock.artifacts.encodings import DELTA_ENCODINGS, Encoded
from deltadock.compression.calibration.windows import CalibrationSet, spaced
from deltadock.compression.distillation.trainable import TrainableDelta, flat, ones
from deltadock.compression.model.forward import BlockwiseModel
from deltadock.compression.model.weights import TensorSource
from deltadock.compression.run import Run
from deltadock.compression.scratch import Scratch

STEPS: Final = 80
TOKENS_PER_STEP: Final = 1024
HELD_TOKENS: Final = 8192
LEARNING_SHARE: Final = 0.25
"""Learning rate of the factors, as a share of the delta's relative error: what is already close
must not be moved by more than it is wrong."""


class _Student:
    """The compressed model's weights as functions of the scales' factors."""

    def __init__(
        self,
        run: Run,
        encoded: Mapping[str, Encoded],
        model: BlockwiseModel,
        scratch: Scratch,
    ) -> None:
        self._run, self._encoded = run, encoded
        self.deltas = {
            name: TrainableDelta(one, scratch, name, model.device)
            for name, one in encoded.items()
            if _stands_for_delta(one)
        }
        self.factors = ones(self.deltas, model.device)

    def __contains__(self, name: object) -> bool:
        return name in self._run.finetuned

    def tensor(self, name: str) -> Tensor:
        """The student's tensor; of the compressed ones in float32, with gradients."""
        encoded = self._encoded.get(name)
        if encoded is not None and encoded.record["kind"] == "alias":
            return self.tensor(encoded.record["of"])
        if name in self.deltas:
            delta = self.deltas[name](self.factors[name])
            tensor = self._run.base.tensor(name).to(delta.device, torch.float32) + delta
            added = self._run.added_rows(name)
            if added:
                rows = self._run.finetuned.tensor(name)[-added:].to(tensor)
                tensor = torch.cat([tensor, rows])
            return tensor
        if encoded is not None:
            return self._run.finetuned.tensor(name)
        return self._run.base.tensor(name)


def _stands_for_delta(encoded: Encoded) -> bool:
    record = encoded.record
    if record["kind"] == "new-rows":
        return record["parts"][0] is not None
    return record["kind"] in DELTA_ENCODINGS


def distill(
    run: Run,
    model: BlockwiseModel,
    data: CalibrationSet,
    encoded: Mapping[str, Encoded],
    progress: Callable[[float, str], None],
) -> tuple[dict[str, Encoded], dict[str, float]]:
    """Train the scales of `encoded`.

    Args:
        run: the two checkpoints.
        model: skeleton of the fine-tuned model.
        data: the calibration text; what is held out decides whether the outcome is kept.
        encoded: the tensors' encodings.
        progress: told the share done and what is being done.

    Returns:
        The encodings with their trained scales, or as they were; and the KL divergence on held-out
        text `before` and `after`, with `kept` 1 or 0.
    """
    with Scratch() as scratch:
        return _distill(run, model, data, encoded, progress, scratch)


def _distill(
    run: Run,
    model: BlockwiseModel,
    data: CalibrationSet,
    encoded: Mapping[str, Encoded],
    progress: Callable[[float, str], None],
    scratch: Scratch,
) -> tuple[dict[str, Encoded], dict[str, float]]:
    student = _Student(run, encoded, model, scratch)
    teacher = _Teacher(run, model, scratch)
    size = max(1, TOKENS_PER_STEP // data.train.shape[1])
    held_windows = max(1, HELD_TOKENS // data.held_out.shape[1])
    held = data.held_out[spaced(len(data.held_out), held_windows)]
    generator = torch.Generator().manual_seed(run.options.seed)
    progress(0.0, "measuring before distillation")
    held_kl = partial(_held_out_kl, model, held, student, teacher)
    before = held_kl()
    if not any(student.factors.values()):
        return dict(encoded), {"before": before, "after": before, "kept": 0.0}
    wrong = max(before, 0.0) / max(_without(student, held_kl), 1e-30)
    rate = LEARNING_SHARE * min(1.0, math.sqrt(wrong))
    optimizer = torch.optim.Adam(list(flat(student.factors)), lr=rate)
    for step in range(STEPS):
        progress(step / STEPS, f"distillation, step {step + 1} of {STEPS}")
        for group in optimizer.param_groups:
            group["lr"] = rate * (1 + math.cos(math.pi * step / STEPS)) / 2
        chosen = torch.randperm(len(data.train), generator=generator)[:size]
        _accumulate(model, data.train[chosen], student, teacher)
        optimizer.step()
        optimizer.zero_grad()
    after = held_kl()
    figures = {"before": before, "after": after, "kept": float(after < before)}
    if not figures["kept"]:
        return dict(encoded), figures
    trained = {
        name: student.deltas[name].rescaled(student.factors[name])
        if name in student.deltas
        else one
        for name, one in encoded.items()
    }
    return trained, figures


@torch.no_grad()
def _without(student: _Student, held_kl: Callable[[], float]) -> float:
    """The KL divergence that the compressed deltas make good: that without them."""
    for factor in flat(student.factors):
        factor.zero_()
    kl = held_kl()
    for factor in flat(student.factors):
        factor.fill_(1.0)
    return kl


def _forward(model: BlockwiseModel, tokens: Tensor, source: TensorSource) -> list[Tensor]:
    """Every block's inputs, and the last block's outputs."""
    states = [model.embed(tokens, source)]
    for index in range(len(model.blocks)):
        states.append(model.run_block(index, states[-1], source))
    return states


class _Teacher:
    """The fine-tuned model's predictions; its last hidden states are kept for the next visit."""

    def __init__(self, run: Run, model: BlockwiseModel, scratch: Scratch) -> None:
        self._source, self._model, self._scratch = run.finetuned, model, scratch

    def __call__(self, windows: Tensor) -> Callable[[slice], Tensor]:
        """Log probabilities (tokens, vocabulary) of any piece of `windows`."""
        keys = [f"teacher {window.tolist()}" for window in windows]
        new = [k for k, key in enumerate(keys) if key not in self._scratch]
        if new:
            hidden = _forward(self._model, windows[new], self._source)[-1]
            final = self._model.final_hidden(hidden, self._source)
            for k, states in zip(new, final, strict=True):
                self._scratch.put(keys[k], states)
        states = torch.cat([self._scratch.get(key, self._model.device) for key in keys])

        def target(piece: slice) -> Tensor:
            logits = list(self._model.logits(states[piece], self._source))
            return F.log_softmax(torch.cat(logits), dim=-1)

        return target


def _accumulate(
    model: BlockwiseModel, tokens: Tensor, student: _Student, teacher: _Teacher
) -> None:
    """Add the gradients of the mean KL divergence on `tokens` to the factors."""
    target = teacher(tokens)
    states = _forward(model, tokens, student)

    def loss(logits: Tensor, piece: slice) -> Tensor:
        guess = F.log_softmax(logits, dim=-1)
        return F.kl_div(guess, target(piece), reduction="sum", log_target=True) / tokens.numel()

    _, gradient = model.backward_head(states.pop(), student, loss)
    for index in reversed(range(len(model.blocks))):
        gradient = model.backward_block(index, states.pop(), gradient, student)
    model.embed_backward(tokens, gradient, student)


@torch.no_grad()
def _held_out_kl(
    model: BlockwiseModel, tokens: Tensor, student: _Student, teacher: _Teacher
) -> float:
    target = teacher(tokens)
    hidden = model.final_hidden(_forward(model, tokens, student)[-1], student).flatten(0, 1)
    total, seen = 0.0, 0
    for logits in model.logits(hidden, student):
        piece = slice(seen, seen + len(logits))
        guess = F.log_softmax(logits, dim=-1)
        total += float(F.kl_div(guess, target(piece), reduction="sum", log_target=True))
        seen += len(logits)
    return total / seen
