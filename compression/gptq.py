"""GPTQ: quantization that moves each column's rounding error onto the columns still to come.

Source: Frantar et al., "GPTQ" (2022), in its blocked form, without reordering of columns. Two uses
differ in what shares a grid:
- `quantize_rows` (for V): each row of the matrix is one singular vector with its own width, and
  its grids lie along the row. Rows do not interact, so every candidate width of every row goes
  through in ONE pass as one tall stack.
- `quantize_columns` (for U): each column is one singular vector with its own width, and its grids
  lie along the column.
Grids are asymmetric min-max over groups of `group` neighbouring entries of one singular vector.
"""

from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

BLOCK: Final = 128
DAMPING: Final = 0.01
MAX_DAMPING: Final = 1.0


@dataclass(frozen=True, slots=True)
class Codes:
    """Quantized vectors, one a row: `value = scale * (code - zero)` in groups along the row.

    Shapes: codes (r, n) uint8, scale (r, n / group, rounded up) float16, zero alike uint8.
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor
    group: int

    def decode(self) -> Tensor:
        """The values, (r, n) float32."""
        n = self.codes.shape[1]
        scale = self.scale.float().repeat_interleave(self.group, dim=1)[:, :n]
        zero = self.zero.float().repeat_interleave(self.group, dim=1)[:, :n]
        return scale * (self.codes.float() - zero)

    def rows(self, index: Tensor) -> "Codes":
        """The vectors at `index`, in that order."""
        return Codes(self.codes[index], self.scale[index], self.zero[index], self.group)


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
        ValueError: the Hessian is not finite or stays singular at a damping of 100 %.
    """
    work = hessian.double()
    if not torch.isfinite(work).all():
        raise ValueError("the Hessian holds NaN or an infinity")
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
    raise ValueError("the Hessian is singular even with a damping of 100 %")


def minmax_grid(values: Tensor, levels: Tensor) -> tuple[Tensor, Tensor]:
    """Asymmetric grids that span the values and zero.

    Args:
        values: (..., group) float32.
        levels: the highest code, `2**bits - 1`, broadcastable to `values[..., 0]`.

    Returns:
        scale (...) float32, already rounded to what float16 holds, and zero (...) float32.
    """
    low = values.amin(dim=-1).clamp_max(0)
    high = values.amax(dim=-1).clamp_min(0)
    smallest = torch.finfo(torch.float16).tiny
    scale = ((high - low) / levels).clamp_min(smallest).half().float()
    zero = torch.minimum((-low / scale).round(), levels)
    return scale, zero


def quantize_rows(
    values: Tensor, bits: Tensor, hessian: Tensor, group: int | None = BLOCK
) -> tuple[Codes, float]:
    """Quantize each row under one Hessian over the columns.

    Args:
        values: (r, n); row i is quantized to `bits[i]`.
        bits: (r,) integer widths, 1 to 8.
        hessian: (n, n), second moment of what multiplies the columns.
        group: entries of a row that share a grid, `BLOCK` or None for one grid a row.

    Returns:
        The codes, and the damping used (fraction of the mean diagonal).
    """
    factor, damping = inverse_factor(hessian)
    # Transposed, so that the inner loop walks contiguous memory.
    work = values.float().t().contiguous()
    n, r = work.shape
    size = group or max(n, 1)
    levels = (2.0 ** bits - 1).float()
    codes = torch.empty((n, r), dtype=torch.uint8, device=work.device)
    scales, zeros = (torch.empty((-(-n // size), r), device=work.device) for _ in range(2))
    for start in range(0, n, BLOCK):
        stop = min(start + BLOCK, n)
        g = start // size
        if start % size == 0:
            scales[g], zeros[g] = minmax_grid(work[start : start + size].t(), levels)
        scale, zero = scales[g], zeros[g]
        errors = torch.empty((stop - start, r), device=work.device)
        for j in range(start, stop):
            code = torch.minimum((work[j] / scale).round_().add_(zero).clamp_min_(0), levels)
            codes[j] = code.to(torch.uint8)
            error = (work[j] - scale * (code - zero)) / factor[j, j]
            errors[j - start] = error
            work[j + 1 : stop] -= factor[j, j + 1 : stop, None] * error
        work[stop:] -= factor[start:stop, stop:].t() @ errors
    quantized = Codes(codes.t().contiguous(), scales.t().half(), zeros.t().to(torch.uint8), size)
    return quantized, damping


def quantize_columns(
    values: Tensor, bits: Tensor, hessian: Tensor, group: int | None = BLOCK
) -> tuple[Codes, float]:
    """Quantize each column under one Hessian over the columns; grids lie along the columns.

    A column's grids are set when its turn comes, after every correction from its predecessors.

    Args:
        values: (m, r); column i is quantized to `bits[i]`.
        bits: (r,) integer widths, 1 to 8.
        hessian: (r, r), second moment of what multiplies the columns.
        group: entries of a column that share a grid, `BLOCK` or None for one grid a column.

    Returns:
        The codes as (r, m), one singular vector a row, and the damping used.
    """
    factor, damping = inverse_factor(hessian)
    work = values.float().t().contiguous()
    r, m = work.shape
    size = group or max(m, 1)
    groups = -(-m // size)
    codes = torch.empty((r, m), dtype=torch.uint8, device=work.device)
    scales, zeros = (torch.empty((r, groups), device=work.device) for _ in range(2))
    for start in range(0, r, BLOCK):
        stop = min(start + BLOCK, r)
        errors = torch.empty((stop - start, m), device=work.device)
        for i in range(start, stop):
            # Padding with zeros changes no grid: every grid spans zero anyway.
            padded = torch.nn.functional.pad(work[i], (0, groups * size - m)).view(groups, size)
            level = (2.0 ** bits[i] - 1).float()
            scales[i], zeros[i] = minmax_grid(padded, level)
            scale, zero = scales[i, :, None], zeros[i, :, None]
            code = torch.minimum((padded / scale).round_().add_(zero).clamp_min_(0), level)
            codes[i] = code.flatten()[:m].to(torch.uint8)
            error = (padded - scale * (code - zero)).flatten()[:m] / factor[i, i]
            errors[i - start] = error
            work[i + 1 : stop] -= factor[i, i + 1 : stop, None] * error
        work[stop:] -= factor[start:stop, stop:].t() @ errors
    return Codes(codes, scales.half(), zeros.to(torch.uint8), size), damping
