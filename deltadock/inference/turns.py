"""Which base a node has: one at a time, in turns."""

import asyncio
import gc
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import Final

from deltadock.artifacts.checkpoint import CheckpointManifest
from deltadock.errors import Unavailable
from deltadock.inference.base import ServedBase

MIN_TURN_SECONDS: Final = 1.0
LOADS_PER_TURN: Final = 2
"""A turn lasts this many times as long as the load before it, so that at most a third of the time
goes into loading."""
MAX_WAIT_SECONDS: Final = 60.0
"""How long a request waits for changes to other bases before its own, and again for the requests of
the base before; fetching and loading its own come on top."""
MAX_CLOSED_SECONDS: Final = 30.0
"""How long a base whose turn has ended takes no requests while its running ones finish."""

FetchedCheckpoint = tuple[Path, CheckpointManifest]


class _Change:
    """A change to a base, and how far it is; all events are set once it has ended."""

    task: asyncio.Task[None]

    def __init__(self) -> None:
        self.waiting = 0
        """Requests that wait for it; it is not made for none."""
        self.fetching = asyncio.Event()
        """The changes before it have ended."""
        self.fetched = asyncio.Event()
        """The checkpoint is on disk and verified."""
        self.loading = asyncio.Event()
        """The base before has no requests and takes no more."""


class BaseTurns:
    """The base that a node has, and the changes to others. Belongs to one event loop.

    One change is made at a time, in order of arrival. A base that others wait for takes requests
    until its turn ends and the next one is on disk; later requests queue, and so do those that wait
    for slots of deltas. Once the running ones are done, the next base replaces it, and all requests
    that wait for that one start. If they take too long, the base takes requests again, for as long
    as it took none.
    """

    def __init__(
        self,
        fetch: Callable[[str], AbstractContextManager[FetchedCheckpoint]],
        load: Callable[[str, FetchedCheckpoint], ServedBase],
    ) -> None:
        """`fetch` holds a checked checkpoint on disk, `load` reads it into memory; both block."""
        self.current: ServedBase | None = None
        self._fetch, self._load = fetch, load
        self._turn_ends = float("-inf")
        """In monotonic seconds."""
        self._open = asyncio.Event()
        """Whether the current base takes requests; cleared while its last ones finish."""
        self._open.set()
        self._changing = asyncio.Lock()  # wakes in order of arrival
        self._changes: dict[str, _Change] = {}

    async def enter(self, digest: str, name: str) -> ServedBase:
        """The base `digest`, kept until its `leave`; `name` is for the message.

        Raises:
            Unavailable: other bases took too long.
            DeltadockError: whatever fetching or loading the base raised.
        """
        while (base := self._taking(digest)) is None:
            await self._wait(digest, name)
        base.enter()
        return base

    def _taking(self, digest: str) -> ServedBase | None:
        base = self.current
        if base is None or base.digest != digest or not self._open.is_set():
            return None
        return base

    async def _wait(self, digest: str, name: str) -> None:
        if self.current is not None and self.current.digest == digest:
            await self._open.wait()
            return
        change = self._changes.get(digest)
        if change is None:
            change = self._changes[digest] = _Change()
            change.task = asyncio.create_task(self._change(digest, change))
            # Whoever asked may be gone when it fails.
            change.task.add_done_callback(lambda task: task.cancelled() or task.exception())
        change.waiting += 1
        try:
            async with asyncio.timeout(MAX_WAIT_SECONDS):
                await change.fetching.wait()
            await change.fetched.wait()
            async with asyncio.timeout(MAX_WAIT_SECONDS):
                await change.loading.wait()
        except TimeoutError:
            raise Unavailable(
                f"The base {name} is not loaded: other bases have kept the node busy for too long. "
                "Send the request again. An operator can start a node for each base: "
                "deltadock node --base FOLDER."
            ) from None
        finally:
            change.waiting -= 1
            if not change.waiting and change.fetched.is_set() and not change.loading.is_set():
                del self._changes[digest]
                change.task.cancel()
        await asyncio.shield(change.task)  # a cancelled request must not interrupt the load

    async def _change(self, digest: str, change: _Change) -> None:
        try:
            async with self._changing:
                if change.waiting:
                    await self._make(digest, change)
        finally:
            if self._changes.get(digest) is change:
                del self._changes[digest]
            for event in (change.fetching, change.fetched, change.loading):
                event.set()

    async def _make(self, digest: str, change: _Change) -> None:
        with ExitStack() as held:
            # On disk and checked before the current base takes no more requests.
            change.fetching.set()
            fetched = await asyncio.to_thread(held.enter_context, self._fetch(digest))
            if not change.waiting:
                return
            change.fetched.set()
            base = await self._remove_current()
            change.loading.set()
            if base is not None:
                await asyncio.to_thread(base.close)
            del base
            # Its parts reference each other, and memory may not hold two bases.
            await asyncio.to_thread(gc.collect)
            begun_at = time.monotonic()
            self.current = await asyncio.to_thread(self._load, digest, fetched)
            now = time.monotonic()
            self._turn_ends = now + max(LOADS_PER_TURN * (now - begun_at), MIN_TURN_SECONDS)

    async def _remove_current(self) -> ServedBase | None:
        """The current base, which is none any more, once its turn has ended and it is idle."""
        while (base := self.current) is not None:
            await asyncio.sleep(self._turn_ends - time.monotonic())
            closed_at = time.monotonic()
            self._open.clear()
            base.deltas.slots.close()  # a queue for slots could be longer than the wait
            try:
                async with asyncio.timeout(MAX_CLOSED_SECONDS):
                    while base.users:
                        await base.idle.wait()
            except TimeoutError:
                continue
            else:
                self.current = None
                return base
            finally:
                # If it stays, it has another turn, as long as it took no requests.
                now = time.monotonic()
                self._turn_ends = now + (now - closed_at)
                base.deltas.slots.open()
                self._open.set()
        return None

    async def close(self) -> None:
        """Stop the engine; running requests are cancelled, and changes that wait are not made."""
        tasks = [change.task for change in self._changes.values()]
        for change in self._changes.values():
            if not change.loading.is_set():
                change.task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if self.current is not None:
            self.current.stop_merging()
            await asyncio.to_thread(self.current.close)
