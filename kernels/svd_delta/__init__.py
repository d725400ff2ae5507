"""`y += U_hat (s * (V_hat x))` for a batch whose rows belong to different deltas.

table = DeltaTable(slots, h_in, [h_out], max_rank=..., device=device)  # one a linear, or q, k, v
table.install(3, pack_delta(...).to(device))
chunks = Chunks(max_rows, slots, tables, device=device)                # one a model
chunks.assign(row_slots)                                               # once a step
svd_delta(y, x, table, chunks, cache)                                  # at every linear
"""

import torch
from torch import Tensor

from deltadock.kernels.cache import TensorCache
from deltadock.kernels.svd_delta.bags import add_deltas
from deltadock.kernels.svd_delta.chunks import Chunks
from deltadock.kernels.svd_delta.factors import add_products, add_rows
from deltadock.kernels.svd_delta.layout import Group, PackedDelta, empty_delta, pack_delta
from deltadock.kernels.svd_delta.table import DeltaTable

__all__ = [
    "Chunks",
    "DeltaTable",
    "Group",
    "PackedDelta",
    "TensorCache",
    "add_rows",
    "empty_delta",
    "pack_delta",
    "svd_delta",
]


def svd_delta(y: Tensor, x: Tensor, table: DeltaTable, chunks: Chunks, cache: TensorCache) -> None:
    """Add each row's delta to `y` in place; rows of slot 0 and of empty slots stay as they are.

    On a GPU it launches three kernels and neither allocates nor waits. There a row's result does
    not depend on which other rows are in the batch, to the last bit.

    Args:
        y: (rows, h_out), the base's outputs, the linears' side by side; float16 or bfloat16 on a
            GPU; each row contiguous.
        x: (rows, h_in), of the same type; each row contiguous.
        table: the linears' deltas.
        chunks: which rows belong to which slot.
        cache: unpacked factors; a GPU uses them for slots past `Chunks`' `dense_rows` only, whose
            rows then depend on how many rows of their own slot there are.

    Raises:
        ValueError: shapes, types or strides are not these, or the table and the chunks were made
            for different slots or ranks.
    """
    _check(y, x, table, chunks)
    if x.is_cuda:
        from deltadock.kernels.svd_delta import triton

        triton.svd_delta(y, x, table, chunks)
        if chunks.dense:
            add_products(y, x, table, chunks.dense, cache)
    else:
        add_deltas(y, x, table, chunks, cache)


def _check(y: Tensor, x: Tensor, table: DeltaTable, chunks: Chunks) -> None:
    """A kernel trusts its arguments, and what it misread would be another tenant's memory."""
    rows = chunks.row_count
    if x.shape != (rows, table.h_in) or y.shape != (rows, table.h_out):
        raise ValueError("x and y need the rows of this step, and the linear's inputs and outputs.")
    if x.dtype != y.dtype or x.stride(1) != 1 or y.stride(1) != 1:
        raise ValueError("x and y need one type and contiguous rows.")
    if x.is_cuda and x.dtype not in {torch.float16, torch.bfloat16}:
        raise ValueError("The kernel takes float16 or bfloat16.")
    too_small = chunks.max_rank < table.max_rank or chunks.width < table.linears * table.padded
    if chunks.slot_count > table.slot_count or too_small:
        raise ValueError("The chunks have more slots than the table, or were not made for it.")
