"""BitDelta: the delta's signs times one scale for the matrix.

Source: Liu et al., "BitDelta: Your Fine-Tune May Only Be Worth One Bit" (arXiv 2402.10193). Zero
counts as positive; the scale is the mean magnitude, which is the best in the least squares sense.
`bitdelta-distilled` trains the scales afterwards, end to end, the signs kept. The published code
trains embeddings and norms as well and leaves biases out: here they are stored as with any method.
"""

import numpy as np
import torch

from deltadock.artifacts.encodings import decode_dense, encode_rows
from deltadock.compression.methods.base import MatrixResult, MatrixTask


def compress_matrix(task: MatrixTask) -> MatrixResult:
    """Compress one linear layer's delta; the moment is not looked at."""
    codes = (task.delta >= 0).to(torch.uint8).cpu().numpy()
    mean = float(task.delta.double().abs().mean())
    # Codes 0 and 1 stand for -1/2 and 1/2.
    scale = np.array([2 * mean], np.float32)
    encoded = encode_rows(codes, np.ones(len(codes), np.int64), scale, task.dtype)
    notes = {
        "rank": 0,
        "widths": {"1": len(codes)},
        "damping": 0.0,
        "gap": 0.0,
        "fallbacks": [],
    }
    return MatrixResult(encoded, torch.from_numpy(decode_dense(encoded)), notes)
