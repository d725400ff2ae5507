"""The grouped delta on a GPU: three kernels a call, for any number of deltas.

The kernels read the packed words as the artifact holds them, a plane at a time, and multiply on
tensor cores: packed vectors are the tall operand, the eight rows of a chunk the other. Each warp
has its own share of a sum, and shares are added in a fixed order, without atomics: a row's result
does not depend on which other rows there are, to the last bit.
"""

from typing import Any, Final

import torch
import triton
from torch import Tensor

from deltadock.kernels.svd_delta.chunks import HEIGHT, SUM_COLUMNS, Chunks
from deltadock.kernels.svd_delta.layout import TILE_RANKS
from deltadock.kernels.svd_delta.table import DeltaTable
from deltadock.kernels.svd_delta.triton.expand import expand_kernel
from deltadock.kernels.svd_delta.triton.shrink import prepare_kernel, shrink_kernel

WARPS: Final = 8
"""Warps of a program of the shrink and of the expand kernel; each has a share of the sum."""
WORDS: Final = 8
"""Words of a vector that a warp of the shrink kernel pairs with the next as many."""
SHRINK_STAGES: Final = 2
EXPAND_STAGES: Final = 3
"""Tiles in flight in each kernel's loop."""


def svd_delta(
    y: Tensor, x: Tensor, table: DeltaTable, chunks: Chunks, *, emulate: bool | None = None
) -> None:
    """Add each row's delta to `y` in place; see `deltadock.kernels.svd_delta.svd_delta`.

    With `emulate` the kernels do without inline assembly and bfloat16 products, which Triton's
    interpreter needs; on a GPU it is slow, and tells whether a fault is in those.
    """
    if not chunks.count:
        return
    shared: dict[str, Any] = {
        "LINEARS": table.linears,
        "BLOCK_M": HEIGHT,
        # What Triton does of its own accord changes in 3.10.
        "enable_fp_fusion": True,
    }
    emulate = not x.is_cuda if emulate is None else emulate
    xs = chunks.scaled.view(x.dtype)
    sum_count = table.padded // SUM_COLUMNS
    prepare_kernel[(sum_count, table.linears, chunks.count)](
        xs, xs.stride(0), chunks.sums, chunks.sums.stride(0), x, x.stride(0),
        table.h_in, table.padded, chunks.rows, chunks.slots, table.addresses, table.entries,
        BLOCK_K=SUM_COLUMNS, EMULATE=emulate, num_warps=4, **shared,
    )  # fmt: skip
    shrink_kernel[(max(1, triton.cdiv(table.max_rank, TILE_RANKS)), chunks.count)](
        chunks.projected, chunks.max_rank, chunks.sums, chunks.sums.stride(0), sum_count,
        xs, xs.stride(0), table.h_in, table.padded, chunks.slots, table.addresses, table.entries,
        BLOCK_R=TILE_RANKS, SUMS=triton.next_power_of_2(sum_count), WARPS=WARPS,
        WORDS=WORDS, ALIGNED=table.h_in % 128 == 0,
        EMULATE=emulate, num_warps=WARPS, num_stages=SHRINK_STAGES, **shared,
    )  # fmt: skip
    expand_kernel[(len(table.outputs), chunks.count)](
        y, y.stride(0), chunks.projected, chunks.max_rank, chunks.rows, chunks.slots,
        table.addresses, table.entries, table.outputs,
        TERMS=2 if x.dtype == torch.float16 else 1,
        WARPS=WARPS, ALIGNED=all(h_out % 128 == 0 for h_out in table.h_outs), EMULATE=emulate,
        num_warps=WARPS, num_stages=EXPAND_STAGES, **shared,
    )  # fmt: skip
