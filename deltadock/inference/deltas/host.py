"""The host tier: deltas in memory, ready to be placed in a slot, under a byte limit."""

import asyncio
from collections import OrderedDict
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from deltadock.inference.deltas.counts import TierCounts


class Sized(Protocol):
    """What the tier asks of a delta."""

    @property
    def nbytes(self) -> int:
        """Bytes of memory."""


Delta = TypeVar("Delta", bound=Sized)


@dataclass(slots=True)
class _Entry(Generic[Delta]):
    delta: Delta
    users: int = 0


class HostTier(Generic[Delta]):
    """Deltas by digest, the least recently used first to go. Belongs to one event loop.

    What lies idle never brings the tier over its limit; what is in use may, while it is.
    """

    def __init__(self, limit: int, load: Callable[[str], Awaitable[Delta]]) -> None:
        self._limit = limit
        self._load = load
        self._entries: OrderedDict[str, _Entry[Delta]] = OrderedDict()
        self._loading: dict[str, asyncio.Task[_Entry[Delta]]] = {}
        self.counts = TierCounts()

    @property
    def bytes(self) -> int:
        """Bytes of the deltas in the tier."""
        return sum(entry.delta.nbytes for entry in self._entries.values())

    def held(self) -> Mapping[str, int]:
        """Bytes of each delta, by digest; least recently used first."""
        return {digest: entry.delta.nbytes for digest, entry in self._entries.items()}

    @asynccontextmanager
    async def hold(self, digest: str) -> AsyncIterator[Delta]:
        """A delta, loaded first where needed, that stays while the block runs.

        Raises whatever loading it raised; nothing is kept then. The load goes on when whoever
        waits for it gives up.
        """
        entry = self._entries.get(digest)
        if entry is None:
            self.counts.misses += 1
            loaded = await asyncio.shield(self._bring_in(digest))
            entry = self._entries.setdefault(digest, loaded)
        else:
            self.counts.hits += 1
        self._entries.move_to_end(digest)
        entry.users += 1
        try:
            yield entry.delta
        finally:
            entry.users -= 1
            self._trim()

    async def prefetch(self, digest: str) -> None:
        """Bring a delta in, for whoever wants it next; raises what loading it raised."""
        async with self.hold(digest):
            pass

    def drop(self, digest: str) -> bool:
        """Let go of a delta that nobody uses; whether it is gone."""
        entry = self._entries.get(digest)
        if entry is not None and entry.users == 0:
            del self._entries[digest]
        return digest not in self._entries

    def _bring_in(self, digest: str) -> "asyncio.Task[_Entry[Delta]]":
        if digest not in self._loading:
            self._loading[digest] = asyncio.create_task(self._read(digest))
        return self._loading[digest]

    async def _read(self, digest: str) -> _Entry[Delta]:
        try:
            entry = self._entries[digest] = _Entry(await self._load(digest))
        finally:
            del self._loading[digest]
        self._trim()
        return entry

    def _trim(self) -> None:
        """Let idle deltas go while the tier is over its limit."""
        for digest in [digest for digest, entry in self._entries.items() if entry.users == 0]:
            if self.bytes <= self._limit:
                return
            del self._entries[digest]
            self.counts.evictions += 1
