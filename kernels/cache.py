"""Memory for unpacked deltas, limited in bytes: a cache of tensors and a pool of byte rows."""

import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Final, Protocol, TypeVar

import torch
from torch import Tensor

COLUMNS: Final = 64
"""Codes per pool row: their float32 sums fit in registers with AVX2 as with AVX-512."""
ROW_BYTES: Final = COLUMNS + 8
"""A pool row is its codes, then float32 scale and bias: FBGEMM's 8-bit embedding-bag format."""
PAGE_ROWS: Final = 64
"""Rows are allocated in pages, which need not be contiguous: bags address rows by number."""


class PooledRows:
    """Rows of a `RowPool`, freed when this object is garbage collected.

    Attributes:
        numbers: (n,) int32, row numbers in the pool's table.
    """

    def __init__(self, numbers: Tensor) -> None:
        self.numbers = numbers


class RowPool:
    """Byte rows of all deltas in one table, so that one call can sum rows of many deltas.

    The table is virtual memory: pages that were never written take none. Only one thread may
    allocate; any thread may free.
    """

    def __init__(self, limit_bytes: int) -> None:
        # Row numbers are int32.
        pages = min(limit_bytes // (ROW_BYTES * PAGE_ROWS), 2**31 // PAGE_ROWS)
        self._pages, self._used = pages, 0
        self._free: list[int] = []
        self.table = torch.empty(pages * PAGE_ROWS, ROW_BYTES, dtype=torch.uint8)
        """(rows, ROW_BYTES) uint8."""

    def has_room(self, rows: int) -> bool:
        """Whether `rows` rows can be allocated."""
        return -(-rows // PAGE_ROWS) <= self._pages - self._used + len(self._free)

    def put(self, rows: Tensor) -> PooledRows | None:
        """Copy (n, ROW_BYTES) rows into the table; None if they do not fit."""
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


class Cacheable(Protocol):
    """A value of a `TensorCache`."""

    @property
    def nbytes(self) -> int:
        """Bytes of memory."""


Value = TypeVar("Value", bound=Cacheable)


@dataclass(slots=True)
class _CacheEntry:
    value: Any
    nbytes: int
    step: int
    """The last step in which it was used."""


class TensorCache:
    """An LRU cache of unpacked tensors that resists cyclic access. Thread-safe.

    A forward pass uses every layer in turn. If they do not all fit, plain LRU would evict each
    just before its next use. So entries used in this step or the previous one are not evicted,
    and what does not fit beside them is unpacked at every use.
    """

    def __init__(self, limit_bytes: int) -> None:
        self._limit_bytes = limit_bytes
        self._entries: OrderedDict[Hashable, _CacheEntry] = OrderedDict()
        self._lock = threading.Lock()
        self._step = 0
        self.nbytes = 0
        """Bytes cached, at most the limit."""

    @cached_property
    def pool(self) -> RowPool:
        """Storage for cached byte rows, of the cache's limit; for one thread."""
        return RowPool(self._limit_bytes)

    def begin_step(self) -> None:
        """Mark the start of a forward pass."""
        self._step += 1

    def get(self, key: Hashable, unpack: Callable[[], Value]) -> Value:
        """The cached value of `key`, or the result of `unpack`, cached if it fits.

        A key must always be used with the same `unpack`.
        """
        with self._lock:
            entry = self._entries.get(key)
            if entry is not None:
                entry.step = self._step
                self._entries.move_to_end(key)
                cached: Value = entry.value
                return cached
        value = unpack()
        size = value.nbytes
        with self._lock:
            if key not in self._entries and self._evict_for(size):
                self._entries[key] = _CacheEntry(value, size, self._step)
                self.nbytes += size
        return value

    def discard(self, key: Hashable) -> None:
        """Evict a key, if it is cached."""
        with self._lock:
            entry = self._entries.pop(key, None)
            if entry is not None:
                self.nbytes -= entry.nbytes

    def _evict_for(self, size: int) -> bool:
        """Evict idle entries until `size` bytes are free; evict none if that is impossible."""
        idle = []
        free = self._limit_bytes - self.nbytes
        for key, entry in self._entries.items():
            if free >= size or entry.step >= self._step - 1:
                break
            idle.append(key)
            free += entry.nbytes
        if free < size:
            return False
        for key in idle:
            self.nbytes -= self._entries.pop(key).nbytes
        return True
