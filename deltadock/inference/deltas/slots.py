"""The device tier: deltas in slots, with reference counts, pins and LRU eviction."""

import asyncio
import math
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Final, Generic, NamedTuple, TypeVar

from deltadock.errors import Conflict, Unavailable
from deltadock.fair_queue import FairQueue
from deltadock.inference.deltas.tiers import LruTier
from deltadock.words import counted

Delta = TypeVar("Delta")

MAX_WAIT_SECONDS: Final = 60.0
"""How long a request waits for a slot."""


class SlotsClosed(Unavailable):
    """A request waits for a slot, and its base for the running ones to end: another is wanted."""

    def __init__(self) -> None:
        super().__init__("The node changes its base. Send the request again.")


@dataclass(eq=False, slots=True)
class Resident(Generic[Delta]):
    """A delta in a slot, or being loaded into one or removed; both hold a reference."""

    digest: str
    slot: int
    loading: "asyncio.Task[Delta]" = field(init=False)
    users: int = 1
    tenants: Counter[str | None] = field(default_factory=Counter)
    """Of the users, the requests, by tenant."""
    pinned: bool = False
    leaving: bool = False
    """Loading failed, or it was dropped: the slot is freed with the last reference."""


class _Waiter(NamedTuple, Generic[Delta]):
    """A request that waits for a delta."""

    digest: str
    given: "asyncio.Future[Resident[Delta]]"


class SlotManager(LruTier[Resident[Delta]]):
    """Deltas by artifact digest in slots 1 to `limit`. Belongs to one event loop.

    An acquired delta stays in its slot until `release`. `fill` loads a delta into a slot, replacing
    its contents, and `clear` empties a slot; both run outside the loop, on slots that no running
    sequence uses.

    Of the requests that wait for a slot, each tenant's first comes in turn, and with it all of this
    tenant for the same delta. Those for deltas that are in slots wait only while their tenant has
    more than its share of the slots and one with less waits: running answers then end and free one.
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
        self._waiting: FairQueue[_Waiter[Delta]] = FairQueue()
        self._is_closed = False

    @property
    def residents(self) -> Mapping[str, Resident[Delta]]:
        """The deltas in slots or being loaded, by digest; least recently used first."""
        return self._entries

    @property
    def full(self) -> bool:
        """Whether acquiring another delta has to wait for a slot."""
        return bool(self._waiting) or not self._has_room()

    def _has_room(self) -> bool:
        return bool(self._free) or any(map(self._evictable, self._entries.values()))

    async def acquire(self, digest: str, tenant: str | None = None) -> tuple[int, Delta]:
        """The slot of a delta and the delta, loaded if needed; waits for a free slot.

        Raises whatever loading raised; nothing is kept then.

        Raises:
            Unavailable: all slots were in use for too long.
            SlotsClosed: it would wait while the slots are closed.
        """
        waiter = _Waiter[Delta](digest, asyncio.get_running_loop().create_future())
        self._waiting.put(tenant, waiter)
        self._give()
        try:
            if not waiter.given.done() and self._is_closed:
                raise SlotsClosed
            if not waiter.given.done():
                await asyncio.wait({waiter.given}, timeout=MAX_WAIT_SECONDS)
            if not waiter.given.done():
                raise Unavailable(
                    f"All {self._limit} slots are in use by requests to other deltas, or wanted by "
                    "tenants that have fewer. Send the request again. An operator can raise "
                    "DELTADOCK_NODE_MAX_DELTAS."
                )
            resident = waiter.given.result()
            return resident.slot, await asyncio.shield(resident.loading)
        except BaseException:
            if not waiter.given.done():
                self._waiting.remove(tenant, waiter)
                self._give()  # to those that waited for it
            elif waiter.given.exception() is None:
                self.release(digest, tenant)
            raise

    def close(self) -> None:
        """Send those that wait away, and who would have to wait, until `open`."""
        self._is_closed = True
        while (taken := self._waiting.take(lambda *_: True)) is not None:
            taken[1].given.set_exception(SlotsClosed())

    def open(self) -> None:
        """Let requests wait again."""
        self._is_closed = False

    def _give(self) -> None:
        """Give waiting requests their deltas, until none can have its."""
        held, share = self._shares()
        given: set[tuple[str | None, str]] = set()

        def can_have(tenant: str | None, waiter: _Waiter[Delta]) -> bool:
            resident = self._entries.get(waiter.digest)
            if not (self._has_room() if resident is None else not resident.leaving):
                return False
            if (tenant, waiter.digest) in given or (resident is not None and resident.pinned):
                return True
            takes_slot = resident is None or tenant not in resident.tenants
            return held[tenant] + takes_slot <= max(share, takes_slot)

        while (taken := self._waiting.take(can_have)) is not None:
            tenant, waiter = taken
            resident = self._find_or_load(waiter.digest)
            resident.tenants[tenant] += 1
            waiter.given.set_result(resident)
            given.add((tenant, waiter.digest))
            held, share = self._shares()

    def _shares(self) -> tuple[Counter[str | None], float]:
        """The slots in use by tenant, and how many one may have.

        That is any number, unless a tenant with less than its share of them waits for one. With
        more tenants than slots the share is none: who has one leaves it to those that do not.
        """
        unpinned = [one for one in self._entries.values() if not one.pinned]
        held = Counter(tenant for one in unpinned for tenant in one.tenants)
        waiting = {tenant for tenant, one in self._waiting if one.digest not in self._entries}
        if waiting:
            slots = self._limit - len(self._entries) + len(unpinned)
            share = slots // len(waiting | held.keys())
            if any(held[tenant] < max(share, 1) for tenant in waiting):
                return held, share
        return held, math.inf

    def release(self, digest: str, tenant: str | None = None) -> None:
        """Undo one `acquire`; the delta stays until its slot is needed."""
        resident = self._entries[digest]
        resident.tenants[tenant] -= 1
        resident.tenants += Counter()  # forgets who has none
        self._drop_reference(resident)

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
            self._give()

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

    def _find_or_load(self, digest: str) -> Resident[Delta]:
        """The delta's slot with one more user."""
        if digest in self._entries:
            self.counts.hits += 1
        else:
            self.counts.misses += 1
            self._evict(lambda: bool(self._free))
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
        if resident.users == 0 and resident.leaving:
            self._remove(resident.digest)
        self._give()

    def _evictable(self, entry: Resident[Delta]) -> bool:
        return entry.users == 0 and not entry.pinned

    def _remove(self, digest: str) -> None:
        self._free.append(self._entries.pop(digest).slot)
