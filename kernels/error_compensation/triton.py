"""The GPU kernel: one launch per block of coordinates, each program rounding a tile of vectors."""

from typing import Final

import triton
import triton.language as tl
from torch import Tensor

ROWS: Final = 64
"""Coordinates per block; a program keeps the errors of all of them in registers."""
COLUMNS: Final = 32
"""Vectors per program."""
INTEGERS: Final = (
    "rows", "vectors", "values_b", "values_row", "codes_b", "codes_row", "factor_b", "factor_row",
    "factor_col", "zero_b", "zero_row", "zero_col", "top_b", "top_row", "top_col",
)  # fmt: skip


# Strides are not compiled in: one kernel for all shapes.
@triton.jit(do_not_specialize=INTEGERS)
def round_block_kernel(
    values_ptr, codes_ptr, factor_ptr, zero_ptr, top_ptr, rows, vectors,
    values_b, values_row, codes_b, codes_row, factor_b, factor_row, factor_col,
    zero_b, zero_row, zero_col, top_b, top_row, top_col,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Round `rows` coordinates sequentially; errors stay in registers for the later coordinates."""
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    mask = columns < vectors
    problem = tl.program_id(1).to(tl.int64)
    values_ptr += problem * values_b
    codes_ptr += problem * codes_b
    factor_ptr += problem * factor_b
    zero_ptr += problem * zero_b + columns * zero_col
    top_ptr += problem * top_b + columns * top_col
    index = tl.arange(0, ROWS)
    errors = tl.zeros((ROWS, COLUMNS), tl.float32)
    for j in range(rows):
        column = factor_ptr + j * factor_col
        weights = tl.load(column + index * factor_row, mask=index < j, other=0.0)
        w = tl.load(values_ptr + j * values_row + columns, mask=mask, other=0.0)
        zero = tl.load(zero_ptr + j * zero_row, mask=mask, other=0.0)
        top = tl.load(top_ptr + j * top_row, mask=mask, other=0.0)
        w -= tl.sum(weights[:, None] * errors, axis=0)
        code = tl.minimum(tl.maximum(tl.floor(w + zero + 0.5), 0.0), top)
        error = (w - code + zero) / tl.load(column + j * factor_row)
        errors = tl.where((index == j)[:, None], error[None, :], errors)
        tl.store(codes_ptr + j * codes_row + columns, code.to(tl.uint8), mask=mask)
        tl.store(values_ptr + j * values_row + columns, error, mask=mask)


def round_block(rows: Tensor, codes: Tensor, factor: Tensor, zero: Tensor, top: Tensor) -> None:
    """Round at most `ROWS` coordinates of (b, rows, r) in place; a vector's entries are adjacent
    to its neighbours'. Other strides are free."""
    problems, count, vectors = rows.shape
    assert count <= ROWS, "a program has registers for the errors of one block"
    assert rows.stride(2) == codes.stride(2) == 1, "values and codes are contiguous"
    round_block_kernel[(triton.cdiv(vectors, COLUMNS), problems)](
        rows, codes, factor, zero, top, count, vectors,
        *rows.stride()[:2], *codes.stride()[:2], *factor.stride(), *zero.stride(), *top.stride(),
        ROWS=ROWS, COLUMNS=COLUMNS, num_warps=4,
        enable_fp_fusion=True,  # pinned: Triton 3.10 changes the default
    )  # fmt: skip
