"""GPTQ: quantization that moves each column's rounding error onto the columns still to come.

Source: Frantar et al., "GPTQ" (2022), in its blocked form, without reordering of columns. Two uses
differ in what shares a grid:
- `quantize_rows` (for V): each row is one singular vector with its own width. Rows do not
  interact, so every candidate width of every row goes through in ONE pass as one tall stack.
- `quantize_columns` (for U): each column is one singular vector with its own width, and its grid
  is set when its turn comes, after every correction from its predecessors.

A singular vector has one asymmetric grid, so its scale folds into the singular value. The grid
spans the vector's range shrunk by the factor that leaves the least square error: at 2 bits a grid
over the whole range wastes its levels on the few largest entries.
"""

from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from deltadock.errors import InvalidCalibration

BLOCK: Final = 128
DAMPING: Final = 0.01
MAX_DAMPING: Final = 1.0
SHRINKS: Final = (1.0, 0.9, 0.8, 0.7, 0.625, 0.55, 0.475, 0.4)


@dataclass(frozen=True, slots=True)
class Codes:
    """Quantized vectors, one a row: `value = scale * (code - zero)`.

    Shapes: codes (r, n) uint8; scale (r,) and zero (r,) float32, zero a whole number.
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor

    def decode(self) -> Tensor:
        """The values, (r, n) float32."""
        return self.scale[:, None] * (self.codes.float() - self.zero[:, None])

    def rows(self, index: Tensor) -> "Codes":
        """The vectors at `index`, in that order."""
        return Codes(self.codes[index], self.scale[index], self.zero[index])


def inverse_factor(hessian: Tensor) -> tuple[Tensor, float]:
    """Upper Cholesky factor of the damped Hessian's inverse, and the damping that it took.

    Damping starts at 1 % of the mean diagonal and is raised tenfold until the factorisation
    succeeds. Dead columns (zero diagonal) carry no error, whatever their code: they get a unit
    diagonal.

    Args:
        hessian: (n, n), symmetric positive semidefinite, any float dtype.

    Returns:
        ((n, n) float32, damping as a fraction of the mean diagonal).

    Raises:
        InvalidCalibration: the Hessian is not finite or stays singular at a damping of 100 %.
    """
    work = hessian.double()
    if not torch.isfinite(work).all():
        raise InvalidCalibration(
            "The model's activations on the calibration text hold NaN or an infinity. Calibrate "
            "with other text, or check the checkpoint."
        )
    diagonal = work.diagonal()
    mean = diagonal.mean().clamp_min(torch.finfo(torch.float64).tiny)
    dead = torch.where(diagonal <= 0, mean, torch.zeros_like(diagonal))
    damping = DAMPING
    while damping <= MAX_DAMPING:
        damped = work + torch.diag(dead + damping * mean)
        lower, info = torch.linalg.cholesky_ex(damped)
        if info == 0:
            inverse = torch.cholesky_inverse(lower)
            upper, info = torch.linalg.cholesky_ex(inverse, upper=True)
            if info == 0:
                return upper.float(), damping
        damping *= 10
    raise InvalidCalibration(
        "A layer's second moment stays singular even with a damping of 100 %. Calibrate with more "
        "text."
    )


def _round(values: Tensor, scale: Tensor, zero: Tensor, levels: Tensor) -> Tensor:
    """Codes of `values`, as floats; the grids broadcast over the last dimension's vectors."""
    return torch.minimum((values / scale).round_().add_(zero).clamp_min_(0), levels)


def search_grid(values: Tensor, levels: Tensor) -> tuple[Tensor, Tensor]:
    """Each column's asymmetric grid of least square error among `SHRINKS` of its range.

    Args:
        values: (n, r) float32, one vector a column.
        levels: (r,) highest codes, `2**bits - 1`.

    Returns:
        scale (r,) and zero (r,), float32.
    """
    low = values.amin(dim=0).clamp_max(0)
    high = values.amax(dim=0).clamp_min(0)
    tiny = torch.finfo(torch.float32).tiny
    best = torch.full_like(low, torch.inf)
    best_scale, best_zero = torch.ones_like(low), torch.zeros_like(low)
    for shrink in SHRINKS:
        scale = (shrink * (high - low) / levels).clamp_min(tiny)
        zero = (-shrink * low / scale).round().clamp_(min=0).minimum(levels)
        error = (scale * (_round(values, scale, zero, levels) - zero) - values).square_().sum(dim=0)
        better = error < best
        best = torch.where(better, error, best)
        best_scale = torch.where(better, scale, best_scale)
        best_zero = torch.where(better, zero, best_zero)
    return best_scale, best_zero


def quantize_rows(values: Tensor, bits: Tensor, hessian: Tensor) -> tuple[Codes, float]:
    """Quantize each row under one Hessian over the columns.

    Args:
        values: (r, n); row i is quantized to `bits[i]`.
        bits: (r,) integer widths, 1 to 8.
        hessian: (n, n), second moment of what multiplies the columns.

    Returns:
        The codes, and the damping used (fraction of the mean diagonal).
    """
    factor, damping = inverse_factor(hessian)
    # Transposed, so that the inner loop walks contiguous memory.
    work = values.float().t().contiguous()
    n, r = work.shape
    levels = (2.0**bits - 1).float()
    scale, zero = search_grid(work, levels)
    codes = torch.empty((n, r), dtype=torch.uint8, device=work.device)
    for start in range(0, n, BLOCK):
        stop = min(start + BLOCK, n)
        errors = torch.empty((stop - start, r), device=work.device)
        for j in range(start, stop):
            code = _round(work[j], scale, zero, levels)
            codes[j] = code.to(torch.uint8)
            errors[j - start] = (work[j] - scale * (code - zero)) / factor[j, j]
            work[j + 1 : stop] -= factor[j, j + 1 : stop, None] * errors[j - start]
        work[stop:] -= factor[start:stop, stop:].t() @ errors
    return Codes(codes.t().contiguous(), scale, zero), damping


def quantize_columns(values: Tensor, bits: Tensor, hessian: Tensor) -> tuple[Codes, float]:
    """Quantize each column under one Hessian over the columns, with one grid a column.

    Args:
        values: (m, r); column i is quantized to `bits[i]`.
        bits: (r,) integer widths, 1 to 8.
        hessian: (r, r), second moment of what multiplies the columns.

    Returns:
        The codes as (r, m), one singular vector a row, and the damping used.
    """
    factor, damping = inverse_factor(hessian)
    work = values.float().t().contiguous()
    r, m = work.shape
    levels = (2.0**bits - 1).float()
    codes = torch.empty((r, m), dtype=torch.uint8, device=work.device)
    scale, zero = torch.empty((2, r), device=work.device)
    for start in range(0, r, BLOCK):
        stop = min(start + BLOCK, r)
        errors = torch.empty((stop - start, m), device=work.device)
        for i in range(start, stop):
            scale[i : i + 1], zero[i : i + 1] = search_grid(work[i, :, None], levels[i : i + 1])
            code = _round(work[i], scale[i], zero[i], levels[i])
            codes[i] = code.to(torch.uint8)
            errors[i - start] = (work[i] - scale[i] * (code - zero[i])) / factor[i, i]
            work[i + 1 : stop] -= factor[i, i + 1 : stop, None] * errors[i - start]
        work[stop:] -= factor[start:stop, stop:].t() @ errors
    return Codes(codes, scale, zero), damping
