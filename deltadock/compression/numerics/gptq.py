"""GPTQ: quantization that compensates each column's rounding error in the following columns.

Source: Frantar et al., "GPTQ" (2022), without reordering of columns.
- `quantize_rows` (for V): each row is one singular vector with its own width. Rows do not
  interact, so all candidate widths of all rows are quantized in one pass as one tall stack, on
  grids chosen beforehand: `deltadock.kernels.error_compensation`.
- `quantize_columns` (for U): each column is one singular vector with its own width. The grids of a
  block of columns are chosen together, after the corrections from the blocks before it, and then
  refined with those from within the block.

Both take b matrices of equal shape at a time.

A singular vector has one asymmetric grid, so its scale folds into the singular value. The grid
spans the vector's range, shrunk by the factor of least square error: at 2 bits a grid over the
whole range wastes its levels on the few largest entries.
"""

from dataclasses import dataclass
from typing import Final, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from deltadock.compression.numerics.metric import damped_cholesky
from deltadock.kernels.error_compensation import (
    apply_errors,
    blocks,
    round_block,
    round_with_error_compensation,
)

SHRINKS: Final = (1.0, 0.9, 0.8, 0.7, 0.625, 0.55, 0.475, 0.4)
SEARCH_ELEMENTS: Final = {"cpu": 1 << 16, "cuda": 1 << 24}
"""Entries whose grids are searched at a time; on a CPU the candidates fit into the cache."""

TINY: Final = torch.finfo(torch.float32).tiny
"""Smallest step, that of a vector of zeros."""

GRID_SEARCHES: Final = 4
"""Times that the grids of a block of U's columns are searched: at first without the corrections
from within the block, then with those of the round before. Four match a search for each column in
turn: on the sample's matrices the output errors add up to .288 at 1.0 bit, as with one column a
block; two searches give .290, a single one .301."""

TRIANGLE: Final = 256
"""Largest triangular matrix inverted by substitution."""


