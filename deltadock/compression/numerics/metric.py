"""Damped second moments, their factorization, and the errors that they weight."""

from dataclasses import dataclass
from typing import Final, Self

import torch
from torch import Tensor

from deltadock.errors import InvalidCalibration

DAMPING: Final = 0.01
MAX_DAMPING: Final = 1.0


def damped(moment: Tensor, damping: float = DAMPING, mean: float | None = None) -> Tensor:
    """Add a fraction of the mean diagonal to the diagonal of a second moment; of zeros, identity.

    Without damping, errors in directions that the calibration text never excites would cost
    nothing.

    Args:
        moment: (n, n), or a diagonal (n,).
        damping: the fraction.
        mean: the mean diagonal, if it is known.
    """
    diagonal = moment if moment.ndim == 1 else moment.diagonal()
    mean = float(diagonal.mean()) if mean is None else mean
    result = moment.clone()
    (result if moment.ndim == 1 else result.diagonal()).add_(damping * mean if mean else 1.0)
    return result


def damped_cholesky(moment: Tensor, mean: float) -> tuple[Tensor, Tensor, float]:
    """Damp a second moment and factor it, raising the damping tenfold until that succeeds.

    Args:
        moment: (n, n) float64, or a diagonal (n,).
        mean: the mean diagonal, which damping is relative to.

    Returns:
        The damped moment, its lower Cholesky factor (of a diagonal, the root), and the damping.

    Raises:
        InvalidCalibration: the moment is not finite, or not positive at a damping of 100 %.
    """
    if not torch.isfinite(moment).all():
        raise InvalidCalibration(
            "The model's activations or gradients on the calibration text hold NaN or an "
            "infinity. Calibrate with other text, or check the checkpoint."
        )
    damping = DAMPING
    while damping <= MAX_DAMPING:
        matrix = damped(moment, damping, mean)
        if matrix.ndim == 1:
            return matrix, matrix.sqrt(), damping
        factor, failed = torch.linalg.cholesky_ex(matrix)
        if not failed:
            return matrix, factor, damping
        damping *= 10
    raise InvalidCalibration(
        "A second moment of the calibration text is not positive even at a damping of 100 %. "
        "Calibrate with more or other text."
    )


@dataclass(frozen=True, slots=True)
class Metric:
    """A positive definite weighting `M = L L^T` of the coordinates of one side of a matrix.

    Attributes:
        moment: M, damped: (n, n), or a diagonal (n,); float64.
        factor: L, lower triangular (n, n), or a diagonal (n,).
        damping: added to the diagonal, as a fraction of the mean diagonal.
    """

    moment: Tensor
    factor: Tensor
    damping: float

    @classmethod
    def of(cls, moment: Tensor) -> Self:
        """Damp and factor a second moment, (n, n) or (n,); a moment of zeros counts as identity.

        Raises:
            InvalidCalibration: the moment is not finite, or not positive at a damping of 100 %.
        """
        work = moment.double()
        mean = float((work if work.ndim == 1 else work.diagonal()).mean())
        if mean <= 0:
            work, mean = torch.zeros_like(work), 1 / DAMPING
        return cls(*damped_cholesky(work, mean))

    @property
    def diagonal(self) -> bool:
        """Whether M is diagonal."""
        return self.moment.ndim == 1

    def whiten(self, rows: Tensor) -> Tensor:
        """Multiply rows (r, n) by L."""
        return rows * self.factor if self.diagonal else rows @ self.factor

    def unwhiten(self, rows: Tensor) -> Tensor:
        """Multiply rows (r, n) by the inverse of L."""
        if self.diagonal:
            return rows / self.factor
        solved: Tensor = torch.linalg.solve_triangular(self.factor, rows, upper=False, left=False)
        return solved

    def times(self, rows: Tensor) -> Tensor:
        """Multiply rows (r, n) by M."""
        return rows * self.moment if self.diagonal else rows @ self.moment

    def scaled(self, scale: Tensor) -> "Metric":
        """The metric of coordinates divided by `scale` C (n,), which is positive: `C M C`."""
        if self.diagonal:
            return Metric(self.moment * scale.square(), self.factor * scale, self.damping)
        moment = self.moment * scale[:, None] * scale
        return Metric(moment, self.factor * scale[:, None], self.damping)

    def error_compensation(self) -> Tensor:
        """Upper Cholesky factor of the inverse of M, (n, n) float32, as GPTQ takes it."""
        upper: Tensor = torch.linalg.cholesky(torch.cholesky_inverse(self.factor), upper=True)
        return upper.float()


def weighted_error(residual: Tensor, rows: Metric, columns: Metric) -> float:
    """`tr(B R A R^T)` of a residual R (h_out, h_in): B weighs its rows, A its columns."""
    weighed = columns.times(rows.times(residual.t()).t())
    return float((weighed * residual).sum())
