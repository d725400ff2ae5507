"""The device tier: which delta is in which slot; reference counts, pins, eviction."""

import asyncio
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from deltadock.errors import Conflict
from deltadock.inference.deltas.counts import TierCounts

Delta = TypeVar("Delta")


@dataclass(eq=False, slots=True)
class Resident(Generic[Delta]):
    """A delta that is in a slot, or on its way there or away; either holds a reference."""

    digest: str
    slot: int
    loading: "asyncio.Task[Delta]" = field(init=False)
    references: int = 1
    pinned: bool = False
    leaving: bool = False
    """It failed, or was dropped: the slot is free once nobody holds it any more."""


class SlotManager(Generic[Delta]):
    """Deltas by artifact digest in slots 1 to `limit`. Belongs to one event loop.

    A slot in use is never given away; whoever acquired a delta keeps it until its `release`.
    `fill` puts a delta into a slot, whatever is in it, and `clear` empties one; both work beside
    the loop, and on slots that no running sequence is on.
    """

    def __init__(
        self,
        limit: int,
        *,
        fill: Callable[[int, str], Awaitable[Delta]],
        clear: Callable[[int], Awaitable[None]],
    ) -> None:
        self._limit = limit
        self._fill = fill
        self._clear = clear
        self._free = list(range(limit, 0, -1))
        self._residents: OrderedDict[str, Resident[Delta]] = OrderedDict()
        self._changed = asyncio.Event()
        self.counts = TierCounts()

    @property
    def digests(self) -> list[str]:
        """The deltas in slots or on their way there, least recently used first."""
        return list(self._residents)

    @property
    def residents(self) -> Mapping[str, Resident[Delta]]:
        """The same with their slots, references and pins."""
        return self._residents

    @property
    def full(self) -> bool:
        """Whether whoever wants another delta now has to wait."""
        return not self._free and all(found.references for found in self._evictable())

    async def acquire(self, digest: str) -> tuple[int, Delta]:
        """The slot of a delta and the delta, filled first where needed; waits for a slot.

        Raises whatever filling it raised; nothing is kept then.
        """
        while (resident := self._resident(digest)) is None:
            self._changed.clear()
            await self._changed.wait()
        resident.references += 1
        try:
            return resident.slot, await asyncio.shield(resident.loading)
        except BaseException:
            self._drop_reference(resident)
            raise

    def release(self, digest: str) -> None:
        """Give back what `acquire` gave; the delta stays until its slot is needed."""
        self._drop_reference(self._residents[digest])

    def pin(self, digest: str) -> None:
        """Keep a delta that is in a slot there until `unpin`.

        Raises:
            Conflict: no slot would be left for the others.
        """
        pinned = sum(resident.pinned for resident in self._residents.values())
        resident = self._residents[digest]
        if not resident.pinned and pinned + 1 >= self._limit:
            raise Conflict(
                f"{pinned} of {self._limit} slots are pinned, and one must stay free. Unpin a "
                "delta first."
            )
        resident.pinned = True

    def unpin(self, digest: str) -> None:
        """Let a delta leave its slot again when that is needed; it need not be in one."""
        if digest in self._residents:
            self._residents[digest].pinned = False
            self._changed.set()

    async def drop(self, digest: str) -> None:
        """Empty a delta's slot, if it has one.

        Raises:
            Conflict: it is pinned or in use.
        """
        resident = self._residents.get(digest)
        if resident is None:
            return
        if resident.pinned or resident.references:
            why = "pinned" if resident.pinned else f"used by {resident.references} requests"
            raise Conflict(f"The delta {digest} is {why}.")
        resident.references += 1
        resident.leaving = True
        try:
            await self._clear(resident.slot)
        finally:
            self._drop_reference(resident)

    def _resident(self, digest: str) -> Resident[Delta] | None:
        resident = self._residents.get(digest)
        if resident is not None and resident.leaving:
            return None
        if resident is not None:
            self.counts.hits += 1
        elif self._make_room():
            self.counts.misses += 1
            resident = Resident(digest, self._free.pop())
            resident.loading = asyncio.create_task(self._bring_in(resident))
            self._residents[digest] = resident
        if resident is not None:
            self._residents.move_to_end(digest)
        return resident

    async def _bring_in(self, resident: Resident[Delta]) -> Delta:
        try:
            return await self._fill(resident.slot, resident.digest)
        except BaseException:
            resident.leaving = True
            await self._clear(resident.slot)
            raise
        finally:
            self._drop_reference(resident)

    def _drop_reference(self, resident: Resident[Delta]) -> None:
        resident.references -= 1
        if resident.references == 0:
            if resident.leaving:
                self._vacate(resident)
            self._changed.set()

    def _evictable(self) -> list[Resident[Delta]]:
        return [found for found in self._residents.values() if not found.pinned]

    def _make_room(self) -> bool:
        """Whether a slot is free now; evicts the least recently used idle delta if need be."""
        if not self._free:
            idle = (found for found in self._evictable() if found.references == 0)
            if (resident := next(idle, None)) is not None:
                self._vacate(resident)
                self.counts.evictions += 1
        return bool(self._free)

    def _vacate(self, resident: Resident[Delta]) -> None:
        del self._residents[resident.digest]
        self._free.append(resident.slot)
