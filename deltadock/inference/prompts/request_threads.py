"""Threads for blocking work on requests, fair between deltas and tenants."""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar
from weakref import WeakValueDictionary

from deltadock.inference.prompts.fair_slots import FairSlots
from deltadock.model_target import ModelTarget

Result = TypeVar("Result")


class RequestThreads:
    """Works on one request of a tenant and delta at a time.

    A tenant leaves a thread to others, and tenants that wait take turns.

    For one event loop.
    """

    def __init__(self, threads: int, name: str) -> None:
        self._threads = ThreadPoolExecutor(threads, thread_name_prefix=name)
        self._slots = FairSlots(threads, threads - 1)
        self._queues: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
        """By queue key."""

    async def run(self, target: ModelTarget, work: Callable[[], Result]) -> Result:
        """The result of `work`. If its request is cancelled, its thread is taken until its end."""
        lock = self._queues.setdefault(target.queue_key, asyncio.Lock())
        await lock.acquire()
        try:
            await self._slots.take(target.tenant)
        except BaseException:
            lock.release()
            raise
        running = asyncio.get_running_loop().run_in_executor(self._threads, work)

        def end(_: object) -> None:
            self._slots.release(target.tenant)
            lock.release()

        running.add_done_callback(end)
        return await asyncio.shield(running)

    def close(self) -> None:
        """Shut the threads down, once none works. Blocks."""
        self._threads.shutdown()
