"""`y += U_hat (s * (V_hat x))` for a batch whose rows belong to different deltas.

table = DeltaTable(slots, (h_out, h_in), max_rank=..., device=device)   # one a linear
table.install(3, pack_delta(...).to(device))
chunks = Chunks(max_rows, slots, max_rank=..., device=device)           # one a model
chunks.assign(row_slots)                                                # once a step
svd_delta(y, x, table, chunks, cache)                                   # at every linear
"""

import torch
from torch import Tensor

from kernels.svd_delta import cpu
from kernels.svd_delta.chunks import Chunks
from kernels.svd_delta.cpu import FactorCache
from kernels.svd_delta.layout import DeltaTable, Group, PackedDelta, pack_delta

__all__ = [
    "Chunks",
    "DeltaTable",
    "FactorCache",
    "Group",
    "PackedDelta",
    "pack_delta",
    "svd_delta",
]


def svd_delta(y: Tensor, x: Tensor, table: DeltaTable, chunks: Chunks, cache: FactorCache) -> None:
    """Add each row's delta to `y` in place; rows of slot 0 and of empty slots stay as they are.

    On a GPU it launches two kernels and neither allocates nor waits. There a row's result does
    not depend on which other rows are in the batch, to the last bit.

    Args:
        y: (rows, h_out), the base's output; float16 or bfloat16 on a GPU; each row contiguous.
        x: (rows, h_in), of the same type; each row contiguous.
        table: the linear's deltas.
        chunks: which rows belong to which slot.
        cache: unpacked factors; only the CPU uses them.

    Raises:
        ValueError: shapes, types or strides are not these, or the table and the chunks were made
            for different slots or ranks.
    """
    _check(y, x, table, chunks)
    if x.is_cuda:
        from kernels.svd_delta import triton

        triton.svd_delta(y, x, table, chunks)
    else:
        cpu.svd_delta(y, x, table, chunks, cache)


def _check(y: Tensor, x: Tensor, table: DeltaTable, chunks: Chunks) -> None:
    """A kernel trusts its arguments, and what it misread would be another tenant's memory."""
    rows = chunks.row_count
    if x.shape != (rows, table.h_in) or y.shape != (rows, table.h_out):
        raise ValueError("x and y need the rows of this step, and the linear's inputs and outputs.")
    if x.dtype != y.dtype or x.stride(1) != 1 or y.stride(1) != 1:
        raise ValueError("x and y need one type and contiguous rows.")
    if x.is_cuda and x.dtype not in {torch.float16, torch.bfloat16}:
        raise ValueError("The kernel takes float16 or bfloat16.")
    if chunks.slot_count > len(table.sizes) or chunks.max_rank < table.max_rank:
        raise ValueError("The chunks have more slots, or fewer ranks, than the table.")
