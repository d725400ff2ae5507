"""SparseGPT's order, which DeltaZip and GPT-Zip share: prune and quantize column by column.

Source: Frantar and Alistarh, "SparseGPT" (2023). What an entry costs to prune is its square over
the squared diagonal of the inverse Hessian's factor; pruned or quantized, its error moves onto the
columns still to come.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import numpy as np
import torch
from torch import Tensor

from deltadock.artifacts.encodings import Encoded, decode_dense, deflate
from deltadock.compression.methods.base import MatrixResult, MatrixTask
from deltadock.compression.numerics.gptq import (
    Grid,
    columns_first,
    inverse_factor,
    nearest,
    search_grid,
    sweep,
)

BLOCK: Final = 128
"""Columns that a mask or a scale may look ahead to."""


@dataclass(frozen=True, slots=True)
class Sparse:
    """Codes, mask (h_out, h_in) of what is kept, and scales (h_out, groups)."""

    codes: Tensor
    mask: Tensor
    scale: Tensor


Choose = Callable[[int, Tensor], Tensor | None]
"""Told a column's number and the costs from it to the end of its block, (columns, h_out): the mask
of as many columns as are decided on now, or None where that was done before."""


def row_scales(values: Tensor, bits: int) -> Tensor:
    """Steps of least square error of symmetric grids for each row of (h_out, n).

    A row without a value gets 0. A step has no more digits than float16, in which it is stored.
    """
    levels = torch.full((len(values),), 2.0**bits - 1, device=values.device)
    scale = search_grid(values, levels, symmetric=True).scale
    digits, exponent = torch.frexp(scale)
    rounded = torch.ldexp(digits.half().float(), exponent)
    return torch.where(values.any(dim=1), rounded, 0.0)


def largest(values: Tensor, cost: Tensor, count: int) -> Tensor:
    """Of each row of (h_out, n), the `count` values that cost most."""
    return values.gather(1, cost.topk(count, dim=1).indices)


def prune_and_quantize(
    delta: Tensor,
    moment: Tensor,
    bits: int,
    group: int,
    choose: Choose,
    scales: Callable[[Tensor, Tensor], Tensor],
) -> tuple[Sparse, float]:
    """Run over the columns.

    Args:
        delta: (h_out, h_in).
        moment: (h_in, h_in).
        bits: width of the codes, on a symmetric grid.
        group: columns that share a scale in a row: `BLOCK`, or all of them.
        choose: decides what is kept.
        scales: told a group's values and costs (h_out, group) as its first column comes; gives
            the rows' steps (h_out,).

    Returns:
        What is kept, and the damping used.
    """
    factor, damping = inverse_factor(moment)
    work = columns_first(delta)
    h_in, h_out = work.shape
    weight = factor.diagonal().square().reciprocal()
    codes = torch.empty((h_in, h_out), dtype=torch.uint8, device=work.device)
    mask = torch.zeros((h_in, h_out), dtype=torch.bool, device=work.device)
    scale = torch.empty((-(-h_in // group), h_out), device=work.device)
    levels = torch.full((h_out,), 2.0**bits - 1, device=work.device)

    def quantize(j: int, columns: Tensor) -> Tensor:
        if j % group == 0:
            # A group as wide as the matrix reaches beyond its first block.
            ahead = work[j : j + group]
            cost = ahead.square() * weight[j : j + len(ahead), None]
            scale[j // group] = scales(ahead.t(), cost.t())
        cost = columns.square() * weight[j : j + len(columns), None]
        if (chosen := choose(j, cost)) is not None:
            mask[j : j + len(chosen)] = chosen
        step = scale[j // group]
        grid = Grid(step.clamp_min(torch.finfo(torch.float32).tiny), levels / 2, levels)
        value = nearest(columns[0], grid, codes[j])
        return value.mul_(mask[j] & (step > 0))

    sweep(work, factor, quantize, BLOCK)
    return Sparse(codes.t(), mask.t(), scale.t()), damping


def sparse_result(
    task: MatrixTask,
    sparse: Sparse,
    bits: int,
    group: int,
    damping: float,
    encode: Callable[..., Encoded],
) -> MatrixResult:
    """Encode, compress without loss, and say what was done."""
    encoded = deflate(
        encode(
            np.ascontiguousarray(sparse.codes.cpu().numpy()),
            np.ascontiguousarray(sparse.mask.cpu().numpy()),
            np.ascontiguousarray(sparse.scale.cpu().numpy()),
            bits,
            group,
            task.dtype,
        )
    )
    notes = {
        "rank": 0,
        "widths": {str(bits): len(sparse.codes)},
        "damping": damping,
        "gap": 0.0,
        "fallbacks": [],
    }
    return MatrixResult(encoded, torch.from_numpy(decode_dense(encoded)), notes)
