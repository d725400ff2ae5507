"""Low rank: the truncated SVD in bfloat16 factors, as many ranks as the budget holds.

Source: Ryu et al., "Efficient Storage of Fine-Tuned Models via Low-Rank Approximation of Weight
Residuals" (arXiv 2305.18425). Both factors are multiplied by the root of the singular values.
"""

from collections.abc import Sequence
from typing import Final

import torch

from deltadock.artifacts.encodings import encode_low_rank
from deltadock.compression.methods.base import (
    MatrixResult,
    MatrixTask,
    Prepared,
    kept_of_all,
    matrix_result,
    prepare_svd,
)

FACTOR_BITS: Final = 16


def rank_of(bits: float, h_out: int, h_in: int) -> int:
    """Number of ranks of bfloat16 factors that the budget holds."""
    return int(bits * h_out * h_in / (FACTOR_BITS * (h_out + h_in)))


class LowRank:
    """The method; a budget below one rank drops the delta, with a fallback note."""

    def ranks(self, bits: float, h_out: int, h_in: int) -> int:
        return max(1, rank_of(bits, h_out, h_in))

    def prepare(self, tasks: Sequence[MatrixTask], ranks: int) -> list[Prepared]:
        return prepare_svd(tasks, ranks)

    def compress(
        self, tasks: Sequence[MatrixTask], prepared: Sequence[Prepared]
    ) -> list[MatrixResult]:
        return [_compress(task, one) for task, one in zip(tasks, prepared, strict=True)]


def _compress(task: MatrixTask, prepared: Prepared) -> MatrixResult:
    u, s, v = (prepared.tensors[name] for name in ("u", "s", "v"))
    rank = min(rank_of(task.bits, *task.delta.shape), len(s))
    root = s[:rank].sqrt()
    encoded = encode_low_rank(
        (u[:, :rank] * root).cpu().numpy(),
        (root[:, None] * v[:rank]).cpu().numpy(),
        1.0,
        task.dtype,
    )
    dropped = None if rank else "the budget holds no rank, so the delta is dropped"
    widths = {str(FACTOR_BITS): rank} if rank else {}
    bits = torch.full((rank,), FACTOR_BITS)
    return matrix_result(
        encoded,
        device=task.delta.device,
        rank=rank,
        widths=widths,
        fallbacks=[prepared.fallback, dropped],
        spectrum=kept_of_all(prepared, bits),
    )
