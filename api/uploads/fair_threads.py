"""Threads that tenants take in turn."""

import threading
from collections import Counter, OrderedDict, deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor


class FairThreads:
    """So many threads, of which one tenant has at most `share`; waiting tenants take turns."""

    def __init__(self, threads: int, share: int, name: str) -> None:
        self._pool = ThreadPoolExecutor(threads, name)
        self._share = share
        self._lock = threading.Lock()
        self._running: Counter[str] = Counter()
        self._waiting: OrderedDict[str, deque[tuple[Future[None], Callable[[], None]]]]
        self._waiting = OrderedDict()
        """By tenant, in the order of their turns."""

    def submit(self, tenant: str, work: Callable[[], None]) -> Future[None]:
        """Run `work` when it is its turn."""
        future: Future[None] = Future()
        with self._lock:
            self._waiting.setdefault(tenant, deque()).append((future, work))
        self._pool.submit(self._run)
        return future

    def shutdown(self) -> None:
        """Cancel what waits, and wait for what runs."""
        with self._lock:
            waiting = [future for works in self._waiting.values() for future, _ in works]
            self._waiting.clear()
        for future in waiting:
            future.cancel()
        self._pool.shutdown(cancel_futures=True)

    def _run(self) -> None:
        """Run what may run, until nothing is left of it."""
        while (taken := self._take()) is not None:
            tenant, future, work = taken
            try:
                if future.set_running_or_notify_cancel():
                    try:
                        work()
                    except BaseException as error:  # noqa: BLE001
                        future.set_exception(error)
                    else:
                        future.set_result(None)
            finally:
                with self._lock:
                    self._running[tenant] -= 1
                    self._running += Counter()

    def _take(self) -> tuple[str, Future[None], Callable[[], None]] | None:
        """The next tenant's first work, if one has less than its share."""
        with self._lock:
            may_run = (one for one in self._waiting if self._running[one] < self._share)
            if (tenant := next(may_run, None)) is None:
                return None
            works = self._waiting[tenant]
            future, work = works.popleft()
            if works:
                self._waiting.move_to_end(tenant)
            else:
                del self._waiting[tenant]
            self._running[tenant] += 1
            return tenant, future, work
