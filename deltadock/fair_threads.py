"""Threads that tenants take in turn."""

import threading
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple, TypeVar

from deltadock.fair_queue import FairQueue

Result = TypeVar("Result")


class _Work(NamedTuple):
    run: Callable[[], Any]
    future: Future[Any]


class FairThreads:
    """So many threads, of which one tenant has at most `share`; waiting tenants take turns."""

    def __init__(self, threads: int, share: int, name: str) -> None:
        self._pool = ThreadPoolExecutor(threads, name)
        self._share = share
        self._lock = threading.Lock()
        self._running: Counter[str | None] = Counter()
        self._waiting: FairQueue[_Work] = FairQueue()

    def submit(self, tenant: str | None, run: Callable[[], Result]) -> Future[Result]:
        """Run it when it is its turn, unless the future is cancelled before."""
        work = _Work(run, Future())

        def forget(future: Future[Any]) -> None:
            if future.cancelled():
                with self._lock:
                    self._waiting.remove(tenant, work)

        with self._lock:
            self._waiting.put(tenant, work)
        work.future.add_done_callback(forget)
        self._pool.submit(self._run)
        return work.future

    def shutdown(self) -> None:
        """Cancel what waits, and wait for what runs."""
        with self._lock:
            waiting, self._waiting = self._waiting, FairQueue()
        while (taken := waiting.take(lambda *_: True)) is not None:
            taken[1].future.cancel()
        self._pool.shutdown(cancel_futures=True)

    def _take(self) -> tuple[str | None, _Work] | None:
        """The next tenant's first work, if one has less than its share."""
        with self._lock:
            taken = self._waiting.take(lambda tenant, _: self._running[tenant] < self._share)
            if taken is not None:
                self._running[taken[0]] += 1
            return taken

    def _run(self) -> None:
        """Run what may run, until nothing is left of it."""
        while (taken := self._take()) is not None:
            tenant, work = taken
            try:
                if work.future.set_running_or_notify_cancel():
                    try:
                        result = work.run()
                    except BaseException as error:  # noqa: BLE001
                        work.future.set_exception(error)
                    else:
                        work.future.set_result(result)
            finally:
                with self._lock:
                    self._running[tenant] -= 1
                    self._running += Counter()
