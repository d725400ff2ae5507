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
"""How long a request waits for those of other bases; fetching and loading its own come on top."""

FetchedCheckpoint = tuple[Path, CheckpointManifest]


class _Change:
    """A change to a base, and how far it is."""

    task: asyncio.Task[None]

    def __init__(self) -> None:
        self.fetched = asyncio.Event()
        """The checkpoint is on disk and verified, or the change has failed."""
        self.begun = asyncio.Event()
        """The base before is idle, or the change has failed."""


class BaseTurns:
    """The base that a node has, and the changes to others. Belongs to one event loop.

    A base that others wait for takes requests until its turn ends; later ones queue behind those
    that wait. Once the running ones are done, the next base in order of arrival replaces it, and
    all requests that wait for that one start.
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
        self._closing = False
        """Whether the turn has ended, and new requests queue."""
        self._changing = asyncio.Lock()  # wakes in order of arrival
        self._changes: dict[str, _Change] = {}

    async def enter(self, digest: str, name: str) -> ServedBase:
        """The base `digest`, kept until its `leave`; `name` is for the message.

        Raises:
            Unavailable: other bases' requests took too long. The change is still made, so that the
                request can be repeated.
            DeltadockError: whatever fetching or loading the base raised.
        """
        while (base := self._open(digest)) is None:
            await self._wait(digest, name)
        base.enter()
        return base

    def _open(self, digest: str) -> ServedBase | None:
        base = self.current
        if base is None or base.digest != digest or self._closing:
            return None
        return base

    async def _wait(self, digest: str, name: str) -> None:
        change = self._changes.get(digest)
        if change is None:
            change = self._changes[digest] = _Change()
            change.task = asyncio.create_task(self._change(digest, change))
            # Whoever asked may be gone when it fails.
            change.task.add_done_callback(lambda task: task.cancelled() or task.exception())
        await change.fetched.wait()
        try:
            async with asyncio.timeout(MAX_WAIT_SECONDS):
                await change.begun.wait()
        except TimeoutError:
            raise Unavailable(
                f"The base {name} is not loaded yet: the node still answers requests for another "
                "base, and changes to it when these are done. Send the request again. An operator "
                "can start a node for each base: deltadock node --base FOLDER."
            ) from None
        await asyncio.shield(change.task)  # a cancelled request must not interrupt the change

    async def _change(self, digest: str, change: _Change) -> None:
        try:
            with ExitStack() as held:
                # On disk and checked before the current base takes no more requests.
                fetched = await asyncio.to_thread(held.enter_context, self._fetch(digest))
                change.fetched.set()
                async with self._changing:
                    await self._free_current()
                    change.begun.set()
                    begun_at = time.monotonic()
                    self.current = await asyncio.to_thread(self._load, digest, fetched)
                    now = time.monotonic()
                    turn = max(LOADS_PER_TURN * (now - begun_at), MIN_TURN_SECONDS)
                    self._turn_ends = now + turn
        finally:
            del self._changes[digest]
            change.fetched.set()
            change.begun.set()

    async def _free_current(self) -> None:
        base = self.current
        if base is None:
            return
        await asyncio.sleep(self._turn_ends - time.monotonic())
        self._closing = True
        while base.users:
            await base.idle.wait()
        self.current, self._closing = None, False
        await asyncio.to_thread(base.close)
        del base
        # Its parts reference each other, and memory may not hold two bases.
        await asyncio.to_thread(gc.collect)

    async def close(self) -> None:
        """Stop the engine; running requests are cancelled, and changes that wait are not made."""
        tasks = [change.task for change in self._changes.values()]
        for change in self._changes.values():
            if not change.begun.is_set():
                change.task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if self.current is not None:
            self.current.stop_merging()
            await asyncio.to_thread(self.current.close)
