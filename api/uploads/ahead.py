"""Hashes files in parts while their later parts arrive, so that completing them has little to read.

The stored bytes are read back, in order, as far as no part is missing. What is known of a file is
in this process's memory alone, and only a shortcut: whoever completes the upload without it reads
the whole file.
"""

import threading
import time
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Final

import structlog

from deltadock.api.uploads.receive import Inspector, make_inspector
from deltadock.errors import DeltadockError
from deltadock.storage.blobs import PartedFile
from deltadock.storage.tables import UploadKind

THREADS: Final = 2
"""Files at once; each hashes in two threads, one for files and one for tensors."""
MAX_FILES: Final = 8
"""Files in memory; others are read when they are completed."""
IDLE_SECONDS: Final = 60.0
"""A file that waits for a part this long gives its place to another one."""

log = structlog.get_logger(__name__)


@dataclass(slots=True)
class Prefix:
    """A file's first parts, inspected; each had its stamp before it was read."""

    inspector: Inspector
    stamps: list[str] = field(default_factory=list)


@dataclass(slots=True)
class _File:
    prefix: Prefix | None
    """None: reading it failed; completing it reads it anew, and says so."""
    arrivals: int = 0
    used: float = 0.0
    work: Future[None] | None = None
    is_running: bool = False
    is_taken: bool = False


class HashAhead:
    """The files in parts that arrive through this process."""

    def __init__(self, hashers: Executor) -> None:
        """`hashers` has a thread for each of `THREADS`."""
        self._hashers = hashers
        self._lock = threading.Lock()
        self._files: dict[str, _File] = {}
        self._pool = ThreadPoolExecutor(THREADS, "hash-ahead")
        self._is_closed = False

    def arrived(self, kind: UploadKind, path: str, parts: PartedFile) -> None:
        """Go on with a file of which a part has become complete; returns at once."""
        now = time.monotonic()
        with self._lock:
            file = self._files.get(parts.token)
            if file is None:
                if self._is_closed or not self._make_room(now):
                    return
                file = _File(Prefix(make_inspector(kind, path, self._hashers)))
                self._files[parts.token] = file
            file.arrivals, file.used = file.arrivals + 1, now
            if not file.is_running:
                file.is_running = True
                file.work = self._pool.submit(self._advance, file, parts)

    def take(self, parts: PartedFile) -> Prefix | None:
        """What is known of a sealed file, and still true of it; it is forgotten here."""
        with self._lock:
            file = self._files.pop(parts.token, None)
            if file is None:
                return None
            file.is_taken = True
        if file.work is not None and not file.work.cancel():
            file.work.result()
        prefix = file.prefix
        return prefix if prefix is not None and parts.holds(prefix.stamps) else None

    def close(self) -> None:
        """Stop; what arrives from now on is not hashed ahead."""
        with self._lock:
            self._is_closed = True
            for file in self._files.values():
                file.is_taken = True
            self._files.clear()
        self._pool.shutdown(cancel_futures=True)

    def _make_room(self, now: float) -> bool:
        if len(self._files) < MAX_FILES:
            return True
        token, oldest = min(self._files.items(), key=lambda item: item[1].used)
        if oldest.is_running or now - oldest.used < IDLE_SECONDS:
            return False
        del self._files[token]
        return True

    def _advance(self, file: _File, parts: PartedFile) -> None:
        """Inspect the next parts until one is missing."""
        try:
            while True:
                arrivals = file.arrivals
                while not file.is_taken and self._inspect_next(file, parts):
                    pass
                with self._lock:
                    if file.is_taken or file.arrivals == arrivals:
                        file.is_running = False
                        return
        except DeltadockError:  # completing the file meets it again, and says so
            file.prefix, file.is_running = None, False
        except Exception:  # the file may not keep its place, nor fail whoever takes it
            log.exception("not_hashed_ahead")
            file.prefix, file.is_running = None, False

    def _inspect_next(self, file: _File, parts: PartedFile) -> bool:
        """Inspect the next part; returns False if there is none."""
        prefix = file.prefix
        if prefix is None:
            return False
        done = len(prefix.stamps)
        stamp = parts.stamp(done + 1) if done < parts.count else None
        if stamp is None:
            return False
        start = done * parts.part_bytes
        for chunk in parts.read(start, start + parts.part_size(done + 1)):
            prefix.inspector.update(chunk)
        prefix.stamps.append(stamp)
        return True
