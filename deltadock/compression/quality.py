"""Quality of a delta: how closely its model's predictions follow the fine-tune's.

KL divergence and negative log likelihood are in nats per token, averaged over every position of
the windows given; agreement is the fraction of positions with the same most likely token. Where a
delta's outputs are not finite, none is.
"""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Final

import torch
from torch import Tensor
from torch.nn import functional as F

from deltadock.artifacts.configs import differences
from deltadock.artifacts.reader import Artifact
from deltadock.artifacts.tensors import merged_tensor
from deltadock.compression.calibration.windows import read_windows
from deltadock.compression.checkpoints import (
    CheckpointPair,
    CheckpointReader,
    ResizedSource,
    TensorSource,
    align,
)
from deltadock.compression.model.forward import BlockwiseModel
from deltadock.compression.report import Quality
from deltadock.errors import InvalidCalibration

IGNORED: Final = -100
"""Label of positions without a next token."""
WINDOW: Final = 256
"""Default window length in tokens: about that of a prompt with its answer."""


class MergedSource:
    """A base's tensors with an artifact's delta applied, one tensor at a time, on a device."""

    def __init__(self, base: TensorSource, artifact: Artifact, device: torch.device) -> None:
        self._base = base
        self._artifact = artifact
        self._device = device

    def __contains__(self, name: object) -> bool:
        return name in self._base

    def tensor(self, name: str) -> Tensor:
        """Load a tensor of the delta's model, in the fine-tune's dtype."""
        return merged_tensor(self._artifact, name, self._base.tensor(name).to(self._device))


def evaluate(
    base: Path,
    finetuned: Path,
    delta: Path,
    text: Path,
    *,
    window: int = WINDOW,
    progress: Callable[[int, int], None] = lambda done, total: None,
    device: str = "cpu",
) -> Quality:
    """Compare a delta file's model with its fine-tune and its base on a text.

    Args:
        base, finetuned: checkpoint folders.
        delta: the delta file.
        text: .txt or .jsonl file, as for calibration.
        window: window length in tokens; each window begins without context.
        progress: called with the number of block passes done and in total.
        device: torch device.

    Raises:
        BaseMismatch: the delta belongs to another base.
        InvalidInput: a subclass names what cannot be used.
    """
    with Artifact(delta) as artifact:
        before = CheckpointReader(base)
        artifact.check_base(before.manifest.weights_digest)
        artifact.check_intact()
        after = CheckpointReader(finetuned)
        align(before, after)
        model = BlockwiseModel(finetuned, device, after.entries, after.vocabulary)
        model.check(after.shapes)
        tokenizer_base = CheckpointPair(before, after).tokenizer_base
        return measure(
            model,
            base_model(model, before, after),
            read_windows(text, finetuned, min(window, model.max_length), tokenizer_base),
            base=ResizedSource(before, after.shapes),
            finetuned=after,
            delta=MergedSource(before, artifact, model.device),
            progress=progress,
        )


def base_model(
    model: BlockwiseModel, base: CheckpointReader, finetuned: CheckpointReader
) -> BlockwiseModel:
    """The model that runs the base's weights: `model`, the fine-tune's, unless settings differ."""
    if not differences(base.manifest.config, finetuned.manifest.config):
        return model
    return BlockwiseModel(base.folder, str(model.device), finetuned.entries)


def measure(
    model: BlockwiseModel,
    model_of_base: BlockwiseModel,
    windows: Tensor,
    *,
    base: TensorSource,
    finetuned: TensorSource,
    delta: TensorSource,
    known: Tensor | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Quality:
    """Run the three models over `windows` (n, length) and compare their outputs.

    Args:
        model: the skeleton that runs fine-tune and delta.
        model_of_base: the one that runs the base.
        windows: token ids, int64.
        base, finetuned, delta: the weights.
        known: the fine-tune's last block's outputs (n, length, hidden), which then need not be
            computed again.
        progress: called with the number of block passes done and in total.

    Raises:
        InvalidCalibration: the fine-tune's outputs are not finite.
    """
    total = 3 * len(model.blocks)
    hidden = []
    runs = ((model, finetuned), (model, delta), (model_of_base, base))
    for number, (runner, source) in enumerate(runs):
        if number == 0 and known is not None:
            states = known
        else:
            states = runner.embed(windows, source)
            for index in range(len(model.blocks)):
                states = runner.run_block(index, states, source)
                progress(number * len(model.blocks) + index + 1, total)
        hidden.append(runner.final_hidden(states, source))
        if number == 0:
            check_finite(hidden[-1])
    # The last position of a window has no next token.
    labels = F.pad(windows[:, 1:], (0, 1), value=IGNORED).flatten().to(model.device)
    sums, kl_max, seen = torch.zeros(7, dtype=torch.float64), 0.0, 0
    streams = (
        runner.logits(states.flatten(0, 1), source)
        for states, (runner, source) in zip(hidden, runs, strict=True)
    )
    for target, delta_logits, base_logits in zip(*streams, strict=True):
        piece = labels[seen : seen + len(target)]
        added, largest = _compare(target, delta_logits, base_logits, piece)
        sums += added.cpu()
        kl_max = max(kl_max, float(largest))
        seen += len(target)
    kl, kl_base, same, squared = (sums[:4] / seen).tolist()
    nll_finetuned, nll, nll_base = (sums[4:] / (labels != IGNORED).sum().cpu()).tolist()
    kl_error = math.sqrt(max(squared - kl**2, 0.0) / seen)
    return Quality(kl, kl_base, same, nll, nll_finetuned, nll_base, seen, kl_error, kl_max)


def check_finite(hidden: Tensor) -> None:
    """Refuse a fine-tune whose outputs (..., hidden) cannot be compared with.

    Raises:
        InvalidCalibration: they hold NaN or an infinity.
    """
    if not hidden.isfinite().all():
        raise InvalidCalibration(
            "The fine-tuned model's outputs on the text hold NaN or an infinity. Take other text, "
            "or check the checkpoint."
        )


@torch.inference_mode()
def _compare(
    finetuned: Tensor, delta: Tensor, base: Tensor, labels: Tensor
) -> tuple[Tensor, Tensor]:
    """Sums of (KL to delta, KL to base, agreements, squares of the first, NLLs of fine-tuned, delta
    and base), and the largest KL to delta.

    Logits are (tokens, vocabulary), `labels` (tokens,).
    """
    target = F.log_softmax(finetuned, dim=-1)
    others = [F.log_softmax(logits, dim=-1) for logits in (delta, base)]
    kl, kl_base = (
        F.kl_div(other, target, reduction="none", log_target=True).sum(-1) for other in others
    )
    # NaN is the largest of a row, wherever it is.
    same = ((finetuned.argmax(dim=-1) == delta.argmax(dim=-1)) & kl.isfinite()).sum()
    nll = [
        F.nll_loss(log_probs, labels, ignore_index=IGNORED, reduction="sum")
        for log_probs in (target, *others)
    ]
    sums = kl.sum(), kl_base.sum(), same.to(kl), kl.square().sum()
    return torch.stack([*sums, *nll]).double(), kl.max()
