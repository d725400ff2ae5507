"""One table of byte rows for all deltas, so that one call can sum rows of many."""

import weakref
from typing import Final

import torch
from torch import Tensor

COLUMNS: Final = 64
"""Codes of a row: their sums stay in registers, of AVX2 as of AVX-512."""
ROW_BYTES: Final = COLUMNS + 8
"""The codes, then float32 scale and bias, as FBGEMM's embedding bags read them."""
PAGE_ROWS: Final = 64
"""Rows are given out by the page, from wherever one is free: a bag reads rows by their numbers."""


class PooledRows:
    """Rows of a pool, which are its own as long as it lives.

    Attributes:
        numbers: (n,) int32, their places in the pool's table.
    """

    def __init__(self, numbers: Tensor) -> None:
        self.numbers = numbers


class RowPool:
    """Byte rows in one table; the system gives memory only for pages that were written.

    One thread puts rows; they may be let go in any.
    """

    def __init__(self, limit_bytes: int) -> None:
        # Rows are numbered in int32.
        pages = min(limit_bytes // (ROW_BYTES * PAGE_ROWS), 2**31 // PAGE_ROWS)
        self._pages, self._used = pages, 0
        self._free: list[int] = []
        self.table = torch.empty(pages * PAGE_ROWS, ROW_BYTES, dtype=torch.uint8)
        """(rows, ROW_BYTES) uint8."""

    def has_room(self, rows: int) -> bool:
        """Whether so many rows fit."""
        return -(-rows // PAGE_ROWS) <= self._pages - self._used + len(self._free)

    def put(self, rows: Tensor) -> PooledRows | None:
        """Copy rows (n, ROW_BYTES) in; None if there is no room for them."""
        if not self.has_room(len(rows)):
            return None
        count = -(-len(rows) // PAGE_ROWS)
        pages = [self._free.pop() for _ in range(min(count, len(self._free)))]
        rest = count - len(pages)
        pages += range(self._used, self._used + rest)
        self._used += rest
        starts = PAGE_ROWS * torch.tensor(pages, dtype=torch.int32)[:, None]
        numbers = (starts + torch.arange(PAGE_ROWS, dtype=torch.int32)).flatten()[: len(rows)]
        self.table[numbers.long()] = rows
        pooled = PooledRows(numbers)
        weakref.finalize(pooled, self._free.extend, pages).atexit = False
        return pooled
