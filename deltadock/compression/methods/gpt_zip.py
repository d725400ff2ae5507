"""GPT-Zip: 2-bit codes with 95 % of the weights zeroed, then lossless compression.

Source: Isik et al., "GPT-Zip: Deep Compression of Finetuned Large Language Models" (ICML 2023
workshop), which publishes no code: taken here as SparseGPT on the delta, the share kept being
decided for every 128 columns. A row has one scale of least square error, as scales for smaller
groups would take more than the codes; zlib is the lossless stage.
"""

from typing import Final

import torch
from torch import Tensor

from deltadock.artifacts.encodings import encode_sparse
from deltadock.compression.methods.base import MatrixResult, MatrixTask
from deltadock.compression.methods.sparse import (
    BLOCK,
    largest,
    prune_and_quantize,
    row_scales,
    sparse_result,
)

BITS: Final = 2
KEPT: Final = 0.05


def compress_matrix(task: MatrixTask) -> MatrixResult:
    """Compress one linear layer's delta; there is one size, whatever the budget."""
    h_in = task.delta.shape[1]

    def choose(j: int, cost: Tensor) -> Tensor | None:
        if j % BLOCK:
            return None
        best = cost.flatten().topk(max(1, int(KEPT * cost.numel()))).indices
        mask = torch.zeros(cost.numel(), dtype=torch.bool, device=cost.device)
        mask[best] = True
        return mask.reshape(cost.shape) & (cost > 0)

    def scales(values: Tensor, cost: Tensor) -> Tensor:
        return row_scales(largest(values, cost, max(1, round(KEPT * h_in))), BITS)

    sparse, damping = prune_and_quantize(task.delta, task.moment, BITS, h_in, choose, scales)
    return sparse_result(task, sparse, BITS, h_in, damping, encode_sparse)
