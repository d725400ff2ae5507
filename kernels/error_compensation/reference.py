"""Reference implementation: one coordinate at a time, in float64."""

import torch
from torch import Tensor


def round_with_error_compensation(
    values: Tensor, factor: Tensor, zero: Tensor, top: Tensor
) -> tuple[Tensor, Tensor]:
    """Codes (n, r) uint8 and errors (n, r) float64; `values` is not modified."""
    values, factor = values.double().clone(), factor.double()
    codes = torch.empty(values.shape, dtype=torch.uint8, device=values.device)
    for j in range(len(values)):
        code = torch.minimum((values[j] + zero + 0.5).floor().clamp_min(0), top.double())
        codes[j] = code
        values[j] = (values[j] - (code - zero)) / factor[j, j]
        values[j + 1 :] -= torch.outer(factor[j, j + 1 :], values[j])
    return codes, values
