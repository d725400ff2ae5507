"""DeltaZip and GPT-Zip: pruned and quantized deltas, compressed without loss by zlib.

Both run SparseGPT (Frantar and Alistarh, 2023) on the delta: pruning an entry costs its square over
the squared diagonal of the inverse Hessian's factor; pruned or quantized, its error is compensated
in the following columns. A block of columns is rounded at once, once its mask is known.

DeltaZip: 2 of every 4 columns kept, in 2- or 4-bit codes. Source: Yao et al., "DeltaZip: Efficient
Serving of Multiple Full-Model-Tuned LLMs" (arXiv 2312.05215). Here every row and 128 columns have
a scale of least square error, and layers are calibrated on the fine-tune's own activations.

GPT-Zip: 2-bit codes, 95 % of the weights pruned. Source: Isik et al., "GPT-Zip: Deep Compression
of Finetuned Large Language Models" (ICML 2023 workshop), which publishes no code: implemented here
with the fraction kept decided for every 128 columns, and one scale of least square error per row,
as scales for smaller groups would take more bytes than the codes.
"""

from collections.abc import Callable, Sequence
from typing import Final

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from deltadock.artifacts.encodings import Encoded, deflate, encode_sparse, encode_sparse24
from deltadock.compression.methods.base import MatrixResult, MatrixTask, matrix_result, stacked
from deltadock.compression.numerics.gptq import columns_first, inverse_factors, search_grid
from deltadock.kernels.error_compensation import (
    GROUP,
    KEPT,
    apply_errors,
    prune_with_error_compensation,
    round_with_error_compensation,
)

BLOCK: Final = 128
"""Columns that a mask or a scale may look ahead to."""

DELTA_ZIP_WIDTHS: Final = (2, 4)

GPT_ZIP_BITS: Final = 2
GPT_ZIP_KEPT: Final = 0.05

RoundBlock = Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
"""From a block of columns (b, columns, h_out) in steps, its factor (b, columns, columns), the steps
and the highest codes (b, h_out): the codes, and the mask of the entries kept. The block is
overwritten with its errors."""
ChooseScales = Callable[[Tensor, Tensor], Tensor]
"""From a group's values and costs, (b, h_out, columns), the steps of its rows, (b, h_out)."""

Encoder = Callable[..., Encoded]


def delta_zip(tasks: Sequence[MatrixTask]) -> list[MatrixResult]:
    """Compress linear layers' deltas; half of the weights have codes, so 1 bit buys 2."""
    budget = tasks[0].bits
    bits = max(width for width in DELTA_ZIP_WIDTHS if width * KEPT / GROUP <= budget)

    def round_block(
        work: Tensor, factor: Tensor, _steps: Tensor, top: Tensor
    ) -> tuple[Tensor, Tensor]:
        return prune_with_error_compensation(work, factor, top)

    def scales(values: Tensor, cost: Tensor) -> Tensor:
        # The final mask is chosen after error compensation, and hardly differs.
        padding = (0, -values.shape[2] % GROUP)
        fours, costs = (F.pad(x, padding).unflatten(2, (-1, GROUP)) for x in (values, cost))
        return row_scales(largest(fours, costs, KEPT).flatten(2), bits)

    return _compress(tasks, bits, BLOCK, round_block, scales, encode_sparse24)


def gpt_zip(tasks: Sequence[MatrixTask]) -> list[MatrixResult]:
    """Compress linear layers' deltas; there is one size, whatever the budget."""
    h_in = tasks[0].delta.shape[1]

    def round_block(
        work: Tensor, factor: Tensor, steps: Tensor, top: Tensor
    ) -> tuple[Tensor, Tensor]:
        diagonal = factor.diagonal(dim1=1, dim2=2)[:, :, None]
        cost = (work * steps[:, None] / diagonal).square_()
        flat = cost.flatten(1)
        best = flat.topk(max(1, int(GPT_ZIP_KEPT * flat.shape[1])), dim=1).indices
        mask = torch.zeros_like(flat, dtype=torch.bool).scatter_(1, best, value=True)
        kept = mask.view_as(cost) & (cost > 0)
        # The grid of a pruned entry is zero alone.
        highest = kept * top[:, None]
        return round_with_error_compensation(work, factor, highest / 2, highest), kept

    def scales(values: Tensor, cost: Tensor) -> Tensor:
        kept = largest(values, cost, max(1, round(GPT_ZIP_KEPT * h_in)))
        return row_scales(kept, GPT_ZIP_BITS)

    return _compress(tasks, GPT_ZIP_BITS, h_in, round_block, scales, encode_sparse)


def row_scales(values: Tensor, bits: int) -> Tensor:
    """Steps (..., h_out) of least square error of symmetric grids for each row (..., h_out, n).

    A row of zeros gets 0. Steps are rounded to the mantissa of float16, in which they are stored.
    """
    levels = torch.full(values.shape[:-1], 2.0**bits - 1, device=values.device)
    scale = search_grid(values, levels, symmetric=True).scale
    digits, exponent = torch.frexp(scale)
    rounded = torch.ldexp(digits.half().float(), exponent)
    return torch.where(values.any(dim=-1), rounded, 0.0)


def largest(values: Tensor, cost: Tensor, count: int) -> Tensor:
    """Of each row of (..., n), the `count` values of largest cost."""
    return values.gather(-1, cost.topk(count, dim=-1).indices)


def _compress(
    tasks: Sequence[MatrixTask],
    bits: int,
    group: int,
    round_block: RoundBlock,
    scales: ChooseScales,
    encode: Encoder,
) -> list[MatrixResult]:
    """Prune, quantize, encode and deflate.

    Args:
        tasks: b matrices of equal shapes.
        bits: width of the codes, on a symmetric grid.
        group: columns that share a scale in a row: `BLOCK`, or all of them.
        round_block: prunes and rounds a block of columns.
        scales: chooses a group's scales at its first column.
        encode: of codes and mask (h_out, h_in) and scales (h_out, groups).
    """
    factor, damping = inverse_factors(stacked([task.moment for task in tasks]))
    work = columns_first(stacked([task.delta for task in tasks]))
    weight = factor.diagonal(dim1=1, dim2=2)[:, :, None].square().reciprocal()
    codes = torch.empty(work.shape, dtype=torch.uint8, device=work.device)
    mask = torch.empty(work.shape, dtype=torch.bool, device=work.device)
    steps = []
    for start in range(0, work.shape[1], BLOCK):
        piece = slice(start, start + BLOCK)
        apply_errors(work, factor, start, min(start + BLOCK, work.shape[1]))
        if start % group == 0:
            # A group as wide as the matrix reaches beyond its first block.
            ahead = slice(start, start + group)
            cost = work[:, ahead].square() * weight[:, ahead]
            steps.append(scales(work[:, ahead].mT, cost.mT))
        used = steps[-1] > 0
        step = torch.where(used, steps[-1], 1.0)
        errors = work[:, piece] / step[:, None]
        codes[:, piece], mask[:, piece] = round_block(
            errors, factor[:, piece, piece], step, used * (2.0**bits - 1)
        )
        work[:, piece] = errors * step[:, None]
    found = (data.cpu().numpy() for data in (codes.mT, mask.mT, torch.stack(steps, 2)))
    results = []
    for task, damped, *arrays in zip(tasks, damping, *found, strict=True):
        encoded = deflate(encode(*map(np.ascontiguousarray, arrays), bits, group, task.dtype))
        widths = {str(bits): len(task.delta)}
        results.append(
            matrix_result(encoded, device=task.delta.device, widths=widths, damping=damped)
        )
    return results
