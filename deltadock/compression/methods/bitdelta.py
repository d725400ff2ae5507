"""BitDelta: the delta's signs times one scale for the matrix.

Source: Liu et al., "BitDelta: Your Fine-Tune May Only Be Worth One Bit" (arXiv 2402.10193). Zero
counts as positive; the scale is the mean magnitude, which minimizes the squared error.
`bitdelta-distilled` then trains the scales end to end and keeps the signs. The published code
also trains embeddings and norms, and skips biases: here they are stored as with any method.
"""

import numpy as np
import torch

from deltadock.artifacts.encodings import encode_rows
from deltadock.compression.methods.base import MatrixResult, MatrixTask, matrix_result


def compress_matrix(task: MatrixTask) -> MatrixResult:
    """Compress one linear layer's delta; the moment is not used."""
    codes = (task.delta >= 0).to(torch.uint8).cpu().numpy()
    mean = float(task.delta.double().abs().mean())
    # Codes 0 and 1 stand for -1/2 and 1/2.
    scale = np.array([2 * mean], np.float32)
    encoded = encode_rows(codes, np.ones(len(codes), np.int64), scale, task.dtype)
    return matrix_result(encoded, device=task.delta.device, widths={"1": len(codes)})
