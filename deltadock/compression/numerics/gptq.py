"""GPTQ: quantization that moves each column's rounding error onto the columns still to come.

Source: Frantar et al., "GPTQ" (2022), without reordering of columns.
- `quantize_rows` (for V): each row is one singular vector with its own width. Rows do not
  interact, so every candidate width of every row goes through in ONE pass as one tall stack, on
  grids that are known beforehand: `deltadock.kernels.error_compensation`.
- `quantize_columns` (for U): each column is one singular vector with its own width, and its grid
  is set when its turn comes, after every correction from its predecessors: `sweep` is the
  recursion, and what it does to one column is the caller's.

A singular vector has one asymmetric grid, so its scale folds into the singular value. The grid
spans the vector's range shrunk by the factor that leaves the least square error: at 2 bits a grid
over the whole range wastes its levels on the few largest entries.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, NamedTuple

import torch
from torch import Tensor

from deltadock.errors import InvalidCalibration
from deltadock.kernels.error_compensation import round_with_error_compensation

BLOCK: Final = 32
"""Columns whose corrections are applied at once; those of earlier columns come by one product."""

DAMPING: Final = 0.01
MAX_DAMPING: Final = 1.0
SHRINKS: Final = (1.0, 0.9, 0.8, 0.7, 0.625, 0.55, 0.475, 0.4)
SEARCH_ELEMENTS: Final = {"cpu": 1 << 16, "cuda": 1 << 24}
"""Entries whose grids are searched at a time: on a CPU the candidates stay in the cache."""

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
        """The values, (r, n) float32."""
        return self.scale[:, None] * (self.codes.float() - self.zero[:, None])

    def rows(self, index: Tensor) -> "Codes":
        """The vectors at `index`, in that order."""
        return Codes(self.codes[index], self.scale[index], self.zero[index])


class Grid(NamedTuple):
    """Grids of r vectors, each (r,) float32; `levels` is the highest code, `2**bits - 1`.

    `zero` is the code of 0: a whole number on an asymmetric grid, `levels / 2` on a symmetric one.
    """

    scale: Tensor
    zero: Tensor
    levels: Tensor


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
        damped = work.clone()
        damped.diagonal().add_(dead + damping * mean)
        # With order reversed, a lower factor L of H makes L^-1 the upper factor of H's inverse.
        lower, info = torch.linalg.cholesky_ex(damped.flip(0, 1))
        if info == 0:
            return _invert_lower(lower.float()).flip(0, 1), damping
        damping *= 10
    raise InvalidCalibration(
        "A layer's second moment stays singular even with a damping of 100 %. Calibrate with more "
        "text."
    )


def _invert_lower(lower: Tensor) -> Tensor:
    """Inverse of a lower triangular matrix, by products of its halves.

    The damping bounds the factor's condition, so float32 suffices.
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
    """Quantize column by column, each column's error moved onto those after it.

    Corrections reach a column in two steps: one product brings those of all earlier blocks when
    its block begins, rank-one updates bring those of its own block.

    Args:
        work: (n, r) float32 contiguous, the matrix (r, n) transposed, so that a column is
            contiguous; overwritten.
        factor: (n, n), see `inverse_factor`.
        quantize: told a column's number j and the corrected columns j to the end of its block,
            (columns, r); returns the quantized value of the first, (r,).
        block: columns of a block.
    """
    diagonal = factor.diagonal().tolist()
    for start in range(0, len(work), block):
        stop = min(start + block, len(work))
        if start:
            # The rows of `work` that are done hold their columns' errors.
            work[start:stop].addmm_(factor[:start, start:stop].t(), work[:start], alpha=-1)
        for j in range(start, stop):
            error = work[j].sub_(quantize(j, work[j:stop])).div_(diagonal[j])
            work[j + 1 : stop].addr_(factor[j, j + 1 : stop], error, alpha=-1)


def columns_first(values: Tensor) -> Tensor:
    """(m, n) as `sweep` overwrites it, (n, m) float32: a copy, also of a single row or column."""
    return values.t().to(torch.float32, memory_format=torch.contiguous_format, copy=True)


def search_grid(values: Tensor, levels: Tensor, *, symmetric: bool = False) -> Grid:
    """Each row's grid of least square error among `SHRINKS` of its range.

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
    return Grid(scale, zero, levels)


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
    # Errors are measured in steps, from the value as a code (the exact one) to the nearest code.
    exact = values * scale.reciprocal()[:, :, None]
    exact.add_(zero[:, :, None])
    code = exact.round().clamp_min_(0)
    torch.minimum(code, levels[:, None], out=code)
    error = torch.linalg.vector_norm(code.sub_(exact), dim=2) * scale
    best = error.argmin(dim=0, keepdim=True)
    return scale.gather(0, best)[0], zero.gather(0, best)[0]


def nearest(values: Tensor, grid: Grid, codes: Tensor) -> Tensor:
    """The grid points nearest to `values` (r,), one of each vector; writes their codes (uint8)."""
    code = torch.addcmul(grid.zero, values, grid.scale.reciprocal()).round_().clamp_min_(0)
    torch.minimum(code, grid.levels, out=code)
    codes.copy_(code)
    return code.sub_(grid.zero).mul_(grid.scale)


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
    grid = search_grid(values.float(), (2.0**bits - 1).float().to(values.device))
    work = columns_first(values).div_(grid.scale)
    codes = round_with_error_compensation(work, factor, grid.zero, grid.levels)
    return Codes(codes.t().contiguous(), grid.scale, grid.zero), damping


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
