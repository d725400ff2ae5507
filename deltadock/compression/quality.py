"""How much of the fine-tune a delta keeps, in the model's own output.

KL divergence and negative log likelihood are in nats per token, means over every position of the
held-out windows; agreement is the share of positions whose most likely token is the same.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor
from torch.nn import functional as F

from deltadock.artifacts.reader import Artifact
from deltadock.artifacts.tensors import merged_tensor
from deltadock.compression.model.forward import BlockwiseModel
from deltadock.compression.model.weights import TensorSource

NO_TOKEN: Final = -100


@dataclass(frozen=True, slots=True)
class Quality:
    """Figures of a delta against its fine-tune and its base.

    Attributes:
        kl: KL(fine-tuned || delta).
        kl_base: KL(fine-tuned || base): what there was to lose.
        agreement: share of positions with the same most likely token.
        nll, nll_finetuned, nll_base: of the text's own next tokens.
        tokens: positions measured.
    """

    kl: float
    kl_base: float
    agreement: float
    nll: float
    nll_finetuned: float
    nll_base: float
    tokens: int


class MergedSource:
    """A base's tensors with an artifact's delta applied, one tensor at a time."""

    def __init__(self, base: TensorSource, artifact: Artifact) -> None:
        self._base = base
        self._artifact = artifact

    def __contains__(self, name: object) -> bool:
        return name in self._base

    def tensor(self, name: str) -> Tensor:
        """The delta model's tensor, in the fine-tune's dtype."""
        return merged_tensor(self._artifact, name, self._base.tensor(name))


def measure(
    model: BlockwiseModel,
    windows: Tensor,
    *,
    base: TensorSource,
    finetuned: TensorSource,
    delta: TensorSource,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Quality:
    """Run the three models over `windows` (n, length) and compare their outputs.

    Args:
        model: the skeleton to run them in.
        windows: token ids, int64.
        base, finetuned, delta: the weights.
        progress: told how many of how many block passes are done.
    """
    total = 3 * len(model.blocks)
    hidden = []
    sources = (finetuned, delta, base)
    for number, source in enumerate(sources):
        states = model.embed(windows, source)
        for index in range(len(model.blocks)):
            states = model.run_block(index, states, source)
            progress(number * len(model.blocks) + index + 1, total)
        hidden.append(model.final_hidden(states, source))
    # The token that follows each position; the last of a window has none.
    following = F.pad(windows[:, 1:], (0, 1), value=NO_TOKEN).flatten().to(model.device)
    sums, seen = torch.zeros(6, dtype=torch.float64), 0
    streams = (
        model.logits(states.flatten(0, 1), source)
        for states, source in zip(hidden, sources, strict=True)
    )
    for target, delta_logits, base_logits in zip(*streams, strict=True):
        tokens = following[seen : seen + len(target)]
        sums += _compare(target, delta_logits, base_logits, tokens).cpu()
        seen += len(target)
    kl, kl_base, same = (sums[:3] / seen).tolist()
    nll_finetuned, nll, nll_base = (sums[3:] / (following != NO_TOKEN).sum().cpu()).tolist()
    return Quality(kl, kl_base, same, nll, nll_finetuned, nll_base, seen)


@torch.inference_mode()
def _compare(finetuned: Tensor, delta: Tensor, base: Tensor, following: Tensor) -> Tensor:
    """Sums of (KL to delta, KL to base, agreements, NLLs of fine-tuned, delta and base).

    Logits are (tokens, vocabulary), `following` (tokens,).
    """
    target = F.log_softmax(finetuned, dim=-1)
    others = [F.log_softmax(logits, dim=-1) for logits in (delta, base)]
    kl = [F.kl_div(other, target, reduction="sum", log_target=True) for other in others]
    same = (finetuned.argmax(dim=-1) == delta.argmax(dim=-1)).sum()
    nll = [
        F.nll_loss(scores, following, ignore_index=NO_TOKEN, reduction="sum")
        for scores in (target, *others)
    ]
    return torch.stack([*kl, same.to(kl[0].dtype), *nll]).double()
