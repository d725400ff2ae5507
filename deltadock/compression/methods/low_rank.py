"""Low rank: the truncated SVD in bfloat16 factors, as many ranks as the budget holds.

Source: Ryu et al., "Efficient Storage of Fine-Tuned Models via Low-Rank Approximation of Weight
Residuals" (arXiv 2305.18425). Both factors are multiplied by the root of the singular values.
"""

from typing import Final

from deltadock.artifacts.encodings import encode_low_rank
from deltadock.compression.methods.base import MatrixResult, MatrixTask, matrix_result
from deltadock.compression.numerics.decomposition import decompose

FACTOR_BITS: Final = 16


def rank_of(bits: float, h_out: int, h_in: int) -> int:
    """Number of ranks of bfloat16 factors that the budget holds."""
    return int(bits * h_out * h_in / (FACTOR_BITS * (h_out + h_in)))


def compress_matrix(task: MatrixTask) -> MatrixResult:
    """Compress one linear layer's delta; a budget below one rank drops it, with a fallback note."""
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
    widths = {str(FACTOR_BITS): rank} if rank else {}
    return matrix_result(encoded, rank=rank, widths=widths, fallbacks=[fallback, dropped])
