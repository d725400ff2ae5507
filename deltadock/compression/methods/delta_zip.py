"""DeltaZip: 2 of every 4 columns kept, in 2- or 4-bit codes, then lossless compression.

Source: Yao et al., "DeltaZip: Efficient Serving of Multiple Full-Model-Tuned LLMs" (arXiv
2312.05215): SparseGPT on the delta with a symmetric grid. Here every row and 128 columns have a
scale of least square error, zlib is the lossless stage, and layers are calibrated on the
fine-tune's own activations.
"""

from typing import Final

import torch
from torch import Tensor
from torch.nn import functional as F

from deltadock.artifacts.encodings import encode_sparse24
from deltadock.compression.methods.base import MatrixResult, MatrixTask
from deltadock.compression.methods.sparse import (
    BLOCK,
    largest,
    prune_and_quantize,
    row_scales,
    sparse_result,
)

KEPT: Final = 2
OF: Final = 4
WIDTHS: Final = (2, 4)


def compress_matrix(task: MatrixTask) -> MatrixResult:
    """Compress one linear layer's delta; half of the weights have codes, so 1 bit buys 2."""
    bits = max(width for width in WIDTHS if width * KEPT / OF <= task.bits)

    def choose(j: int, cost: Tensor) -> Tensor | None:
        if j % OF:
            return None
        cost = cost[:OF]
        best = cost.topk(min(KEPT, len(cost)), dim=0).indices
        return torch.zeros_like(cost, dtype=torch.bool).scatter_(0, best, value=True)

    def scales(values: Tensor, cost: Tensor) -> Tensor:
        # What is kept in the end is decided four by four, after corrections, and hardly differs.
        padding = (0, -values.shape[1] % OF)
        values, cost = (F.pad(x, padding).reshape(-1, OF) for x in (values, cost))
        kept = largest(values, cost, KEPT)
        return row_scales(kept.reshape(len(task.delta), -1), bits)

    sparse, damping = prune_and_quantize(task.delta, task.moment, bits, BLOCK, choose, scales)
    return sparse_result(task, sparse, bits, BLOCK, damping, encode_sparse24)
