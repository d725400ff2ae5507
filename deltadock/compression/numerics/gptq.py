"""GPTQ: quantization that compensates each column's rounding error in the following columns.

Source: Frantar et al., "GPTQ" (2022), without reordering of columns.
- `quantize_rows` (for V): each row is one singular vector with its own width. Rows do not
  interact, so all candidate widths of all rows are quantized in one pass as one tall stack, on
  grids chosen beforehand: `deltadock.kernels.error_compensation`.
- `quantize_columns` (for U): each column is one singular vector with its own width, and its grid
  is chosen after all corrections from the columns before it: `sweep` is the recursion, the caller
  quantizes each column.

A singular vector has one asymmetric grid, so its scale folds into the singular value. The grid
spans the vector's range, shrunk by the factor of least square error: at 2 bits a grid over the
whole range wastes its levels on the few largest entries.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, NamedTuple

import torch
from torch import Tensor

from deltadock.compression.numerics.metric import damped_cholesky
from deltadock.kernels.error_compensation import round_with_error_compensation

BLOCK: Final = 32
"""Columns of a block: corrections from earlier blocks are applied by one matrix product."""

SHRINKS: Final = (1.0, 0.9, 0.8, 0.7, 0.625, 0.55, 0.475, 0.4)
SEARCH_ELEMENTS: Final = {"cpu": 1 << 16, "cuda": 1 << 24}
"""Entries whose grids are searched at a time; on a CPU the candidates fit into the cache."""

TRIANGLE: Final = 256
"""Largest triangular matrix inverted by substitution."""


@dataclass(frozen=True, slots=True)
class Codes:
    """Quantized vectors, one a row: `value = scale * (code - zero)`.

    Shapes: codes (r, n) uint8; scale (r,) and zero (r,) float32, zero a whole number.
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor

    def decode(self) -> Tensor:
        """Dequantize, (r, n) float32."""
        return self.scale[:, None] * (self.codes.float() - self.zero[:, None])

    def rows(self, index: Tensor) -> "Codes":
        """Select vectors by index (k,)."""
        return Codes(self.codes[index], self.scale[index], self.zero[index])


class QuantizationGrid(NamedTuple):
    """Grids of r vectors, each (r,) float32; `levels` is the highest code, `2**bits - 1`.

    `zero` is the code of 0: a whole number on an asymmetric grid, `levels / 2` on a symmetric one.
    """

    scale: Tensor
    zero: Tensor
    levels: Tensor


def inverse_factor(hessian: Tensor) -> tuple[Tensor, float]:
    """Upper Cholesky factor of the inverse of the damped Hessian, and the damping used.

    Dead columns (zero diagonal) carry no error, whatever their code: they get the mean diagonal.

    Args:
        hessian: (n, n), symmetric positive semidefinite, any float dtype.

    Returns:
        ((n, n) float32, damping as a fraction of the mean diagonal).

    Raises:
        InvalidCalibration: the Hessian is not finite or stays singular at a damping of 100 %.
    """
    work = hessian.to(torch.float64, copy=True)
    diagonal = work.diagonal()
    mean = diagonal.mean().clamp_min(torch.finfo(torch.float64).tiny)
    diagonal += torch.where(diagonal <= 0, mean, torch.zeros_like(diagonal))
    # With order reversed, a lower factor L of H makes L^-1 the upper factor of H's inverse.
    _, lower, damping = damped_cholesky(work.flip(0, 1), float(mean))
    return _invert_lower(lower.float()).flip(0, 1), damping


def _invert_lower(lower: Tensor) -> Tensor:
    """Invert a lower triangular matrix by recursion on its halves.

    Damping bounds the factor's condition number, so float32 suffices.
    """
    size = len(lower)
    if size <= TRIANGLE:
        eye = torch.eye(size, dtype=lower.dtype, device=lower.device)
        inverse: Tensor = torch.linalg.solve_triangular(lower, eye, upper=False)
        return inverse
    half = size // 2
    inverse = torch.zeros_like(lower)
    inverse[:half, :half] = _invert_lower(lower[:half, :half])
    inverse[half:, half:] = _invert_lower(lower[half:, half:])
    corner = lower[half:, :half] @ inverse[:half, :half]
    inverse[half:, :half] = (inverse[half:, half:] @ corner).neg_()
    return inverse


def sweep(
    work: Tensor, factor: Tensor, quantize: Callable[[int, Tensor], Tensor], block: int = BLOCK
) -> None:
    """Quantize column by column, compensating each column's error in those after it.

    Corrections from earlier blocks are applied by one product when a block begins, those from its
    own block by rank-one updates.

    Args:
        work: (n, r) float32 contiguous, the matrix (r, n) transposed, so that a column is
            contiguous; overwritten.
        factor: (n, n), see `inverse_factor`.
        quantize: called with a column's index j and the corrected columns j to the end of its
            block, (columns, r); returns the quantized values of the first, (r,).
        block: columns of a block.
    """
    diagonal = factor.diagonal().tolist()
    for start in range(0, len(work), block):
        stop = min(start + block, len(work))
        if start:
            # The finished rows of `work` hold their columns' errors.
            work[start:stop].addmm_(factor[:start, start:stop].t(), work[:start], alpha=-1)
        for j in range(start, stop):
            error = work[j].sub_(quantize(j, work[j:stop])).div_(diagonal[j])
            work[j + 1 : stop].addr_(factor[j, j + 1 : stop], error, alpha=-1)