@dataclass(frozen=True, slots=True)
class Codes:
    """Quantized vectors, one a row: `value = scale * (code - zero)`.

    Shapes: codes (..., r, n) uint8; scale and zero (..., r) float32, zero a whole number.
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor

    def decode(self) -> Tensor:
        """Dequantize, (..., r, n) float32."""
        return self.scale[..., None] * (self.codes.float() - self.zero[..., None])

    def __getitem__(self, index: Tensor | tuple[int | slice | Tensor, ...]) -> "Codes":
        """Select vectors by an index into (..., r)."""
        return Codes(self.codes[index], self.scale[index], self.zero[index])


class QuantizationGrid(NamedTuple):
    """Grids of r vectors, each (..., r) float32; `levels` is the highest code, `2**bits - 1`.

    `zero` is the code of 0: a whole number on an asymmetric grid, `levels / 2` on a symmetric one.
    """

    scale: Tensor
    zero: Tensor
    levels: Tensor


def inverse_factors(hessians: Tensor) -> tuple[Tensor, list[float]]:
    """Upper Cholesky factors of the inverses of damped Hessians, and the damping of each.

    Dead columns (zero diagonal) carry no error, whatever their code: they get the mean diagonal.
    A Hessian of zeros counts as identity.

    Args:
        hessians: (b, n, n), symmetric positive semidefinite, any float dtype.

    Returns:
        ((b, n, n) float32, damping of each as a fraction of its mean diagonal).

    Raises:
        InvalidCalibration: a Hessian is not finite or stays singular at a damping of 100 %.
    """
    work = hessians.to(torch.float64, copy=True)
    diagonal = work.diagonal(dim1=1, dim2=2)
    mean = diagonal.mean(1)
    mean = torch.where(mean > 0, mean, 1.0)
    diagonal += torch.where(diagonal <= 0, mean[:, None], torch.zeros_like(diagonal))
    # With order reversed, a lower factor L of H makes L^-1 the upper factor of H's inverse.
    _, lower, damping = damped_cholesky(work.flip(1, 2), mean)
    return _invert_lower(lower.float()).flip(1, 2), damping


def _invert_lower(lower: Tensor) -> Tensor:
    """Invert lower triangular matrices (b, n, n): diagonal blocks, then twice the size each step.

    Damping bounds the factors' condition number, so float32 suffices.
    """
    problems, size, _ = lower.shape
    levels = (max(size - 1, 0) // TRIANGLE).bit_length()
    block = -(-size // 2**levels)
    padding = (block << levels) - size
    padded = F.pad(lower, (0, padding, 0, padding))
    padded.diagonal(dim1=1, dim2=2)[:, size:] = 1.0
    inverse = torch.zeros_like(padded)

    def cells(matrix: Tensor, block: int) -> Tensor:
        """(b, pairs, 2, 2, block, block): the cells of `matrix` around its diagonal in pairs."""
        pairs = matrix.shape[1] // (2 * block)
        split = matrix.view(problems, pairs, 2, block, pairs, 2, block)
        return split.diagonal(dim1=1, dim2=4).permute(0, 5, 1, 3, 2, 4)

    count = 1 << levels
    split = padded.view(problems, count, block, count, block).diagonal(dim1=1, dim2=3)
    eye = torch.eye(block, dtype=lower.dtype, device=lower.device)
    solved = torch.linalg.solve_triangular(split.permute(0, 3, 1, 2), eye, upper=False)
    inverse.view(problems, count, block, count, block).diagonal(dim1=1, dim2=3).copy_(
        solved.permute(0, 2, 3, 1)
    )
    for _ in range(levels):
        corner, known = cells(padded, block)[:, :, 1, 0], cells(inverse, block)
        known[:, :, 1, 0] = -(known[:, :, 1, 1] @ (corner @ known[:, :, 0, 0]))
        block *= 2
    return inverse[:, :size, :size]


def columns_first(values: Tensor) -> Tensor:
    """Transpose (..., m, n) to a contiguous float32 copy (..., n, m)."""
    return values.mT.to(torch.float32, memory_format=torch.contiguous_format, copy=True)


def search_grid(values: Tensor, levels: Tensor, *, symmetric: bool = False) -> QuantizationGrid:
    """Search each row's grid of least square error among `SHRINKS` of its range.

    Args:
        values: (..., r, n) float32, one vector a row.
        levels: (..., r) float32, highest codes.
        symmetric: grids symmetric about 0, with 0 halfway between two codes.
    """
    flat = values.reshape(-1, values.shape[-1])
    rows = max(1, SEARCH_ELEMENTS[values.device.type] // max(flat.shape[1], 1))
    pieces = [
        _search(piece, highest, symmetric)
        for piece, highest in zip(flat.split(rows), levels.flatten().split(rows), strict=True)
    ]
    scale, zero = (torch.cat(parts).view_as(levels) for parts in zip(*pieces, strict=True))
    return QuantizationGrid(scale, zero, levels)


def _search(values: Tensor, levels: Tensor, symmetric: bool) -> tuple[Tensor, Tensor]:
    low, high = values.amin(dim=1).clamp_max(0), values.amax(dim=1).clamp_min(0)
    if symmetric:
        high = torch.maximum(-low, high)
        low = -high
    shrinks = torch.tensor(SHRINKS, device=values.device)[:, None]
    scale = (shrinks * (high - low) / levels).clamp_min(TINY)
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


def quantize_rows(values: Tensor, bits: Tensor, hessians: Tensor) -> tuple[Codes, list[float]]:
    """Quantize the rows of b matrices, each under one Hessian over its columns.

    Args:
        values: (b, r, n); row i of a matrix is quantized to its `bits[i]`.
        bits: (b, r) integer widths, 1 to 8.
        hessians: (b, n, n), second moments of the inputs that multiply the columns.

    Returns:
        The codes, and each matrix's damping (fraction of the mean diagonal).
    """
    factor, damping = inverse_factors(hessians)
    grid = search_grid(values.float(), (2.0**bits - 1).float().to(values.device))
    scale, zero, levels = (one[:, None] for one in grid)
    work = columns_first(values).div_(scale)
    codes = round_with_error_compensation(work, factor, zero, levels)
    return Codes(codes.mT.contiguous(), grid.scale, grid.zero), damping


def quantize_columns(values: Tensor, bits: Tensor, hessians: Tensor) -> tuple[Codes, list[float]]:
    """Quantize the columns of b matrices, each under one Hessian, with one grid per column.

    Args:
        values: (b, m, r); column i of a matrix is quantized to its `bits[i]`.
        bits: (b, r) integer widths, 1 to 8.
        hessians: (b, r, r), second moments of the inputs that multiply the columns.

    Returns:
        The codes as (b, r, m), one singular vector per row, and each matrix's damping.
    """
    factor, damping = inverse_factors(hessians)
    work = columns_first(values)
    levels = (2.0**bits - 1).float().to(work.device)
    codes = torch.empty(work.shape, dtype=torch.uint8, device=work.device)
    scale, zero = torch.empty_like(levels), torch.empty_like(levels)
    for start, stop in blocks(work):
        piece = slice(start, stop)
        apply_errors(work, factor, start, stop)
        diagonal = factor[:, piece, piece].diagonal(dim1=1, dim2=2)[:, :, None]
        corner = factor[:, piece, piece] / diagonal
        before = corrected = work[:, piece].clone()
        rows = work[:, piece]
        for _ in range(GRID_SEARCHES):
            grid = search_grid(corrected, levels[:, piece])
            # A column of zeros has the smallest step there is, which must not divide others.
            step = torch.where(grid.scale > TINY, grid.scale, 1.0)[:, :, None]
            base, top = (one[:, :, None].expand_as(rows) for one in (grid.zero, grid.levels))
            torch.div(before, step, out=rows)
            # In units of the steps, an error is what rounding took away.
            round_block(rows, codes[:, piece], corner * step / step.mT, base, top)
            # What was rounded: corrected by the columns before in this block too.
            corrected = (rows + codes[:, piece]).sub_(base).mul_(step)
        rows *= step / diagonal
        scale[:, piece], zero[:, piece] = grid.scale, grid.zero
    return Codes(codes, scale, zero), damping
