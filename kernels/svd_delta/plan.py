"""Which rows of the pool a step's bags read, with which weights, and where their sums go."""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from deltadock.kernels.pool import RowPool
from deltadock.kernels.svd_delta.coded import CodedSlot

Few = list[tuple[CodedSlot, list[int]]]
"""Slots and the numbers of their rows."""


class BagPlan:
    """What the bags of a step read and where their sums go, for the linears of one table.

    The steps of a batch that stays the same share it.
    """

    def __init__(self, few: Few, x: Tensor, y: Tensor) -> None:
        self._key = few, y.stride()
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
        self._v = joined("v"), joined("v_bags", before("v")), joined("v_inputs", rows * x.shape[1])
        self._u = joined("u"), joined("u_bags", before("u")), joined("u_ranks", ranks)
        self._firsts, self._zeros = joined("firsts", ranks), joined("zeros")
        self._totals = joined("totals")
        self._rank_rows = torch.from_numpy(rows.repeat([len(slot.zeros) for slot in slots]))
        self._columns = joined("columns", rows * y.stride(0))
        self._row_scale, self._bias = joined("row_scale"), joined("bias")

    def serves(self, few: Few, y: Tensor) -> bool:
        """Whether it was made for the same rows on the same deltas."""
        return self._key == (few, y.stride())

    def add(self, y: Tensor, x: Tensor, pool: RowPool) -> None:
        """Add the deltas to `y` in place."""
        x, means = centred(x)
        sums = _sum(pool, *self._v, x.flatten())
        projected = torch.addcmul(sums, sums.index_select(0, self._firsts), self._zeros, value=-1)
        projected.addcmul_(means.index_select(0, self._rank_rows), self._totals)
        out = _sum(pool, *self._u, projected)
        added = torch.addcmul(self._bias, out, self._row_scale)
        _flat(y).index_add_(0, self._columns, added.to(y.dtype))


def centred(x: Tensor) -> tuple[Tensor, Tensor]:
    """Rows (n, h_in) less their means, and these, (n,); float32.

    Sums with codes from 0 up would lose to a mean what they have of the rest.
    """
    x = x.float()
    means = x.mean(1)
    return x - means[:, None], means


def _sum(pool: RowPool, rows: Tensor, bags: Tensor, places: Tensor, weights: Tensor) -> Tensor:
    """(bags * COLUMNS,) float32: sums of rows (n,) of the pool by bags, which begin at `bags`.

    Each row's weight is at its place (n,) in `weights`.
    """
    return sum_bags(pool.table, rows, bags, weights.index_select(0, places)).flatten()


def sum_bags(table: Tensor, rows: Tensor, bags: Tensor, weights: Tensor | None = None) -> Tensor:
    """(bags, COLUMNS) float32, of rows (n,) of a table by bags, which begin at `bags`; int32."""
    found: Tensor = torch.ops.quantized.embedding_bag_byte_rowwise_offsets(
        table, rows, bags, per_sample_weights=weights
    )
    return found


def _flat(rows: Tensor) -> Tensor:
    """The memory from the first row to the end of the last."""
    count, columns = rows.shape
    return rows.as_strided(((count - 1) * rows.stride(0) + columns,), (1,))
