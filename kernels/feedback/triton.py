"""A block of coordinates in one launch; each program rounds some vectors of all of them."""

from typing import Final

import triton
import triton.language as tl
from torch import Tensor

ROWS: Final = 64
"""Coordinates that a program keeps the errors of."""
COLUMNS: Final = 32
"""Vectors of a program."""


@triton.jit
def round_block_kernel(
    work_ptr, codes_ptr, factor_ptr, zero_ptr, top_ptr, rows, vectors,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Round `rows` coordinates in turn; an error stays in registers until all have seen it."""
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    inside = columns < vectors
    zero = tl.load(zero_ptr + columns, mask=inside, other=0.0)
    top = tl.load(top_ptr + columns, mask=inside, other=0.0)
    index = tl.arange(0, ROWS)
    errors = tl.zeros((ROWS, COLUMNS), tl.float32)
    for j in range(rows):
        weights = tl.load(factor_ptr + index * rows + j, mask=index < j, other=0.0)
        at = j * vectors + columns
        w = tl.load(work_ptr + at, mask=inside, other=0.0)
        w -= tl.sum(weights[:, None] * errors, axis=0)
        code = tl.minimum(tl.maximum(tl.floor(w + zero + 0.5), 0.0), top)
        error = (w - code + zero) / tl.load(factor_ptr + j * rows + j)
        errors = tl.where((index == j)[:, None], error[None, :], errors)
        tl.store(codes_ptr + at, code.to(tl.uint8), mask=inside)
        tl.store(work_ptr + at, error, mask=inside)


def round_block(rows: Tensor, codes: Tensor, factor: Tensor, zero: Tensor, top: Tensor) -> None:
    """Round at most `ROWS` coordinates: (b, r) in place, with the block's own factor (b, b)."""
    count, vectors = rows.shape
    assert count <= ROWS, "a block is as long as a program has room for errors"
    round_block_kernel[(triton.cdiv(vectors, COLUMNS),)](
        rows, codes, factor, zero, top, count, vectors,
        ROWS=ROWS, COLUMNS=COLUMNS, num_warps=4,
        enable_fp_fusion=True,  # what Triton does of its own accord changes in 3.10
    )  # fmt: skip
