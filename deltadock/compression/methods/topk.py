"""Topk-x: 8 bits for the x leading ranks, 2 for the others that the budget allows.

The heuristic baselines of the AdaMix paper (arXiv 2506.11087, section 4.3), with x = 2 and 32;
quantized as Delta-CoMe's ranks are.
"""

from typing import Final

from deltadock.compression.methods.base import MatrixMethod, MatrixResult, MatrixTask
from deltadock.compression.methods.factors import compress_fixed

LEADING: Final = 8
REST: Final = 2


def topk(count: int) -> MatrixMethod:
    """The method that gives `count` ranks the leading width."""

    def compress_matrix(task: MatrixTask) -> MatrixResult:
        """Compress one linear layer's delta."""
        return compress_fixed(task, [(LEADING, count)], REST)

    return compress_matrix
