"""What has been unpacked for use, within a limit in bytes."""

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol, TypeVar

from deltadock.kernels.pool import RowPool


class Unpacked(Protocol):
    """What can be kept."""

    @property
    def nbytes(self) -> int:
        """Bytes that it holds."""


Kept = TypeVar("Kept", bound=Unpacked)


@dataclass(slots=True)
class _Entry:
    value: Any
    nbytes: int
    step: int
    """The last step that used it."""


class TensorCache:
    """Unpacked tensors by what they were unpacked from. Any thread may use it.

    A pass over a model uses all of its layers in turn. If they do not all fit, evicting the least
    recently used would evict each just before its next use; so what this step or the one before
    used stays, and what does not fit beside it is unpacked at every use.
    """

    def __init__(self, limit_bytes: int) -> None:
        self._limit_bytes = limit_bytes
        self._entries: OrderedDict[Hashable, _Entry] = OrderedDict()
        self._lock = threading.Lock()
        self._step = 0
        self.nbytes = 0
        """Bytes held, at most the limit."""

    @cached_property
    def pool(self) -> RowPool:
        """Where byte rows lie; of no more than the limit, and for one thread."""
        return RowPool(self._limit_bytes)

    def begin_step(self) -> None:
        """Tell that a new pass over the model begins."""
        self._step += 1

    def get(self, key: Hashable, make: Callable[[], Kept]) -> Kept:
        """What `make` gave for this key, now or earlier. A key is always used with one `make`."""
        with self._lock:
            entry = self._entries.get(key)
            if entry is not None:
                entry.step = self._step
                self._entries.move_to_end(key)
                found: Kept = entry.value
                return found
        value = make()
        size = value.nbytes
        with self._lock:
            if key not in self._entries and self._make_room(size):
                self._entries[key] = _Entry(value, size, self._step)
                self.nbytes += size
        return value

    def discard(self, key: Hashable) -> None:
        """Forget what was unpacked for a key, if it is held."""
        with self._lock:
            entry = self._entries.pop(key, None)
            if entry is not None:
                self.nbytes -= entry.nbytes

    def _make_room(self, size: int) -> bool:
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
