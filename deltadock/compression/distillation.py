"""Scale distillation: train the scales end to end towards the fine-tuned model's predictions.

The factors of `trainable_delta` are relative, so one learning rate suits all matrices. The loss is
the KL divergence from the fine-tuned model on calibration text.

Where the device has room, packed student and teacher stay on it, and a step unpacks each tensor
once and keeps the graphs of all blocks. Else one block's weights are in memory at a time: a step
unpacks them for the forward and again for the backward pass, which repeats the forward. Both give
the same scales. The result is kept only if it is better on windows that neither train nor are
reported. Scales whose outputs are not finite there are not trained: their gradients are not either.
"""

import math
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Final

import torch
from torch import Tensor
from torch.nn import functional as F

from deltadock.artifacts.encodings import DELTA_ENCODINGS, Encoded
from deltadock.compression.calibration.windows import CalibrationSet, spaced
from deltadock.compression.checkpoints import CheckpointPair, CheckpointReader, TensorSource
from deltadock.compression.model.forward import Backward, BlockwiseModel
from deltadock.compression.quality import check_finite
from deltadock.compression.residence import DeviceMemory, device_budget
from deltadock.compression.scratch import Scratch
from deltadock.compression.trainable_delta import TrainableDelta, flatten_factors, unit_factors

STEPS: Final = 80
TOKENS_PER_STEP: Final = 1024
CHOOSE_TOKENS: Final = 8192
RELATIVE_RATE: Final = 0.25
"""Learning rate of the factors, relative to the delta's relative error: a step must not be larger
than the error that it is to remove."""


