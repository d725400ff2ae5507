"""Damped second moments, their factorization, and the errors that they weight."""

from dataclasses import dataclass
from typing import Final, Self

import torch
from torch import Tensor

from deltadock.errors import InvalidCalibration

DAMPING: Final = 0.01
MAX_DAMPING: Final = 1.0


def damped(moments: Tensor, damping: float | Tensor = DAMPING) -> Tensor:
    """Add a fraction of the mean diagonal to the diagonals of second moments; of zeros, identity.

    Without damping, errors in directions that the calibration text never excites would cost
    nothing.

    Args:
        moments: (..., n, n).
        damping: the fraction.
    """
    result = moments.clone()
    diagonal = result.diagonal(dim1=-2, dim2=-1)
    mean = diagonal.mean(-1, keepdim=True)
    diagonal += torch.where(mean == 0, torch.ones_like(mean), damping * mean)
    return result


def mean_of_used(diagonals: Tensor) -> Tensor:
    """The mean (b, 1) of diagonals (b, n) without their zeros; 1 where there is nothing else."""
    used = (diagonals > 0).sum(1, keepdim=True)
    return torch.where(used > 0, diagonals.sum(1, keepdim=True) / used.clamp_min(1), 1.0)


def damped_cholesky(moments: Tensor, mean: Tensor) -> tuple[Tensor, Tensor, list[float]]:
    """Damp second moments and factor them, raising the damping tenfold where that fails.

    Args:
        moments: (b, n, n) float64, or diagonals (b, n).
        mean: (b,) float64, the mean diagonals, which damping is relative to.

    Returns:
        The damped moments, their lower Cholesky factors (of diagonals, the roots), and the damping
        of each.

    Raises:
        InvalidCalibration: a moment is not finite, or not positive at a damping of 100 %.
    """
    if not torch.isfinite(moments).all():
        raise InvalidCalibration(
            "The model's activations or gradients on the calibration text hold NaN or an "
            "infinity. Calibrate with other text, or check the checkpoint."
        )
    matrices = moments.clone()
    diagonal = matrices if moments.ndim == 2 else matrices.diagonal(dim1=1, dim2=2)
    diagonal += DAMPING * mean[:, None]
    damping = [DAMPING] * len(moments)
    if moments.ndim == 2:
        return matrices, matrices.sqrt(), damping
    factors, failed = torch.linalg.cholesky_ex(matrices)
    for number in failed.nonzero().flatten().tolist():
        while failed[number] and damping[number] < MAX_DAMPING:
            damping[number] *= 10
            matrices[number] = moments[number]
            diagonal[number] += damping[number] * mean[number]
            factors[number], failed[number] = torch.linalg.cholesky_ex(matrices[number])
    if failed.any():
        raise InvalidCalibration(
            "A second moment of the calibration text is not positive even at a damping of 100 %. "
            "Calibrate with more or other text."
        )
    return matrices, factors, damping


@dataclass(frozen=True, slots=True)
class Metric:
    """Positive definite weightings `M = L L^T` of the coordinates of one side of b matrices.

    Attributes:
        moment: M, damped: (b, n, n), or diagonals (b, n); float64.
        factor: L, lower triangular (b, n, n), or diagonals (b, n).
        damping: added to each diagonal, as a fraction of the mean diagonal.
    """

    moment: Tensor
    factor: Tensor
    damping: list[float]

    @classmethod
    def of(cls, moments: Tensor) -> Self:
        """Damp and factor second moments, (b, n, n) or (b, n); one of zeros counts as identity.

        Raises:
            InvalidCalibration: a moment is not finite, or not positive at a damping of 100 %.
        """
        work = moments.double()
        mean = (work if moments.ndim == 2 else work.diagonal(dim1=1, dim2=2)).mean(1)
        empty = mean <= 0
        work = torch.where(empty.view(-1, *(1,) * (moments.ndim - 1)), 0.0, work)
        mean = torch.where(empty, 1 / DAMPING, mean)
        return cls(*damped_cholesky(work, mean))

    @property
    def diagonal(self) -> bool:
        """Whether every M is diagonal."""
        return self.moment.ndim == 2

    def whiten(self, rows: Tensor) -> Tensor:
        """Multiply rows (b, r, n) by L."""
        return rows * self.factor[:, None] if self.diagonal else rows @ self.factor

    def unwhiten(self, rows: Tensor) -> Tensor:
        """Multiply rows (b, r, n) by the inverse of L."""
        if self.diagonal:
            return rows / self.factor[:, None]
        solved: Tensor = torch.linalg.solve_triangular(self.factor, rows, upper=False, left=False)
        return solved

    def times(self, rows: Tensor) -> Tensor:
        """Multiply rows (b, r, n) by M."""
        return rows * self.moment[:, None] if self.diagonal else rows @ self.moment

    def scaled(self, scale: Tensor) -> "Metric":
        """The metric of coordinates divided by `scale` C (b, n), which is positive: `C M C`."""
        if self.diagonal:
            return Metric(self.moment * scale.square(), self.factor * scale, self.damping)
        moment = self.moment * scale[:, :, None] * scale[:, None]
        return Metric(moment, self.factor * scale[:, :, None], self.damping)

    def error_compensation(self) -> Tensor:
        """Upper Cholesky factors of the inverses of M, (b, n, n) float32, as GPTQ takes them."""
        upper: Tensor = torch.linalg.cholesky(torch.cholesky_inverse(self.factor), upper=True)
        return upper.float()


def weighted_errors(residuals: Tensor, rows: Metric, columns: Metric) -> Tensor:
    """`tr(B R A R^T)` (b,) of residuals R (b, h_out, h_in): B weighs rows, A columns."""
    weighed = columns.times(rows.times(residuals.mT).mT)
    return (weighed * residuals).sum((1, 2))