def columns_first(values: Tensor) -> Tensor:
    """Transpose (m, n) to a contiguous float32 copy (n, m), as `sweep` takes it."""
    return values.t().to(torch.float32, memory_format=torch.contiguous_format, copy=True)


def search_grid(values: Tensor, levels: Tensor, *, symmetric: bool = False) -> QuantizationGrid:
    """Search each row's grid of least square error among `SHRINKS` of its range.

    Args:
        values: (r, n) float32, one vector a row.
        levels: (r,) float32, highest codes.
        symmetric: grids symmetric about 0, with 0 halfway between two codes.
    """
    rows = max(1, SEARCH_ELEMENTS[values.device.type] // max(values.shape[1], 1))
    pieces = [
        _search(piece, highest, symmetric)
        for piece, highest in zip(values.split(rows), levels.split(rows), strict=True)
    ]
    scale, zero = (torch.cat(parts) for parts in zip(*pieces, strict=True))
    return QuantizationGrid(scale, zero, levels)


def _search(values: Tensor, levels: Tensor, symmetric: bool) -> tuple[Tensor, Tensor]:
    low, high = values.amin(dim=1).clamp_max(0), values.amax(dim=1).clamp_min(0)
    if symmetric:
        high = torch.maximum(-low, high)
        low = -high
    shrinks = torch.tensor(SHRINKS, device=values.device)[:, None]
    tiny = torch.finfo(torch.float32).tiny
    scale = (shrinks * (high - low) / levels).clamp_min(tiny)
    if symmetric:
        zero = (levels / 2).expand_as(scale)
    else:
        zero = (-shrinks * low / scale).round().clamp_(min=0).minimum(levels)
    # Errors are in steps, from the exact value in code units to the nearest code.
    exact = values * scale.reciprocal()[:, :, None]
    exact.add_(zero[:, :, None])
    code = exact.round().clamp_min_(0)
    torch.minimum(code, levels[:, None], out=code)
    error = torch.linalg.vector_norm(code.sub_(exact), dim=2) * scale
    best = error.argmin(dim=0, keepdim=True)
    return scale.gather(0, best)[0], zero.gather(0, best)[0]


def nearest(values: Tensor, grid: QuantizationGrid, codes: Tensor) -> Tensor:
    """Quantize `values` (r,), one per vector: write their codes (uint8), return grid points."""
    code = torch.addcmul(grid.zero, values, grid.scale.reciprocal()).round_().clamp_min_(0)
    torch.minimum(code, grid.levels, out=code)
    codes.copy_(code)
    return code.sub_(grid.zero).mul_(grid.scale)


def quantize_rows(values: Tensor, bits: Tensor, hessian: Tensor) -> tuple[Codes, float]:
    """Quantize each row under one Hessian over the columns.

    Args:
        values: (r, n); row i is quantized to `bits[i]`.
        bits: (r,) integer widths, 1 to 8.
        hessian: (n, n), second moment of the inputs that multiply the columns.

    Returns:
        The codes, and the damping used (fraction of the mean diagonal).
    """
    factor, damping = inverse_factor(hessian)
    grid = search_grid(values.float(), (2.0**bits - 1).float().to(values.device))
    work = columns_first(values).div_(grid.scale)
    codes = round_with_error_compensation(work, factor, grid.zero, grid.levels)
    return Codes(codes.t().contiguous(), grid.scale, grid.zero), damping


def quantize_columns(values: Tensor, bits: Tensor, hessian: Tensor) -> tuple[Codes, float]:
    """Quantize each column under one Hessian over the columns, with one grid per column.

    Args:
        values: (m, r); column i is quantized to `bits[i]`.
        bits: (r,) integer widths, 1 to 8.
        hessian: (r, r), second moment of the inputs that multiply the columns.

    Returns:
        The codes as (r, m), one singular vector per row, and the damping used.
    """
    factor, damping = inverse_factor(hessian)
    work = columns_first(values)
    levels = (2.0**bits - 1).float().to(work.device)
    codes = torch.empty(work.shape, dtype=torch.uint8, device=work.device)
    scale, zero = torch.empty((2, len(work)), device=work.device)

    def quantize(j: int, columns: Tensor) -> Tensor:
        grid = search_grid(columns[:1], levels[j : j + 1])
        scale[j], zero[j] = grid.scale[0], grid.zero[0]
        return nearest(columns[0], grid, codes[j])

    sweep(work, factor, quantize)
    return Codes(codes, scale, zero), damping
