"""Without a GPU: the deltas of all slots at once, by FBGEMM's embedding bags.

A decode step reads the deltas of all its rows, and reading is what it costs: a byte a code is a
quarter of float32 factors. A bag is a weighted sum of rows of a byte table that have a scale and
a bias each: `sum_i w_i (scale_i * code_i + bias_i)`. A product with V is one bag for each
`COLUMNS` ranks, over the inputs; a product with U one for each `COLUMNS` outputs, over the ranks.
A row's result depends on the other rows of its slot only where they are `MANY_ROWS`.
"""

from functools import partial
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kernels.cache import TensorCache
from kernels.pool import COLUMNS, RowPool
from kernels.svd_delta.chunks import Chunks
from kernels.svd_delta.coded import CodedSlot, code_slot
from kernels.svd_delta.factors import Rows
from kernels.svd_delta.table import DeltaTable

MANY_ROWS: Final = 12
"""Rows of one slot from which on its codes are made float32, for matrix products."""


Few = list[tuple[CodedSlot, list[int]]]
"""Slots and the numbers of their rows."""


def add_deltas(y: Tensor, x: Tensor, table: DeltaTable, chunks: Chunks, cache: TensorCache) -> None:
    """Add each row's delta to `y` in place, as `kernels.svd_delta.svd_delta` says; in float32."""
    few: Few = []
    for slot, rows in chunks.members.items():
        if (deltas := table.deltas.get(slot)) is None:
            continue
        coded = cache.get(deltas, partial(code_slot, deltas, table.h_outs, cache.pool))
        if len(rows) < MANY_ROWS and coded.pooled is not None:
            few.append((coded, rows))
        else:
            _add_products(y, x, coded, chunks.by_slot[slot])
    if few:
        if (plan := table.plan) is None or not plan.serves(few, x, y):
            plan = table.plan = BagPlan(few, x, y)
        plan.add(y, x, cache.pool)


class BagPlan:
    """What the bags of a step read and where their sums go, for the linears of one table.

    The steps of a batch that stays the same share it.
    """

    def __init__(self, few: Few, x: Tensor, y: Tensor) -> None:
        self._key = few, x.stride(), y.stride()
        slots = [coded for coded, numbers in few for _ in numbers]
        rows = np.array([row for _, numbers in few for row in numbers])

        def joined(name: str, shifts: NDArray[Any] | None = None) -> Tensor:
            """Of all rows one after the other; each row's raised by a number of its own."""
            arrays = [getattr(slot, name) for slot in slots]
            whole = np.concatenate(arrays)
            if shifts is not None:
                whole += np.repeat(shifts.astype(np.int32), [len(array) for array in arrays])
            return torch.from_numpy(whole)

        def before(name: str) -> NDArray[Any]:
            """How many elements the rows before each one have."""
            return np.cumsum([0, *(len(getattr(slot, name)) for slot in slots[:-1])])

        ranks = before("zeros")
        self._v = joined("v"), joined("v_bags", before("v")), joined("v_inputs", rows * x.stride(0))
        self._u = joined("u"), joined("u_bags", before("u")), joined("u_ranks", ranks)
        self._firsts, self._zeros = joined("firsts", ranks), joined("zeros")
        self._columns = joined("columns", rows * y.stride(0))
        self._row_scale, self._bias = joined("row_scale"), joined("bias")

    def serves(self, few: Few, x: Tensor, y: Tensor) -> bool:
        """Whether it was made for the same rows on the same deltas."""
        return self._key == (few, x.stride(), y.stride())

    def add(self, y: Tensor, x: Tensor, pool: RowPool) -> None:
        """Add the deltas to `y` in place."""
        sums = _sum(pool, *self._v, _flat(x).float())
        projected = torch.addcmul(sums, sums.index_select(0, self._firsts), self._zeros, value=-1)
        out = _sum(pool, *self._u, projected)
        added = torch.addcmul(self._bias, out, self._row_scale)
        _flat(y).index_add_(0, self._columns, added.to(y.dtype))


def _sum(pool: RowPool, rows: Tensor, bags: Tensor, places: Tensor, weights: Tensor) -> Tensor:
    """(bags * COLUMNS,) float32: sums of rows (n,) of the pool by bags, which begin at `bags`.

    Each row's weight is at its place (n,) in `weights`.
    """
    return _bags(pool.table, rows, bags, weights.index_select(0, places)).flatten()


def _bags(table: Tensor, rows: Tensor, bags: Tensor, weights: Tensor | None = None) -> Tensor:
    found: Tensor = torch.ops.quantized.embedding_bag_byte_rowwise_offsets(
        table, rows, bags, per_sample_weights=weights
    )
    return found


def _flat(rows: Tensor) -> Tensor:
    """The memory from the first row to the end of the last."""
    count, columns = rows.shape
    return rows.as_strided(((count - 1) * rows.stride(0) + columns,), (1,))


def _add_products(y: Tensor, x: Tensor, coded: CodedSlot, rows: Rows) -> None:
    """The same for one slot, by matrix products on float32 copies of its vectors."""
    x, firsts, zeros, row_scale, bias = (
        x[rows].float(),
        *map(torch.from_numpy, (coded.firsts, coded.zeros, coded.row_scale, coded.bias)),
    )
    sums = _joined(x @ _floats(coded.table, coded.v, x.shape[1]))
    projected = torch.addcmul(sums, sums.index_select(1, firsts), zeros, value=-1)
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
    return _bags(table, torch.from_numpy(numbers), each).view(-1, height, COLUMNS)


def _joined(blocks: Tensor) -> Tensor:
    """(blocks, n, COLUMNS) to (n, blocks * COLUMNS)."""
    return blocks.transpose(0, 1).flatten(1)
