"""Low rank: the truncated SVD in bfloat16 factors, as many ranks as the budget holds.

Source: Ryu et al., "Efficient Storage of Fine-Tuned Models via Low-Rank Approximation of Weight
Residuals" (arXiv 2305.18425). The singular values are shared evenly between the factors.
"""

from typing import Final

import torch

from deltadock.artifacts.encodings import decode_dense, encode_low_rank
from deltadock.compression.methods.base import MatrixResult, MatrixTask
from deltadock.compression.numerics.decomposition import decompose

FACTOR_BITS: Final = 16


def rank_of(bits: float, h_out: int, h_in: int) -> int:
    """Ranks of bfloat16 factors that the budget holds."""
    return int(bits * h_out * h_in / (FACTOR_BITS * (h_out + h_in)))


def compress_matrix(task: MatrixTask) -> MatrixResult:
    """Compress one linear layer's delta; a budget below one rank drops it, which is reported."""
    rank = rank_of(task.bits, *task.delta.shape)
    u, s, v, fallback = decompose(task.delta, max(1, rank))
    rank = min(rank, len(s))
    root = s[:rank].sqrt()
    encoded = encode_low_rank(
        (u[:, :rank] * root).cpu().numpy(),
        (root[:, None] * v[:rank]).cpu().numpy(),
        1.0,
        task.dtype,
    )
    dropped = None if rank else "the budget holds no rank, so the delta is dropped"
    notes = {
        "rank": rank,
        "widths": {str(FACTOR_BITS): rank} if rank else {},
        "damping": 0.0,
        "gap": 0.0,
        "fallbacks": [note for note in (fallback, dropped) if note is not None],
    }
    return MatrixResult(encoded, torch.from_numpy(decode_dense(encoded)), notes)
