"""The device tier: deltas in slots, with reference counts, pins and LRU eviction."""

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from deltadock.errors import Conflict
from deltadock.inference.deltas.tiers import LruTier
from deltadock.words import counted

Delta = TypeVar("Delta")


@dataclass(eq=False, slots=True)
class Resident(Generic[Delta]):
    """A delta in a slot, or being loaded into one or removed; both hold a reference."""

    digest: str
    slot: int
    loading: "asyncio.Task[Delta]" = field(init=False)
    users: int = 1
    pinned: bool = False
    leaving: bool = False
    """Loading failed, or it was dropped: the slot is freed with the last reference."""


class SlotManager(LruTier[Resident[Delta]]):
    """Deltas by artifact digest in slots 1 to `limit`. Belongs to one event loop.

    An acquired delta stays in its slot until `release`. `fill` loads a delta into a slot, replacing
    its contents, and `clear` empties a slot; both run outside the loop, on slots that no running
    sequence uses.
    """

    def __init__(
        self,
        limit: int,
        *,
        fill: Callable[[int, str], Awaitable[Delta]],
        clear: Callable[[int], Awaitable[None]],
    ) -> None:
        super().__init__()
        self._limit = limit
        self._fill = fill
        self._clear = clear
        self._free = list(range(limit, 0, -1))
        self._changed = asyncio.Event()

    @property
    def residents(self) -> Mapping[str, Resident[Delta]]:
        """The deltas in slots or being loaded, by digest; least recently used first."""
        return self._entries

    @property
    def full(self) -> bool:
        """Whether acquiring another delta has to wait for a slot."""
        return not self._free and not any(map(self._evictable, self._entries.values()))

    async def acquire(self, digest: str) -> tuple[int, Delta]:
        """The slot of a delta and the delta, loaded if needed; waits for a free slot.

        Raises whatever loading raised; nothing is kept then.
        """
        while (resident := self._find_or_load(digest)) is None:
            self._changed.clear()
            await self._changed.wait()
        try:
            return resident.slot, await asyncio.shield(resident.loading)
        except BaseException:
            self._drop_reference(resident)
            raise

    def release(self, digest: str) -> None:
        """Undo one `acquire`; the delta stays until its slot is needed."""
        self._drop_reference(self._entries[digest])

    def pin(self, digest: str) -> None:
        """Keep a delta in its slot until `unpin`.

        Raises:
            Conflict: no slot would be left for other deltas.
        """
        pinned = sum(resident.pinned for resident in self._entries.values())
        resident = self._entries[digest]
        if not resident.pinned and pinned + 1 >= self._limit:
            raise Conflict(
                f"{pinned} of {self._limit} slots are pinned, and one must stay free. Unpin a "
                "delta first."
            )
        resident.pinned = True

    def unpin(self, digest: str) -> None:
        """Make a delta evictable again; no effect if it is not in a slot."""
        if digest in self._entries:
            self._entries[digest].pinned = False
            self._changed.set()

    async def unload(self, digest: str) -> None:
        """Empty a delta's slot, if it has one.

        Raises:
            Conflict: it is pinned or in use.
        """
        resident = self._entries.get(digest)
        if resident is None:
            return
        if resident.pinned or resident.users:
            why = "pinned" if resident.pinned else f"used by {counted(resident.users, 'request')}"
            raise Conflict(f"The delta {digest} is {why}.")
        resident.users += 1
        resident.leaving = True
        try:
            await self._clear(resident.slot)
        finally:
            self._drop_reference(resident)

    def _find_or_load(self, digest: str) -> Resident[Delta] | None:
        """The delta's slot with one more user, or None while there is none."""
        resident = self._entries.get(digest)
        if resident is not None and resident.leaving:
            return None
        if resident is not None:
            self.counts.hits += 1
        else:
            self._evict(lambda: bool(self._free))
            if not self._free:
                return None
            self.counts.misses += 1
            resident = self._entries[digest] = Resident(digest, self._free.pop())
            resident.loading = asyncio.create_task(self._load(resident))
        return self._use(digest)

    async def _load(self, resident: Resident[Delta]) -> Delta:
        try:
            return await self._fill(resident.slot, resident.digest)
        except BaseException:
            resident.leaving = True
            await self._clear(resident.slot)
            raise
        finally:
            self._drop_reference(resident)

    def _drop_reference(self, resident: Resident[Delta]) -> None:
        resident.users -= 1
        if resident.users == 0:
            if resident.leaving:
                self._remove(resident.digest)
            self._changed.set()

    def _evictable(self, entry: Resident[Delta]) -> bool:
        return entry.users == 0 and not entry.pinned

    def _remove(self, digest: str) -> None:
        self._free.append(self._entries.pop(digest).slot)
