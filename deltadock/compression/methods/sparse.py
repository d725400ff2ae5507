"""DeltaZip and GPT-Zip: pruned and quantized deltas, compressed without loss by zlib.

Both run SparseGPT (Frantar and Alistarh, 2023) on the delta: pruning an entry costs its square over
the squared diagonal of the inverse Hessian's factor; pruned or quantized, its error is compensated
in the following columns.

DeltaZip: 2 of every 4 columns kept, in 2- or 4-bit codes. Source: Yao et al., "DeltaZip: Efficient
Serving of Multiple Full-Model-Tuned LLMs" (arXiv 2312.05215). Here every row and 128 columns have
a scale of least square error, and layers are calibrated on the fine-tune's own activations.

GPT-Zip: 2-bit codes, 95 % of the weights pruned. Source: Isik et al., "GPT-Zip: Deep Compression
of Finetuned Large Language Models" (ICML 2023 workshop), which publishes no code: implemented here
with the fraction kept decided for every 128 columns, and one scale of least square error per row,
as scales for smaller groups would take more bytes than the codes.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from deltadock.artifacts.encodings import Encoded, deflate, encode_sparse, encode_sparse24
from deltadock.compression.methods.base import MatrixResult, MatrixTask, matrix_result
from deltadock.compression.numerics.gptq import (
    QuantizationGrid,
    columns_first,
    inverse_factors,
    nearest,
    search_grid,
    sweep,
)

BLOCK: Final = 128
"""Columns that a mask or a scale may look ahead to."""

KEPT_OF_FOUR: Final = 2
DELTA_ZIP_WIDTHS: Final = (2, 4)

GPT_ZIP_BITS: Final = 2
GPT_ZIP_KEPT: Final = 0.05

ChooseMask = Callable[[int, Tensor], Tensor | None]
"""Called with a column's index and the costs from it to the end of its block, (columns, h_out);
returns the mask of as many columns as are decided now, or None if they were decided before."""

Encoder = Callable[..., Encoded]


@dataclass(frozen=True, slots=True)
class SparseCodes:
    """Codes and mask (h_out, h_in) of the entries kept, and scales (h_out, groups)."""

    codes: Tensor
    mask: Tensor
    scale: Tensor


def delta_zip(task: MatrixTask) -> MatrixResult:
    """Compress one linear layer's delta; half of the weights have codes, so 1 bit buys 2."""
    bits = max(width for width in DELTA_ZIP_WIDTHS if width * KEPT_OF_FOUR / 4 <= task.bits)

    def choose(j: int, cost: Tensor) -> Tensor | None:
        if j % 4:
            return None
        cost = cost[:4]
        best = cost.topk(min(KEPT_OF_FOUR, len(cost)), dim=0).indices
        return torch.zeros_like(cost, dtype=torch.bool).scatter_(0, best, value=True)

    def scales(values: Tensor, cost: Tensor) -> Tensor:
        # The final mask is chosen four by four, after error compensation, and hardly differs.
        padding = (0, -values.shape[1] % 4)
        values, cost = (F.pad(x, padding).reshape(-1, 4) for x in (values, cost))
        kept = largest(values, cost, KEPT_OF_FOUR)
        return row_scales(kept.reshape(len(task.delta), -1), bits)

    sparse, damping = prune_and_quantize(task.delta, task.moment, bits, BLOCK, choose, scales)
    return _result(task, sparse, bits, BLOCK, damping, encode_sparse24)


def gpt_zip(task: MatrixTask) -> MatrixResult:
    """Compress one linear layer's delta; there is one size, whatever the budget."""
    h_in = task.delta.shape[1]

    def choose(j: int, cost: Tensor) -> Tensor | None:
        if j % BLOCK:
            return None
        best = cost.flatten().topk(max(1, int(GPT_ZIP_KEPT * cost.numel()))).indices
        mask = torch.zeros(cost.numel(), dtype=torch.bool, device=cost.device)
        mask[best] = True
        return mask.reshape(cost.shape) & (cost > 0)

    def scales(values: Tensor, cost: Tensor) -> Tensor:
        kept = largest(values, cost, max(1, round(GPT_ZIP_KEPT * h_in)))
        return row_scales(kept, GPT_ZIP_BITS)

    sparse, damping = prune_and_quantize(
        task.delta, task.moment, GPT_ZIP_BITS, h_in, choose, scales
    )
    return _result(task, sparse, GPT_ZIP_BITS, h_in, damping, encode_sparse)


def row_scales(values: Tensor, bits: int) -> Tensor:
    """Steps (h_out,) of least square error of symmetric grids for each row of (h_out, n).

    A row of zeros gets 0. Steps are rounded to the mantissa of float16, in which they are stored.
    """
    levels = torch.full((len(values),), 2.0**bits - 1, device=values.device)
    scale = search_grid(values, levels, symmetric=True).scale
    digits, exponent = torch.frexp(scale)
    rounded = torch.ldexp(digits.half().float(), exponent)
    return torch.where(values.any(dim=1), rounded, 0.0)


def largest(values: Tensor, cost: Tensor, count: int) -> Tensor:
    """Of each row of (h_out, n), the `count` values of largest cost."""
    return values.gather(1, cost.topk(count, dim=1).indices)


def prune_and_quantize(
    delta: Tensor,
    moment: Tensor,
    bits: int,
    group: int,
    choose: ChooseMask,
    scales: Callable[[Tensor, Tensor], Tensor],
) -> tuple[SparseCodes, float]:
    """Prune and quantize column by column.

    Args:
        delta: (h_out, h_in).
        moment: (h_in, h_in).
        bits: width of the codes, on a symmetric grid.
        group: columns that share a scale in a row: `BLOCK`, or all of them.
        choose: decides which entries are kept.
        scales: called with a group's values and costs (h_out, group) at its first column; returns
            the rows' steps (h_out,).

    Returns:
        The entries kept, and the damping used.
    """
    (factor,), (damping,) = inverse_factors(moment[None])
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
        grid = QuantizationGrid(step.clamp_min(torch.finfo(torch.float32).tiny), levels / 2, levels)
        value = nearest(columns[0], grid, codes[j])
        return value.mul_(mask[j] & (step > 0))

    sweep(work, factor, quantize, BLOCK)
    return SparseCodes(codes.t(), mask.t(), scale.t()), damping


def _result(
    task: MatrixTask, sparse: SparseCodes, bits: int, group: int, damping: float, encode: Encoder
) -> MatrixResult:
    """Encode and deflate."""
    arrays = (
        np.ascontiguousarray(data.cpu().numpy())
        for data in (sparse.codes, sparse.mask, sparse.scale)
    )
    encoded = deflate(encode(*arrays, bits, group, task.dtype))
    widths = {str(bits): len(sparse.codes)}
    return matrix_result(encoded, device=task.delta.device, widths=widths, damping=damping)
