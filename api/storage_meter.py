"""Measuring what is stored, as seldom as a large store needs."""

import threading
import time
from concurrent.futures import Future

import structlog

from deltadock.storage.blobs import BlobStore
from deltadock.storage.database import Database
from deltadock.storage.usage import UsageByKind, measure

log = structlog.get_logger(__name__)


class StorageMeter:
    """Measures what is stored when asked, at most for a hundredth of the time."""

    def __init__(self, database: Database, blobs: BlobStore) -> None:
        self._database = database
        self._blobs = blobs
        self._lock = threading.Lock()
        self._latest: UsageByKind | None = None
        self._began = 0.0
        self._fresh_until = 0.0
        self._measuring: Future[UsageByKind] | None = None

    def usage(self) -> UsageByKind:
        """What is stored, by kind; a hundred times as old as measuring takes, at most."""
        measured = self._measure()
        return measured if isinstance(measured, dict) else measured.result()

    def usage_within(self, seconds: float) -> UsageByKind | None:
        """As `usage`, or the figures before if measuring takes longer; None: there are none."""
        measured = self._measure()
        left = max(0.0, self._began + seconds - time.monotonic())
        try:
            return measured if isinstance(measured, dict) else measured.result(left)
        except TimeoutError:
            return self._latest

    def _measure(self) -> "UsageByKind | Future[UsageByKind]":
        """The latest figures, or the measurement of newer ones."""
        with self._lock:
            if self._measuring is None:
                if self._latest is not None and time.monotonic() < self._fresh_until:
                    return self._latest
                self._measuring, self._began = Future(), time.monotonic()
                # A daemon: the process may end meanwhile.
                thread = threading.Thread(target=self._run, args=[self._measuring], daemon=True)
                thread.start()
            return self._measuring

    def _run(self, measuring: "Future[UsageByKind]") -> None:
        started = time.monotonic()
        usage: UsageByKind | None = None
        failure: Exception | None = None
        try:
            usage = measure(self._database, self._blobs)
        except Exception as error:
            log.exception("measurement_failed")
            failure = error
        with self._lock:
            ended = time.monotonic()
            self._measuring = None
            self._latest = usage or self._latest
            self._fresh_until = ended + 100 * (ended - started) if usage else ended
        if usage is None:
            measuring.set_exception(failure)
        else:
            measuring.set_result(usage)
