"""The disk tier: artifacts fetched from the blob store, under a byte limit."""

import threading
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from deltadock.errors import TooLarge, Unavailable
from deltadock.inference.deltas.counts import TierCounts
from deltadock.storage.cache import FileCache


@dataclass(slots=True)
class _File:
    bytes: int
    users: int = 0


@dataclass(slots=True)
class DiskTier:
    """Artifact files by digest, the least recently used first to go; called from any thread.

    A file is hashed each time before it is used: what lies on a disk is not trusted. One that is
    damaged is fetched again.
    """

    files: FileCache
    limit: int
    """Bytes."""
    counts: TierCounts = field(default_factory=TierCounts)
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _held: OrderedDict[str, _File] = field(default_factory=OrderedDict)

    def __post_init__(self) -> None:
        for digest, size in self.files.artifacts():
            self._held[digest] = _File(size)
        self._evict(0)

    @property
    def bytes(self) -> int:
        """Bytes of the files, those on their way included."""
        return sum(file.bytes for file in self._held.values())

    def held(self) -> Mapping[str, int]:
        """Bytes of each file, by digest; least recently used first."""
        with self._lock:
            return {digest: file.bytes for digest, file in self._held.items()}

    @contextmanager
    def open(self, digest: str) -> Iterator[Path]:
        """The verified file of an artifact, which stays while the block runs. Blocks.

        Raises:
            NotFound: there is no such artifact.
            HashMismatch: the store's bytes are damaged; nothing is kept of them.
            TooLarge: it is larger than the limit.
            Unavailable: the tier is full of files that are being read.
        """
        file = self._enter(digest)
        kept = False
        try:
            path = self.files.artifact(digest)
            kept = True
            yield path
        finally:
            with self._lock:
                file.users -= 1
                if not kept and file.users == 0:
                    self._remove(digest)

    def _enter(self, digest: str) -> _File:
        with self._lock:
            if digest in self._held:
                self.counts.hits += 1
                return self._used(digest)
        size = self.files.artifact_size(digest)  # asked only now: what is here needs no store
        with self._lock:
            self.counts.misses += 1
            if digest not in self._held:
                self._make_room(digest, size)
                self._held[digest] = _File(size)
            return self._used(digest)

    def _used(self, digest: str) -> _File:
        self._held.move_to_end(digest)
        self._held[digest].users += 1
        return self._held[digest]

    def drop(self, digest: str) -> bool:
        """Remove a file that nobody reads; whether it is gone."""
        with self._lock:
            file = self._held.get(digest)
            if file is not None and file.users == 0:
                self._remove(digest)
            return digest not in self._held

    def _make_room(self, digest: str, size: int) -> None:
        if size > self.limit:
            raise TooLarge(
                f"The delta {digest} has {size} bytes, and the node keeps {self.limit} on disk. "
                "Raise DELTADOCK_NODE_DISK_BYTES."
            )
        self._evict(size)
        if self.bytes + size > self.limit:
            raise Unavailable("The node's disk is full of deltas being loaded; try again shortly.")

    def _evict(self, size: int) -> None:
        """Remove files that nobody reads until `size` more bytes fit, as far as that goes."""
        for digest in [digest for digest, file in self._held.items() if file.users == 0]:
            if self.bytes + size <= self.limit:
                return
            self._remove(digest)
            self.counts.evictions += 1

    def _remove(self, digest: str) -> None:
        self._held.pop(digest, None)
        self.files.remove_artifact(digest)
