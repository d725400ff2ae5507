"""The GPU kernel: one launch per block of coordinates, each program rounding a tile of vectors."""

from typing import Final

import triton
import triton.language as tl
from torch import Tensor

ROWS: Final = 64
"""Coordinates per block; a program keeps the errors of all of them in registers."""
COLUMNS: Final = 32
"""Vectors per program."""


@triton.jit
def round_block_kernel(
    values_ptr, codes_ptr, factor_ptr, zero_ptr, top_ptr, rows, vectors,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Round `rows` coordinates sequentially; errors stay in registers for the later coordinates."""
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    mask = columns < vectors
    zero = tl.load(zero_ptr + columns, mask=mask, other=0.0)
    top = tl.load(top_ptr + columns, mask=mask, other=0.0)
    index = tl.arange(0, ROWS)
    errors = tl.zeros((ROWS, COLUMNS), tl.float32)
    for j in range(rows):
        weights = tl.load(factor_ptr + index * rows + j, mask=index < j, other=0.0)
        offsets = j * vectors + columns
        w = tl.load(values_ptr + offsets, mask=mask, other=0.0)
        w -= tl.sum(weights[:, None] * errors, axis=0)
        code = tl.minimum(tl.maximum(tl.floor(w + zero + 0.5), 0.0), top)
        error = (w - code + zero) / tl.load(factor_ptr + j * rows + j)
        errors = tl.where((index == j)[:, None], error[None, :], errors)
        tl.store(codes_ptr + offsets, code.to(tl.uint8), mask=mask)
        tl.store(values_ptr + offsets, error, mask=mask)


def round_block(rows: Tensor, codes: Tensor, factor: Tensor, zero: Tensor, top: Tensor) -> None:
    """Round at most `ROWS` coordinates (b, r) in place; `factor` is a diagonal block (b, b)."""
    count, vectors = rows.shape
    assert count <= ROWS, "a program has registers for the errors of one block"
    round_block_kernel[(triton.cdiv(vectors, COLUMNS),)](
        rows, codes, factor, zero, top, count, vectors,
        ROWS=ROWS, COLUMNS=COLUMNS, num_warps=4,
        enable_fp_fusion=True,  # pinned: Triton 3.10 changes the default
    )  # fmt: skip
