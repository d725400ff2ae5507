"""LRU tiers of deltas: the base class, files on disk, deltas in host memory.

The tier of device slots is in `slots`.
"""

import asyncio
import threading
from collections import OrderedDict
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Generic, Protocol, TypeVar

from deltadock import words
from deltadock.errors import TooLarge, Unavailable

if TYPE_CHECKING:  # the engine's benchmarks run without a blob store's libraries
    from deltadock.storage.cache import FileCache


@dataclass(slots=True)
class TierCounts:
    """Lookups and evictions of a tier since the start."""

    hits: int = 0
    misses: int = 0
    evictions: int = 0


class Countable(Protocol):
    """An entry with a reference count."""

    users: int


Entry = TypeVar("Entry", bound=Countable)


class LruTier(Generic[Entry]):
    """Reference-counted entries by artifact digest, evicted least recently used first.

    An entry in use is never evicted.
    """

    def __init__(self) -> None:
        self.counts = TierCounts()
        self._entries: OrderedDict[str, Entry] = OrderedDict()
        """Least recently used first."""

    def _use(self, digest: str) -> Entry:
        """Mark an entry as used now, and count a user."""
        self._entries.move_to_end(digest)
        entry = self._entries[digest]
        entry.users += 1
        return entry

    def _evictable(self, entry: Entry) -> bool:
        return entry.users == 0

    def _evict(self, until: Callable[[], bool]) -> None:
        """Evict entries, least recently used first, until `until()` or none is evictable."""
        for digest in [key for key, entry in self._entries.items() if self._evictable(entry)]:
            if until():
                return
            self._remove(digest)
            self.counts.evictions += 1

    def _remove(self, digest: str) -> None:
        del self._entries[digest]


@dataclass(slots=True)
class _ArtifactFile:
    nbytes: int
    users: int = 0


class DiskTier(LruTier[_ArtifactFile]):
    """Artifact files on the local disk, under a byte limit. Thread-safe.

    A file is hashed before every use, since disks are not trusted; a damaged file is fetched again.
    """

    def __init__(self, files: "FileCache", limit: int) -> None:
        """Adopt the files that are already there; `limit` is in bytes."""
        super().__init__()
        self._files, self._limit = files, limit
        self._lock = threading.Lock()
        for digest, size in files.artifacts():
            self._entries[digest] = _ArtifactFile(size)
        self._evict(lambda: self.nbytes <= limit)

    @property
    def nbytes(self) -> int:
        """Bytes of the files, including those being fetched."""
        return sum(file.nbytes for file in self._entries.values())

    def held(self) -> Mapping[str, int]:
        """Bytes of each file, by digest; least recently used first."""
        with self._lock:
            return {digest: file.nbytes for digest, file in self._entries.items()}

    @contextmanager
    def open(self, digest: str) -> Iterator[Path]:
        """The verified file of an artifact, fetched if needed; kept while the block runs. Blocks.

        Raises:
            NotFound: there is no such artifact.
            DamagedBlob: the store's bytes are damaged; nothing is kept.
            TooLarge: the file exceeds the limit.
            Unavailable: the tier is full of files in use.
        """
        file = self._acquire(digest)
        verified = False
        try:
            path = self._files.artifact(digest)
            verified = True
            yield path
        finally:
            with self._lock:
                file.users -= 1
                if not verified and file.users == 0:
                    self._remove(digest)

    def _acquire(self, digest: str) -> _ArtifactFile:
        with self._lock:
            if digest in self._entries:
                self.counts.hits += 1
                return self._use(digest)
        size = self._files.artifact_size(digest)  # only now: cached files need no blob store
        with self._lock:
            self.counts.misses += 1
            if digest not in self._entries:
                self._make_room(digest, size)
                self._entries[digest] = _ArtifactFile(size)
            return self._use(digest)

    def _make_room(self, digest: str, size: int) -> None:
        if size > self._limit:
            raise TooLarge(
                f"The delta {digest} takes {words.size(size)}, and the node keeps "
                f"{words.size(self._limit)} on disk. Raise DELTADOCK_NODE_DISK_BYTES."
            )
        self._evict(lambda: self.nbytes + size <= self._limit)
        if self.nbytes + size > self._limit:
            raise Unavailable("The node's disk is full of deltas being loaded; try again shortly.")

    def _remove(self, digest: str) -> None:
        self._entries.pop(digest, None)
        self._files.remove_artifact(digest)


class Sized(Protocol):
    """A delta in host memory."""

    @property
    def nbytes(self) -> int:
        """Bytes of memory."""


Delta = TypeVar("Delta", bound=Sized)


@dataclass(slots=True)
class _HostEntry(Generic[Delta]):
    delta: Delta
    users: int = 0


class HostTier(LruTier[_HostEntry[Delta]]):
    """Deltas in host memory, ready for a slot, under a byte limit. Belongs to one event loop.

    Idle deltas never exceed the limit; deltas in use may.
    """

    def __init__(self, limit: int, load: Callable[[str], Awaitable[Delta]]) -> None:
        """`limit` is in bytes; `load` reads a delta into host memory."""
        super().__init__()
        self._limit = limit
        self._load = load
        self._loading: dict[str, asyncio.Task[_HostEntry[Delta]]] = {}

    @property
    def nbytes(self) -> int:
        """Bytes of the deltas in the tier."""
        return sum(entry.delta.nbytes for entry in self._entries.values())

    def held(self) -> Mapping[str, int]:
        """Bytes of each delta, by digest; least recently used first."""
        return {digest: entry.delta.nbytes for digest, entry in self._entries.items()}

    @asynccontextmanager
    async def hold(self, digest: str) -> AsyncIterator[Delta]:
        """A delta, loaded if needed, that is kept while the block runs.

        Raises whatever loading raised; nothing is kept then. A load continues if its waiter is
        cancelled.
        """
        if digest in self._entries:
            self.counts.hits += 1
        else:
            self.counts.misses += 1
            loaded = await asyncio.shield(self._load_once(digest))
            self._entries.setdefault(digest, loaded)
        entry = self._use(digest)
        try:
            yield entry.delta
        finally:
            entry.users -= 1
            self._trim()

    async def prefetch(self, digest: str) -> None:
        """Load a delta for later use; raises whatever loading raised."""
        async with self.hold(digest):
            pass

    def drop(self, digest: str) -> bool:
        """Remove an idle delta; whether the tier no longer has it."""
        entry = self._entries.get(digest)
        if entry is not None and entry.users == 0:
            self._remove(digest)
        return digest not in self._entries

    def _load_once(self, digest: str) -> "asyncio.Task[_HostEntry[Delta]]":
        if digest not in self._loading:
            self._loading[digest] = asyncio.create_task(self._load_entry(digest))
        return self._loading[digest]

    async def _load_entry(self, digest: str) -> _HostEntry[Delta]:
        try:
            entry = self._entries[digest] = _HostEntry(await self._load(digest))
        finally:
            del self._loading[digest]
        self._trim()
        return entry

    def _trim(self) -> None:
        self._evict(lambda: self.nbytes <= self._limit)
