"""Rounding with GPTQ error compensation: each coordinate's error is propagated to later ones.

The recursion of GPTQ (Frantar et al., 2022) for vectors with one grid each, in units of its step:
`code = clamp(floor(w + zero + 1/2), 0, top)` represents `code - zero`. With F the upper Cholesky
factor of the inverse Hessian, coordinate j has the error `e_j = (w_j - (code_j - zero)) / F_jj`,
and `F_jk e_j` is subtracted from every later coordinate k.
"""

from typing import Final

import torch
from torch import Tensor

BLOCK: Final = {"cpu": 32, "cuda": 64}
"""Coordinates per block, by device type; one matrix product per block applies earlier errors."""


def round_with_error_compensation(
    values: Tensor, factor: Tensor, zero: Tensor, top: Tensor
) -> Tensor:
    """Round r vectors of n coordinates; return the codes, (n, r) uint8.

    Vectors are independent. On a GPU a block of coordinates is one kernel launch.

    Args:
        values: (n, r) float32 contiguous, one vector per column, in steps of its grid;
            overwritten with the errors `e`.
        factor: (n, n) float32, upper triangular with a positive diagonal.
        zero: (r,) float32, zero point of each vector.
        top: (r,) float32, highest code of each vector, at most 255.

    Raises:
        ValueError: a shape, dtype or layout differs from these.
    """
    _check(values, factor, zero, top)
    codes = torch.empty(values.shape, dtype=torch.uint8, device=values.device)
    step = BLOCK[values.device.type]
    for start in range(0, len(values), step):
        stop = min(start + step, len(values))
        rows = values[start:stop]
        if start:
            rows.addmm_(factor[:start, start:stop].t(), values[:start], alpha=-1)
        diagonal_block = factor[start:stop, start:stop]
        if values.is_cuda:
            from deltadock.kernels.error_compensation import triton

            triton.round_block(rows, codes[start:stop], diagonal_block.contiguous(), zero, top)
        else:
            _round_block(rows, codes[start:stop], diagonal_block, zero, top)
    return codes


def _round_block(rows: Tensor, codes: Tensor, factor: Tensor, zero: Tensor, top: Tensor) -> None:
    diagonal = factor.diagonal().tolist()
    for j, row in enumerate(rows):
        code = torch.add(row, zero).add_(0.5).floor_().clamp_min_(0)
        torch.minimum(code, top, out=code)
        codes[j].copy_(code)
        row.sub_(code).add_(zero).div_(diagonal[j])
        rows[j + 1 :].addr_(factor[j, j + 1 :], row, alpha=-1)


def _check(values: Tensor, factor: Tensor, zero: Tensor, top: Tensor) -> None:
    n, r = values.shape
    if factor.shape != (n, n) or zero.shape != (r,) or top.shape != (r,):
        raise ValueError("factor must be (n, n), zero and top (r,), for values of (n, r).")
    if any(tensor.dtype != torch.float32 for tensor in (values, factor, zero, top)):
        raise ValueError("values, factor, zero and top must be float32.")
    if not values.is_contiguous():
        raise ValueError("values must be contiguous.")
