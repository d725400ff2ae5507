"""Rounding with GPTQ error compensation: each coordinate's error is propagated to later ones.

The recursion of GPTQ (Frantar et al., 2022), in units of a grid's step:
`code = clamp(floor(w + zero + 1/2), 0, top)` represents `code - zero`. With F the upper Cholesky
factor of the inverse Hessian, coordinate j has the error `e_j = (w_j - (code_j - zero)) / F_jj`,
and `F_jk e_j` is subtracted from every later coordinate k.

Pruned to 2 of every 4 coordinates as in SparseGPT (Frantar and Alistarh, 2023), four coordinates
keep the two of largest `|w_j / F_jj|`, once corrected for all before them; the others are zero.
"""

from typing import Final

import torch
from torch import Tensor

BLOCK: Final = {"cpu": 32, "cuda": 64}
"""Coordinates per block, by device type; one matrix product per block applies earlier errors."""
GROUP: Final = 4
KEPT: Final = 2
"""Coordinates that are kept of a group of `GROUP`."""


def round_with_error_compensation(
    values: Tensor, factor: Tensor, zero: Tensor, top: Tensor
) -> Tensor:
    """Round the vectors of b independent problems; return the codes, (b, n, r) uint8.

    Vectors are independent. On a GPU a block of coordinates of all problems is one kernel launch.

    Args:
        values: (b, n, r) float32 contiguous: r vectors of n coordinates each, one per column, in
            steps of their grids; overwritten with the errors `e`.
        factor: (b, n, n) float32, upper triangular with a positive diagonal.
        zero: zero points, float32, of a shape that broadcasts to `values`.
        top: highest codes, at most 255, likewise.

    Raises:
        ValueError: a shape, dtype or layout differs from these.
    """
    _check(values, factor, zero, top)
    codes = torch.empty(values.shape, dtype=torch.uint8, device=values.device)
    zero, top = zero.expand_as(values), top.expand_as(values)
    for start, stop in blocks(values):
        apply_errors(values, factor, start, stop)
        piece = slice(start, stop)
        round_block(
            values[:, piece], codes[:, piece], factor[:, piece, piece], zero[:, piece],
            top[:, piece],
        )  # fmt: skip
    return codes


def prune_with_error_compensation(
    values: Tensor, factor: Tensor, top: Tensor
) -> tuple[Tensor, Tensor]:
    """Keep and round 2 of every 4 coordinates, on grids symmetric about zero.

    Args:
        values, factor: as of `round_with_error_compensation`, with errors in their place after.
        top: highest codes (b, r).

    Returns:
        The codes (b, n, r) uint8, 0 where pruned, and which are kept, bool.

    Raises:
        ValueError: a shape, dtype or layout differs from these.
    """
    _check(values, factor, top[:, None], top[:, None])
    codes = torch.empty(values.shape, dtype=torch.uint8, device=values.device)
    kept = torch.empty(values.shape, dtype=torch.bool, device=values.device)
    for start, stop in blocks(values):
        apply_errors(values, factor, start, stop)
        piece = slice(start, stop)
        prune_block(values[:, piece], codes[:, piece], kept[:, piece], factor[:, piece, piece], top)
    return codes, kept


def blocks(values: Tensor) -> list[tuple[int, int]]:
    """First and end coordinate of each block of `values` (b, n, r)."""
    n, step = values.shape[1], BLOCK[values.device.type]
    return [(start, min(start + step, n)) for start in range(0, n, step)]


def apply_errors(values: Tensor, factor: Tensor, start: int, stop: int) -> None:
    """Subtract the errors of all coordinates before `start` from those up to `stop`."""
    if start:
        weights = factor[:, :start, start:stop].transpose(1, 2)
        values[:, start:stop].baddbmm_(weights, values[:, :start], alpha=-1)


def round_block(rows: Tensor, codes: Tensor, factor: Tensor, zero: Tensor, top: Tensor) -> None:
    """Round one block: all of (b, rows, r), but for the block's factor (b, rows, rows)."""
    if rows.is_cuda:
        from deltadock.kernels.error_compensation import triton

        triton.round_block(rows, codes, factor, zero, top)
        return
    diagonal = factor.diagonal(dim1=1, dim2=2)[:, :, None]
    # What does not depend on the order is done for the whole block: a coordinate takes six passes.
    weights = (factor / diagonal)[..., None]
    rounded = torch.empty_like(rows)
    rows.add_(zero)
    parts = zip(rows.unbind(1), rounded.unbind(1), top.unbind(1), strict=True)
    for j, (row, code, highest) in enumerate(parts):
        torch.add(row, 0.5, out=code).floor_().clamp_min_(0)
        torch.minimum(code, highest, out=code)
        row.sub_(code)
        rows[:, j + 1 :].addcmul_(weights[:, j, j + 1 :], row[:, None], value=-1)
    codes.copy_(rounded)
    rows.div_(diagonal)


def prune_block(rows: Tensor, codes: Tensor, kept: Tensor, factor: Tensor, top: Tensor) -> None:
    """Prune and round one block (b, rows, r), by its factor (b, rows, rows) and top (b, r)."""
    if rows.is_cuda:
        from deltadock.kernels.error_compensation import triton

        triton.prune_block(rows, codes, kept, factor, top)
        return
    costs = factor.diagonal(dim1=1, dim2=2).reciprocal()[:, :, None]
    for start in range(0, rows.shape[1], GROUP):
        of = slice(start, start + GROUP)
        four, chosen = rows[:, of], kept[:, of]
        best = (four * costs[:, of]).abs_().topk(min(KEPT, four.shape[1]), dim=1).indices
        chosen.zero_().scatter_(1, best, value=True)
        # The grid of a pruned entry is zero alone.
        highest = chosen * top[:, None]
        round_block(four, codes[:, of], factor[:, of, of], highest / 2, highest)
        apply_errors(rows[:, start:], factor[:, start:, start:], GROUP, rows.shape[1] - start)


def _check(values: Tensor, factor: Tensor, zero: Tensor, top: Tensor) -> None:
    b, n, _ = values.shape
    if factor.shape != (b, n, n):
        raise ValueError("factor must be (b, n, n) for values of (b, n, r).")
    for one in (zero, top):
        shape = (1,) * (3 - one.ndim) + tuple(one.shape)
        if any(size not in (1, whole) for size, whole in zip(shape, values.shape, strict=True)):
            raise ValueError("zero and top must broadcast to the shape of values.")
    if any(tensor.dtype != torch.float32 for tensor in (values, factor, zero, top)):
        raise ValueError("values, factor, zero and top must be float32.")
    if not values.is_contiguous():
        raise ValueError("values must be contiguous.")
