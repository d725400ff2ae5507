"""Rounding with error feedback: each coordinate's error is passed on to those still to come.

The recursion of GPTQ (Frantar et al., 2022) on vectors with a grid each, in units of its step:
`code = clamp(floor(w + zero + 1/2), 0, top)` stands for `code - zero`. With F the upper Cholesky
factor of the inverse metric, coordinate j's error is `e_j = (w_j - (code_j - zero)) / F_jj`, and
every later coordinate k loses `F_jk e_j`.
"""

from typing import Final

import torch
from torch import Tensor

BLOCK: Final = {"cpu": 32, "cuda": 64}
"""Coordinates rounded between two products that bring the corrections of all earlier ones."""


def round_with_feedback(work: Tensor, factor: Tensor, zero: Tensor, top: Tensor) -> Tensor:
    """Codes of all vectors, (n, r) uint8.

    On a GPU a block of coordinates is one kernel launch. Vectors do not interact.

    Args:
        work: (n, r) float32 contiguous, one vector a column, in steps of its grid; overwritten
            with the errors `e`.
        factor: (n, n) float32, upper triangular with a positive diagonal.
        zero: (r,) float32, the code of 0 of each vector's grid.
        top: (r,) float32, its highest code, at most 255.

    Raises:
        ValueError: shapes, types or layout are not these.
    """
    _check(work, factor, zero, top)
    codes = torch.empty(work.shape, dtype=torch.uint8, device=work.device)
    step = BLOCK[work.device.type]
    for start in range(0, len(work), step):
        stop = min(start + step, len(work))
        rows = work[start:stop]
        if start:
            rows.addmm_(factor[:start, start:stop].t(), work[:start], alpha=-1)
        local = factor[start:stop, start:stop]
        if work.is_cuda:
            from deltadock.kernels.feedback import triton

            triton.round_block(rows, codes[start:stop], local.contiguous(), zero, top)
        else:
            _round_block(rows, codes[start:stop], local, zero, top)
    return codes


def _round_block(rows: Tensor, codes: Tensor, local: Tensor, zero: Tensor, top: Tensor) -> None:
    diagonal = local.diagonal().tolist()
    for j, row in enumerate(rows):
        code = torch.add(row, zero).add_(0.5).floor_().clamp_min_(0)
        torch.minimum(code, top, out=code)
        codes[j].copy_(code)
        row.sub_(code).add_(zero).div_(diagonal[j])
        rows[j + 1 :].addr_(local[j, j + 1 :], row, alpha=-1)


def _check(work: Tensor, factor: Tensor, zero: Tensor, top: Tensor) -> None:
    n, r = work.shape
    if factor.shape != (n, n) or zero.shape != (r,) or top.shape != (r,):
        raise ValueError("factor is (n, n), zero and top are (r,) where work is (n, r).")
    if any(tensor.dtype != torch.float32 for tensor in (work, factor, zero, top)):
        raise ValueError("All of work, factor, zero and top are float32.")
    if not work.is_contiguous():
        raise ValueError("work is contiguous.")
