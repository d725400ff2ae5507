"""Reference implementation: one coordinate at a time, in float64."""

import torch
from torch import Tensor

from deltadock.kernels.error_compensation import GROUP, KEPT


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


def prune_with_error_compensation(
    values: Tensor, factor: Tensor, top: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, which are kept, and errors of one problem; `values` is not modified."""
    values, factor = values.double().clone(), factor.double()
    kept = torch.zeros(values.shape, dtype=torch.bool, device=values.device)
    codes = torch.empty(values.shape, dtype=torch.uint8, device=values.device)
    for j in range(len(values)):
        if j % GROUP == 0:
            four = slice(j, j + GROUP)
            costs = (values[four] / factor.diagonal()[four, None]).abs()
            kept[four].scatter_(0, costs.topk(min(KEPT, len(costs)), dim=0).indices, value=True)
        highest = kept[j] * top.double()
        code = (values[j] + highest / 2 + 0.5).floor().clamp_min(0).minimum(highest)
        codes[j] = code
        values[j] = (values[j] - (code - highest / 2)) / factor[j, j]
        values[j + 1 :] -= torch.outer(factor[j, j + 1 :], values[j])
    return codes, kept, values
