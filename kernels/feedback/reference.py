"""The truth: one coordinate at a time, in float64."""

import torch
from torch import Tensor


def round_with_feedback(
    work: Tensor, factor: Tensor, zero: Tensor, top: Tensor
) -> tuple[Tensor, Tensor]:
    """Codes (n, r) uint8 and errors (n, r) float64; see `kernels.feedback.round_with_feedback`."""
    work, factor = work.double().clone(), factor.double()
    codes = torch.empty(work.shape, dtype=torch.uint8, device=work.device)
    for j in range(len(work)):
        code = torch.minimum((work[j] + zero + 0.5).floor().clamp_min(0), top.double())
        codes[j] = code
        work[j] = (work[j] - (code - zero)) / factor[j, j]
        work[j + 1 :] -= torch.outer(factor[j, j + 1 :], work[j])
    return codes, work
