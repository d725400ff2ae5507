"""BitDelta: the delta's signs times one scale for the matrix.

Source: Liu et al., "BitDelta: Your Fine-Tune May Only Be Worth One Bit" (arXiv 2402.10193). Zero
counts as positive; the scale is the mean magnitude, which minimizes the squared error.
`bitdelta-distilled` then trains the scales end to end and keeps the signs. The published code
also trains embeddings and norms, and skips biases: here they are stored as with any method.
"""

from collections.abc import Sequence

import numpy as np
import torch

from deltadock.artifacts.encodings import encode_rows
from deltadock.compression.methods.base import MatrixResult, MatrixTask, matrix_result, stacked


def compress(tasks: Sequence[MatrixTask]) -> list[MatrixResult]:
    """Compress linear layers' deltas; the moments are not used."""
    deltas = stacked([task.delta for task in tasks])
    # Codes 0 and 1 stand for -1/2 and 1/2.
    scales = 2 * deltas.abs().mean((1, 2), dtype=torch.float64)
    signs = (deltas >= 0).to(torch.uint8)
    widths = np.ones(deltas.shape[1], np.int64)
    return [
        matrix_result(
            encode_rows(codes, widths, np.array([scale], np.float32), task.dtype),
            device=deltas.device,
            widths={"1": len(codes)},
        )
        for task, codes, scale in zip(tasks, signs.cpu().numpy(), scales.tolist(), strict=True)
    ]
