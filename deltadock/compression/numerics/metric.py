"""What an error on one side of a matrix costs: a damped second moment and its factorisation."""

from dataclasses import dataclass
from typing import Final, Self

import torch
from torch import Tensor

from deltadock.errors import InvalidCalibration

DAMPING: Final = 0.01
MAX_DAMPING: Final = 1.0


@dataclass(frozen=True, slots=True)
class Metric:
    """A positive definite weighting `M = L L^T` of one side's coordinates.

    Attributes:
        moment: M, damped: (n, n), or its diagonal (n,) where there is nothing else; float64.
        factor: L, lower triangular (n, n), or its diagonal (n,).
        damping: what was added, as a fraction of the mean diagonal.
    """

    moment: Tensor
    factor: Tensor
    damping: float

    @classmethod
    def of(cls, moment: Tensor, damping: float = DAMPING) -> Self:
        """Damp and factor a second moment, (n, n) or (n,).

        What the calibration never excites would otherwise cost nothing and be given up. Damping
        is raised tenfold until the factorisation succeeds; a moment of zero counts as identity.

        Raises:
            InvalidCalibration: the moment is not finite, or not positive at a damping of 100 %.
        """
        work = moment.double()
        if not torch.isfinite(work).all():
            raise InvalidCalibration(
                "The model's activations or gradients on the calibration text hold NaN or an "
                "infinity. Calibrate with other text, or check the checkpoint."
            )
        diagonal = work if work.ndim == 1 else work.diagonal()
        mean = float(diagonal.mean())
        if mean <= 0:
            work, mean = torch.zeros_like(work), 1 / damping
        while damping <= MAX_DAMPING:
            damped = _plus_diagonal(work, damping * mean)
            if damped.ndim == 1:
                return cls(damped, damped.sqrt(), damping)
            factor, failed = torch.linalg.cholesky_ex(damped)
            if not failed:
                return cls(damped, factor, damping)
            damping *= 10
        raise InvalidCalibration(
            "A second moment of the calibration text is not positive even with strong damping. "
            "Calibrate with more or other text."
        )

    @property
    def diagonal(self) -> bool:
        """Whether the coordinates are weighted one by one."""
        return self.moment.ndim == 1

    def whiten(self, rows: Tensor) -> Tensor:
        """(r, n) times L."""
        return rows * self.factor if self.diagonal else rows @ self.factor

    def unwhiten(self, rows: Tensor) -> Tensor:
        """(r, n) times the inverse of L."""
        if self.diagonal:
            return rows / self.factor
        solved: Tensor = torch.linalg.solve_triangular(self.factor, rows, upper=False, left=False)
        return solved

    def times(self, rows: Tensor) -> Tensor:
        """(r, n) times M."""
        return rows * self.moment if self.diagonal else rows @ self.moment

    def scaled(self, scale: Tensor) -> "Metric":
        """The metric of coordinates that are divided by `scale` (n,), positive: `C M C`."""
        if self.diagonal:
            return Metric(self.moment * scale.square(), self.factor * scale, self.damping)
        moment = self.moment * scale[:, None] * scale
        return Metric(moment, self.factor * scale[:, None], self.damping)

    def feedback(self) -> Tensor:
        """Upper Cholesky factor of the inverse, (n, n) float32: how GPTQ passes errors on."""
        upper: Tensor = torch.linalg.cholesky(torch.cholesky_inverse(self.factor), upper=True)
        return upper.float()


def _plus_diagonal(moment: Tensor, strength: float) -> Tensor:
    if moment.ndim == 1:
        return moment + strength
    damped = moment.clone()
    damped.diagonal().add_(strength)
    return damped


def weighted_error(residual: Tensor, rows: Metric, columns: Metric) -> float:
    """`tr(B R A R^T)` of a residual R (h_out, h_in): B weighs its rows, A its columns."""
    weighed = columns.times(rows.times(residual.t()).t())
    return float((weighed * residual).sum())
