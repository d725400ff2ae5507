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
        pages = limit_bytes // (ROW_BYTES * PAGE_ROWS)
        self._unused = iter(range(pages))
        self._free: list[int] = []
        self.table = torch.empty(pages * PAGE_ROWS, ROW_BYTES, dtype=torch.uint8)
        """(rows, ROW_BYTES) uint8."""

    def put(self, rows: Tensor) -> PooledRows | None:
        """Copy rows (n, ROW_BYTES) in; None if there is no room for them."""
        pages: list[int] = []
        for _ in range(0, len(rows), PAGE_ROWS):
            page = self._free.pop() if self._free else next(self._unused, None)
            if page is None:
                self._free += pages
                return None
            pages.append(page)
        starts = PAGE_ROWS * torch.tensor(pages, dtype=torch.int32)[:, None]
        numbers = (starts + torch.arange(PAGE_ROWS, dtype=torch.int32)).flatten()[: len(rows)]
        self.table[numbers.long()] = rows
        pooled = PooledRows(numbers)
        weakref.finalize(pooled, self._free.extend, pages).atexit = False
        return pooled
