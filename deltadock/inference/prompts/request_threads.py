"""Threads for blocking work on requests, fair between deltas and tenants."""

import asyncio
from collections.abc import Callable
from typing import TypeVar
from weakref import WeakValueDictionary

from deltadock.fair_threads import FairThreads
from deltadock.model_target import ModelTarget

Result = TypeVar("Result")


class RequestThreads:
    """Works on one request of a tenant and delta at a time.

    A tenant leaves a thread to others, and tenants that wait take turns.

    For one event loop.
    """

    def __init__(self, threads: int, name: str) -> None:
        self._threads = FairThreads(threads, threads - 1, name)
        self._queues: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
        """By queue key."""

    async def run(self, target: ModelTarget, work: Callable[[], Result]) -> Result:
        """The result of `work`. If its request is cancelled, its thread is taken until its end."""
        loop = asyncio.get_running_loop()
        lock = self._queues.setdefault(target.queue_key, asyncio.Lock())
        await lock.acquire()
        future = self._threads.submit(target.tenant, work)
        future.add_done_callback(lambda _: loop.call_soon_threadsafe(lock.release))
        return await asyncio.wrap_future(future)

    def close(self) -> None:
        """Shut the threads down, once none works. Blocks."""
        self._threads.shutdown()