def distill(
    pair: CheckpointPair,
    model: BlockwiseModel,
    data: CalibrationSet,
    encoded: Mapping[str, Encoded],
    seed: int,
    progress: Callable[[float, str], None],
    known: tuple[Tensor, Tensor] | None = None,
    scratch_folder: Path | None = None,
) -> tuple[dict[str, Encoded], dict[str, float]]:
    """Train the scales of `encoded`.

    Args:
        pair: the two checkpoints.
        model: skeleton of the fine-tuned model.
        data: the calibration text; its choosing windows decide whether the result is kept.
        encoded: encodings by tensor name.
        seed: of the order of the windows.
        progress: called at every step with the fraction done and a message.
        known: windows (n, length), and the fine-tuned model's last states (n, length, hidden) for
            them, which need not be computed again.
        scratch_folder: as for `compress`.

    Returns:
        The encodings, with trained scales if they are better; and the KL divergence on the
        choosing windows `before` and `after`, with `kept` 1 or 0; and `resident` 1 or 0, whether
        student and teacher stayed on the device.

    Raises:
        InvalidCalibration: the fine-tuned model's outputs are not finite.
    """
    with Scratch(parent=scratch_folder) as scratch:
        memory = DeviceMemory(scratch, model.device, device_budget(model.device))
        student = _Student(pair, encoded, memory)
        teacher = _Teacher(pair.finetuned, model, memory, known)
        size = max(1, TOKENS_PER_STEP // data.train.shape[1])
        windows = max(1, CHOOSE_TOKENS // data.choose.shape[1])
        choosing = data.choose[spaced(len(data.choose), windows)]
        generator = torch.Generator().manual_seed(seed)
        progress(0.0, "measuring before distillation")
        choosing_kl = partial(_mean_kl, model, choosing, student, teacher)
        before = choosing_kl()
        if not any(student.factors.values()) or not math.isfinite(before):
            figures = {"before": before, "after": before, "kept": 0.0}
            return dict(encoded), figures | {"resident": float(memory.complete)}
        relative_error = max(before, 0.0) / max(_kl_without_deltas(student, choosing_kl), 1e-30)
        rate = RELATIVE_RATE * min(1.0, math.sqrt(relative_error))
        optimizer = torch.optim.Adam(list(flatten_factors(student.factors)), lr=rate)
        needed = student.unpacked_bytes() + model.graph_bytes(size * data.train.shape[1])
        resident = memory.complete and needed <= memory.free
        student.unpack_once = resident
        place = "" if resident else ", block by block"
        for step in range(STEPS):
            progress(step / STEPS, f"distillation, step {step + 1} of {STEPS}{place}")
            for group in optimizer.param_groups:
                group["lr"] = rate * (1 + math.cos(math.pi * step / STEPS)) / 2
            chosen = torch.randperm(len(data.train), generator=generator)[:size]
            _accumulate(model, data.train[chosen], student, teacher)
            optimizer.step()
            optimizer.zero_grad()
        student.unpack_once = False
        after = choosing_kl()
        figures = {"before": before, "after": after, "kept": float(after < before)}
        figures["resident"] = float(resident)
        return student.rescaled() if figures["kept"] else dict(encoded), figures


class _Student:
    """The compressed model's tensors as functions of the scale factors.

    Attributes:
        deltas: of the compressed tensors.
        factors: of each delta.
        unpack_once: keep unpacked tensors until `end_step`.
    """

    def __init__(
        self, pair: CheckpointPair, encoded: Mapping[str, Encoded], memory: DeviceMemory
    ) -> None:
        self._pair, self._encoded, self._memory = pair, encoded, memory
        self.deltas = {
            name: TrainableDelta(one, memory, name)
            for name, one in encoded.items()
            if _encodes_delta(one)
        }
        self.factors = unit_factors(self.deltas, memory.device)
        self.unpack_once = False
        self._unpacked: dict[str, tuple[Tensor, Tensor]] = {}

    def unpacked_bytes(self) -> int:
        """Upper bound of what a step keeps: weights, deltas and both factors, all in float32."""
        total = 0
        for delta in self.deltas.values():
            shape = delta.encoded.record["shape"]
            ranks = sum(
                size for key, size in delta.factors.items() if key.rpartition("/")[2] == "s"
            )
            total += 4 * (3 * math.prod(shape) + 3 * ranks * sum(shape[-2:]))
        return total

    def __contains__(self, name: object) -> bool:
        return name in self._pair.finetuned

    def tensor(self, name: str) -> Tensor:
        """Load a tensor; compressed ones in float32, with gradients."""
        encoded = self._encoded.get(name)
        if encoded is not None and encoded.record["kind"] == "alias":
            return self.tensor(encoded.record["of"])
        if name in self.deltas:
            if not self.unpack_once:
                return self._unpack(name)
            if name not in self._unpacked:
                with torch.enable_grad():
                    whole = self._unpack(name)
                leaf = whole.detach().requires_grad_(whole.requires_grad)
                self._unpacked[name] = whole, leaf
            return self._unpacked[name][1]
        source = self._pair.base if encoded is None else self._pair.finetuned
        return _load(self._memory, source, name)

    def _unpack(self, name: str) -> Tensor:
        delta = self.deltas[name](self.factors[name])
        tensor = _load(self._memory, self._pair.base, name).float() + delta
        added = self._pair.added_rows(name)
        if added:
            rows = _load(self._memory, self._pair.finetuned, name)[-added:].to(tensor)
            tensor = torch.cat([tensor, rows])
        return tensor

    def backpropagate(self) -> None:
        """Pass the gradients of unpacked tensors on to the factors.

        After each pass that uses them, so that sums are those of tensors unpacked for each use.
        """
        for whole, leaf in self._unpacked.values():
            if leaf.grad is not None:
                whole.backward(leaf.grad, retain_graph=True)
                leaf.grad = None

    def end_step(self) -> None:
        """Drop the unpacked tensors: the factors are about to change."""
        self._unpacked.clear()

    def rescaled(self) -> dict[str, Encoded]:
        """The encodings with the current factors multiplied into their scales."""
        return {
            name: self.deltas[name].rescaled(self.factors[name]) if name in self.deltas else one
            for name, one in self._encoded.items()
        }


def _load(memory: DeviceMemory, source: CheckpointReader, name: str) -> Tensor:
    """A tensor of a checkpoint, in its stored dtype on the device."""
    return memory.load(f"{source.folder} {name}", lambda: source.tensor(name))


def _encodes_delta(encoded: Encoded) -> bool:
    record = encoded.record
    if record["kind"] == "new-rows":
        return record["parts"][0] is not None
    return record["kind"] in DELTA_ENCODINGS


@torch.no_grad()
def _kl_without_deltas(student: _Student, choosing_kl: Callable[[], float]) -> float:
    """The KL divergence with all compressed deltas set to zero."""
    for factor in flatten_factors(student.factors):
        factor.zero_()
    kl = choosing_kl()
    for factor in flatten_factors(student.factors):
        factor.fill_(1.0)
    return kl


def _forward(model: BlockwiseModel, tokens: Tensor, source: TensorSource) -> list[Tensor]:
    """Every block's inputs, and the last block's outputs."""
    states = [model.embed(tokens, source)]
    for index in range(len(model.blocks)):
        states.append(model.run_block(index, states[-1], source))
    return states


class _ResidentSource:
    """A checkpoint's tensors, which stay on the device while they fit."""

    def __init__(self, source: CheckpointReader, memory: DeviceMemory) -> None:
        self._source, self._memory = source, memory

    def __contains__(self, name: object) -> bool:
        return name in self._source

    def tensor(self, name: str) -> Tensor:
        """A tensor in its stored dtype, on the device."""
        return _load(self._memory, self._source, name)


class _Teacher:
    """The fine-tuned model's predictions; caches the final hidden states of each window."""

    def __init__(
        self,
        source: CheckpointReader,
        model: BlockwiseModel,
        memory: DeviceMemory,
        known: tuple[Tensor, Tensor] | None,
    ) -> None:
        """`known`: windows and the last block's outputs for them."""
        self._source = _ResidentSource(source, memory)
        self._model, self._memory = model, memory
        self._last = {} if known is None else dict(zip(map(_key, known[0]), known[1], strict=True))
        self._final: set[str] = set()

    def __call__(self, windows: Tensor) -> Callable[[slice], Tensor]:
        """A function of a slice of the tokens of `windows`: log probabilities (n, vocabulary)."""
        keys = [_key(window) for window in windows]
        new = [k for k, key in enumerate(keys) if key not in self._final]
        if new:
            final = self._model.final_hidden(self._last_states(windows[new]), self._source)
            check_finite(final)
            for k, states in zip(new, final, strict=True):
                self._memory.put(keys[k], states)
                self._final.add(keys[k])
        states = torch.cat([self._memory.get(key) for key in keys])

        def target(piece: slice) -> Tensor:
            logits = list(self._model.logits(states[piece], self._source))
            return F.log_softmax(torch.cat(logits), dim=-1)

        return target

    def _last_states(self, windows: Tensor) -> Tensor:
        """The last block's outputs (n, length, hidden), computed unless all are known."""
        known = [self._last.get(_key(window)) for window in windows]
        found = [states for states in known if states is not None]
        if len(found) == len(windows):
            return torch.stack(found)
        return _forward(self._model, windows, self._source)[-1]


def _key(window: Tensor) -> str:
    return f"teacher {window.tolist()}"


def _accumulate(
    model: BlockwiseModel, tokens: Tensor, student: _Student, teacher: _Teacher
) -> None:
    """Add the gradients of the mean KL divergence on `tokens` to the factors."""
    target = teacher(tokens)
    hidden = model.embed(tokens, student)
    passes: list[Backward] = []
    for index in range(len(model.blocks)):
        if student.unpack_once:
            hidden, backward = model.record_block(index, hidden, student)
        else:
            backward = partial(model.backward_block, index, hidden, source=student)
            hidden = model.run_block(index, hidden, student)
        passes.append(backward)

    def loss(logits: Tensor, piece: slice) -> Tensor:
        log_probs = F.log_softmax(logits, dim=-1)
        return F.kl_div(log_probs, target(piece), reduction="sum", log_target=True) / tokens.numel()

    _, gradient = model.backward_head(hidden, student, loss)
    student.backpropagate()
    while passes:
        gradient = passes.pop()(gradient)
        student.backpropagate()
    model.embed_backward(tokens, gradient, student)
    student.backpropagate()
    student.end_step()


@torch.no_grad()
def _mean_kl(model: BlockwiseModel, tokens: Tensor, student: _Student, teacher: _Teacher) -> float:
    target = teacher(tokens)
    hidden = model.final_hidden(_forward(model, tokens, student)[-1], student).flatten(0, 1)
    total, seen = 0.0, 0
    for logits in model.logits(hidden, student):
        piece = slice(seen, seen + len(logits))
        log_probs = F.log_softmax(logits, dim=-1)
        total += float(F.kl_div(log_probs, target(piece), reduction="sum", log_target=True))
        seen += len(logits)
    return total / seen
