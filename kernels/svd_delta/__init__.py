"""`y += U_hat (s * (V_hat x))` for a batch whose rows belong to different deltas.

table = DeltaTable(slots, h_in, [h_out], max_rank=..., device=device)  # per linear, or q, k, v
table.install(3, pack_delta(...).to(device))
chunks = Chunks(max_rows, slots, tables, device=device)                # per model
chunks.assign(row_slots)                                               # per step
svd_delta(y, x, table, chunks, cache)                                  # per linear
"""

import torch
from torch import Tensor

from deltadock.kernels import dispatch
from deltadock.kernels.cache import TensorCache
from deltadock.kernels.svd_delta import cpu
from deltadock.kernels.svd_delta.chunks import Chunks
from deltadock.kernels.svd_delta.layout import (
    DeltaTable,
    Group,
    PackedDelta,
    empty_delta,
    pack_delta,
)
from deltadock.kernels.svd_delta.lookup import add_rows, discard_rows

__all__ = [
    "Chunks",
    "DeltaTable",
    "Group",
    "PackedDelta",
    "TensorCache",
    "add_rows",
    "clear_slot",
    "discard_rows",
    "empty_delta",
    "pack_delta",
    "svd_delta",
]


def svd_delta(y: Tensor, x: Tensor, table: DeltaTable, chunks: Chunks, cache: TensorCache) -> None:
    """Add each row's delta to `y` in place; rows of slot 0 and of empty slots are not modified.

    On a GPU this launches three kernels without allocation or synchronization, and a row's result
    is bitwise independent of the other rows in the batch. Slots past `Chunks`' `dense_rows` are
    the exception: they use matrix products, whose results depend on the slot's number of rows.

    Args:
        y: (rows, h_out), the base's outputs, the linears' concatenated; float16 or bfloat16 on a
            GPU; each row contiguous.
        x: (rows, h_in), of the same dtype; each row contiguous.
        table: the linears' deltas.
        chunks: the slots of this step's rows.
        cache: cache for unpacked factors, on the CPU.

    Raises:
        ValueError: a shape, dtype or stride differs from these, or the chunks were allocated for
            fewer ranks or inputs than the table has, or for more slots.
    """
    _check(y, x, table, chunks)
    if dispatch.on_gpu(x):
        from deltadock.kernels.svd_delta import products, triton

        triton.svd_delta(y, x, table, chunks)
        products.add_products(y, x, table, chunks.dense)
    else:
        cpu.svd_delta(y, x, table, chunks, cache)


def clear_slot(table: DeltaTable, slot: int, cache: TensorCache) -> None:
    """Empty a slot, once no running kernel reads it, and discard what is cached of its deltas."""
    cache.discard(table.deltas.get(slot, ()))
    table.remove(slot)


def _check(y: Tensor, x: Tensor, table: DeltaTable, chunks: Chunks) -> None:
    """Validate what the kernels rely on: an out-of-bounds read could be another tenant's memory."""
    rows = chunks.row_count
    if x.shape != (rows, table.h_in) or y.shape != (rows, table.h_out):
        raise ValueError("x and y need the rows of this step, and the linear's inputs and outputs.")
    if x.dtype != y.dtype or x.stride(1) != 1 or y.stride(1) != 1:
        raise ValueError("x and y need one dtype and contiguous rows.")
    if dispatch.on_gpu(x) and x.dtype not in {torch.float16, torch.bfloat16}:
        raise ValueError("The kernel takes float16 or bfloat16.")
    too_small = (
        chunks.max_tiles < table.max_tiles or chunks.width < table.linears * table.padded_h_in
    )
    if chunks.slot_count > table.slot_count or too_small:
        raise ValueError("The chunks have more slots than the table, or too little scratch for it.")
