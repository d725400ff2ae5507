"""Reference implementation: one coordinate at a time, in float64."""

import torch
from torch import Tensor


def round_with_error_compensation(
    values: Tensor, factor: Tensor, zero: Tensor, top: Tensor
) -> tuple[Tensor, Tensor]:
    """Codes and errors of one problem, (n, r) uint8 and float64; `values` is not modified."""
    zero, top = zero.expand_as(values), top.expand_as(values)
    values, factor = values.double().clone(), factor.double()
    codes = torch.empty(values.shape, dtype=torch.uint8, device=values.device)
    for j in range(len(values)):
        code = (values[j] + zero[j] + 0.5).floor().clamp_min(0).minimum(top[j].double())
        codes[j] = code
        values[j] = (values[j] - (code - zero[j])) / factor[j, j]
        values[j + 1 :] -= torch.outer(factor[j, j + 1 :], values[j])
    return codes, values
