"""Vectors to round, and the tolerance against the float64 reference."""

import torch
from torch import Tensor

from deltadock.kernels.error_compensation import reference


def make(n: int, r: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """values (n, r), factor (n, n), zero, top (r,): widths 1 to 8, symmetric and other grids."""
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(n, 3 * n, generator=generator, dtype=torch.float64)
    inputs += 2 * torch.randn(1, 3 * n, generator=generator, dtype=torch.float64)
    metric = inputs @ inputs.t() / (3 * n) + 0.05 * torch.eye(n, dtype=torch.float64)
    factor = torch.linalg.cholesky(torch.linalg.inv(metric), upper=True).float()
    top = 2.0 ** (torch.arange(r) % 8 + 1) - 1
    zero = torch.where(torch.arange(r) % 2 == 0, top / 2, (top / 3).round())
    spread = (top + 1) / 4
    values = torch.randn(n, r, generator=generator) * spread + (top / 2 - zero)
    return values, factor, zero, top


def check(codes: Tensor, errors: Tensor, inputs: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:
    """Compare codes and errors with the float64 reference.

    Near a rounding boundary float32 may choose the other code, which changes the later coordinates:
    a few vectors may differ, with a similar error.
    """
    values, factor, zero, top = inputs
    expected, expected_errors = reference.round_with_error_compensation(values, factor, zero, top)
    same = (codes.cpu() == expected).all(0)
    assert same.double().mean() > 0.9
    torch.testing.assert_close(
        errors.cpu()[:, same].double(), expected_errors[:, same], rtol=2e-3, atol=2e-3
    )
    lost = errors.cpu().double().square().sum(0) / expected_errors.square().sum(0).clamp_min(1e-12)
    assert (lost < 1.5).all()
