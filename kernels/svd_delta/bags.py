"""Without a GPU: the deltas of all slots at once, by FBGEMM's embedding bags.

A decode step reads the deltas of all its rows, and reading is what it costs: a byte a code is a
quarter of float32 factors. A bag is a weighted sum of rows of a byte table that have a scale and
a bias each: `sum_i w_i (scale_i * code_i + bias_i)`. A product with V is one bag for each
`COLUMNS` ranks, over the inputs; a product with U one for each `COLUMNS` outputs, over the ranks.
Where a slot has `MANY_ROWS`, or the pool has no room for it, matrix products take the bags' place;
otherwise a row's result does not depend on its neighbours.
"""

from functools import partial
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from deltadock.kernels.cache import TensorCache
from deltadock.kernels.pool import COLUMNS
from deltadock.kernels.svd_delta.chunks import Chunks
from deltadock.kernels.svd_delta.coded import CodedSlot, code_slot
from deltadock.kernels.svd_delta.factors import Rows
from deltadock.kernels.svd_delta.plan import BagPlan, Few, centred, sum_bags
from deltadock.kernels.svd_delta.table import DeltaTable

MANY_ROWS: Final = 12
"""Rows of one slot from which on its codes are made float32, for matrix products."""


def add_deltas(y: Tensor, x: Tensor, table: DeltaTable, chunks: Chunks, cache: TensorCache) -> None:
    """Add each row's delta to `y` in place, as `kernels.svd_delta.svd_delta` says; in float32."""
    few: Few = []
    for slot, rows in chunks.members.items():
        if (deltas := table.deltas.get(slot)) is None:
            continue
        make = partial(code_slot, deltas, table.h_outs, cache.pool)
        coded = cache.get(deltas, make)
        if coded.pooled is None and cache.pool.has_room(coded.row_count):
            cache.discard(deltas)
            coded = cache.get(deltas, make)  # the pool was full when it was coded
        if len(rows) < MANY_ROWS and coded.pooled is not None:
            few.append((coded, rows))
        else:
            _add_products(y, x, coded, chunks.by_slot[slot])
    if not few:
        table.plan = None  # it holds rows of the pool
        return
    if (plan := table.plan) is None or not plan.serves(few, y):
        plan = table.plan = BagPlan(few, x, y)
    plan.add(y, x, cache.pool)


def _add_products(y: Tensor, x: Tensor, coded: CodedSlot, rows: Rows) -> None:
    """The same for one slot, by matrix products on float32 copies of its vectors."""
    firsts, zeros, totals, row_scale, bias = map(
        torch.from_numpy,
        (coded.firsts, coded.zeros, coded.totals, coded.row_scale, coded.bias),
    )
    x, means = centred(x[rows])
    sums = _joined(x @ _floats(coded.table, coded.v, x.shape[1]))
    projected = torch.addcmul(sums, sums.index_select(1, firsts), zeros, value=-1)
    projected += means[:, None] * totals
    for part in coded.parts:
        added = bias[part.outputs]
        if height := part.ranks.stop - part.ranks.start:
            u = _floats(coded.table, coded.u[part.rows], height)
            out = _joined(projected[:, part.ranks] @ u)
            added = torch.addcmul(added, out, row_scale[part.outputs])
        width = part.columns.stop - part.columns.start
        y[rows, part.columns] += added[..., :width]


def _floats(table: Tensor, numbers: NDArray[np.int32], height: int) -> Tensor:
    """Rows of the table as blocks (n, height, COLUMNS) of what they stand for, float32."""
    each = torch.arange(len(numbers), dtype=torch.int32)
    return sum_bags(table, torch.from_numpy(numbers), each).view(-1, height, COLUMNS)


def _joined(blocks: Tensor) -> Tensor:
    """(blocks, n, COLUMNS) to (n, blocks * COLUMNS)."""
    return blocks.transpose(0, 1).flatten(1)
