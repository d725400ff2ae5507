"""Vectors to round, and how far a rounding may be from the truth."""

import torch
from torch import Tensor

from deltadock.kernels.error_compensation import reference


def make(n: int, r: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """work (n, r), factor (n, n), zero and top (r,): widths 1 to 8, symmetric and other grids."""
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(n, 3 * n, generator=generator, dtype=torch.float64)
    inputs += 2 * torch.randn(1, 3 * n, generator=generator, dtype=torch.float64)
    metric = inputs @ inputs.t() / (3 * n) + 0.05 * torch.eye(n, dtype=torch.float64)
    factor = torch.linalg.cholesky(torch.linalg.inv(metric), upper=True).float()
    top = 2.0 ** (torch.arange(r) % 8 + 1) - 1
    zero = torch.where(torch.arange(r) % 2 == 0, top / 2, (top / 3).round())
    spread = (top + 1) / 4
    work = torch.randn(n, r, generator=generator) * spread + (top / 2 - zero)
    return work, factor, zero, top


def check(codes: Tensor, errors: Tensor, inputs: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:
    """Hold what was rounded to the float64 truth.

    A value on the fence between two codes may fall the other way in float32, and moves what
    follows: a few vectors may differ, and are as good.
    """
    work, factor, zero, top = inputs
    expected, truth = reference.round_with_error_compensation(work, factor, zero, top)
    same = (codes.cpu() == expected).all(0)
    assert same.double().mean() > 0.9
    torch.testing.assert_close(errors.cpu()[:, same].double(), truth[:, same], rtol=2e-3, atol=2e-3)
    lost = errors.cpu().double().square().sum(0) / truth.square().sum(0).clamp_min(1e-12)
    assert (lost < 1.5).all()
