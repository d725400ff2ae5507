"""The GPU kernels: one launch per block of coordinates, each program rounding a tile of vectors."""

from typing import Final

import triton
import triton.language as tl
from torch import Tensor

from deltadock.kernels.error_compensation import GROUP, KEPT

ROWS: Final = 64
"""Coordinates per block; a program keeps the errors of all of them in registers."""
COLUMNS: Final = 32
"""Vectors per program."""
INTEGERS: Final = (
    "rows", "vectors", "values_b", "values_row", "codes_b", "codes_row", "factor_b", "factor_row",
    "factor_col", "zero_b", "zero_row", "zero_col", "top_b", "top_row", "top_col",
)  # fmt: skip
PRUNED_INTEGERS: Final = (*INTEGERS[:9], "top_b")


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
        w = corrected(values_ptr + j * values_row + columns, mask, column, factor_row, j, errors)
        zero = tl.load(zero_ptr + j * zero_row, mask=mask, other=0.0)
        top = tl.load(top_ptr + j * top_row, mask=mask, other=0.0)
        code = tl.minimum(tl.maximum(tl.floor(w + zero + 0.5), 0.0), top)
        error = (w - code + zero) / tl.load(column + j * factor_row)
        errors = tl.where((index == j)[:, None], error[None, :], errors)
        tl.store(codes_ptr + j * codes_row + columns, code.to(tl.uint8), mask=mask)
        tl.store(values_ptr + j * values_row + columns, error, mask=mask)


@triton.jit
def corrected(values_ptrs, mask, column, factor_row, before, errors):
    """A coordinate's values less the `errors` of those `before` it, weighed by its factors."""
    index = tl.arange(0, errors.shape[0])
    weights = tl.load(column + index * factor_row, mask=index < before, other=0.0)
    return tl.load(values_ptrs, mask=mask, other=0.0) - tl.sum(weights[:, None] * errors, axis=0)


@triton.jit(do_not_specialize=PRUNED_INTEGERS)
def prune_block_kernel(
    values_ptr, codes_ptr, kept_ptr, factor_ptr, top_ptr, rows, vectors,
    values_b, values_row, codes_b, codes_row, factor_b, factor_row, factor_col, top_b,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, GROUP: tl.constexpr, KEPT: tl.constexpr,
):  # fmt: skip
    """As `round_block_kernel`, but for the coordinates of each group that are not kept; `kept` has
    the strides of `codes`."""
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    mask = columns < vectors
    problem = tl.program_id(1).to(tl.int64)
    values_ptr += problem * values_b
    codes_ptr += problem * codes_b
    kept_ptr += problem * codes_b
    factor_ptr += problem * factor_b
    highest = tl.load(top_ptr + problem * top_b + columns, mask=mask, other=0.0)
    index = tl.arange(0, ROWS)
    place = tl.arange(0, GROUP)
    errors = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, rows, GROUP):
        # Costs of the group's coordinates; those past the end are never kept.
        costs = tl.full((GROUP, COLUMNS), -1.0, tl.float32)
        for j in range(start, tl.minimum(start + GROUP, rows)):
            column = factor_ptr + j * factor_col
            w = corrected(
                values_ptr + j * values_row + columns, mask, column, factor_row, start, errors
            )
            cost = tl.abs(w / tl.load(column + j * factor_row))
            costs = tl.where((place == j - start)[:, None], cost[None, :], costs)
        for j in range(start, tl.minimum(start + GROUP, rows)):
            column = factor_ptr + j * factor_col
            own = (place == j - start)[:, None]
            cost = tl.sum(tl.where(own, costs, 0.0), axis=0)[None, :]
            ahead = (costs > cost) | ((costs == cost) & (place < j - start)[:, None])
            kept = tl.sum(ahead.to(tl.int32), axis=0) < KEPT
            w = corrected(
                values_ptr + j * values_row + columns, mask, column, factor_row, j, errors
            )
            top = tl.where(kept, highest, 0.0)
            code = tl.minimum(tl.maximum(tl.floor(w + top / 2 + 0.5), 0.0), top)
            error = (w - code + top / 2) / tl.load(column + j * factor_row)
            errors = tl.where((index == j)[:, None], error[None, :], errors)
            tl.store(codes_ptr + j * codes_row + columns, code.to(tl.uint8), mask=mask)
            tl.store(kept_ptr + j * codes_row + columns, kept, mask=mask)
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


def prune_block(rows: Tensor, codes: Tensor, kept: Tensor, factor: Tensor, top: Tensor) -> None:
    """Prune and round at most `ROWS` coordinates of (b, rows, r) in place, as `round_block`."""
    problems, count, vectors = rows.shape
    assert count <= ROWS, "a program has registers for the errors of one block"
    assert rows.stride(2) == codes.stride(2) == top.stride(1) == 1, "vectors are adjacent"
    assert codes.stride() == kept.stride(), "codes and mask share their strides"
    prune_block_kernel[(triton.cdiv(vectors, COLUMNS), problems)](
        rows, codes, kept, factor, top, count, vectors,
        *rows.stride()[:2], *codes.stride()[:2], *factor.stride(), top.stride(0),
        ROWS=ROWS, COLUMNS=COLUMNS, GROUP=GROUP, KEPT=KEPT, num_warps=4, enable_fp_fusion=True,
    )  # fmt: skip
