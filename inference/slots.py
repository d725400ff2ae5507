"""Which delta is in which slot: reference counts, eviction, loads beside work."""

import asyncio
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Final, Generic, TypeVar

LOADS_AT_ONCE: Final = 2

Delta = TypeVar("Delta")


@dataclass(eq=False, slots=True)
class Resident(Generic[Delta]):
    """A delta that is in a slot, or on its way there; its load holds a reference of its own."""

    digest: str
    slot: int
    loading: "asyncio.Task[Delta]" = field(init=False)
    references: int = 1
    failed: bool = False


class SlotManager(Generic[Delta]):
    """Deltas by artifact digest in slots 1 to `limit`. Belongs to one event loop.

    A slot in use is never given away; whoever acquired a delta keeps it until its `release`.
    `load` runs in a thread; `install` and `remove` are quick, and act on slots that no running
    sequence is on.
    """

    def __init__(
        self,
        limit: int,
        *,
        load: Callable[[str], Delta],
        install: Callable[[int, Delta], None],
        remove: Callable[[int], None],
    ) -> None:
        self._load = load
        # Not asyncio's shared threads: a slow blob store must not hold up tokenising prompts.
        self._loaders = ThreadPoolExecutor(LOADS_AT_ONCE, "load-delta")
        self._install = install
        self._remove = remove
        self._free = list(range(limit, 0, -1))
        self._residents: OrderedDict[str, Resident[Delta]] = OrderedDict()
        self._changed = asyncio.Event()
        self.evictions = 0

    @property
    def digests(self) -> list[str]:
        """The deltas in memory or on their way there, least recently used first."""
        return list(self._residents)

    async def acquire(self, digest: str) -> tuple[int, Delta]:
        """The slot of a delta and the delta, loaded first where needed; waits for a slot.

        Raises whatever loading it raised; nothing is kept then.
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

    def close(self) -> None:
        """Let the loader threads go; nothing may be loading."""
        self._loaders.shutdown(wait=False)

    def _resident(self, digest: str) -> Resident[Delta] | None:
        resident = self._residents.get(digest)
        if resident is None and self._make_room():
            resident = Resident(digest, self._free.pop())
            resident.loading = asyncio.create_task(self._bring_in(resident))
            self._residents[digest] = resident
        if resident is not None:
            self._residents.move_to_end(digest)
        return resident

    async def _bring_in(self, resident: Resident[Delta]) -> Delta:
        try:
            loop = asyncio.get_running_loop()
            delta = await loop.run_in_executor(self._loaders, self._load, resident.digest)
            self._install(resident.slot, delta)
        except BaseException:
            resident.failed = True
            self._remove(resident.slot)
            raise
        else:
            return delta
        finally:
            self._drop_reference(resident)

    def _drop_reference(self, resident: Resident[Delta]) -> None:
        resident.references -= 1
        if resident.references == 0:
            if resident.failed:
                self._vacate(resident)
            self._changed.set()

    def _make_room(self) -> bool:
        """Whether a slot is free now; evicts the least recently used idle delta if need be."""
        if not self._free:
            idle = (found for found in self._residents.values() if found.references == 0)
            if (resident := next(idle, None)) is not None:
                self._remove(resident.slot)
                self._vacate(resident)
                self.evictions += 1
        return bool(self._free)

    def _vacate(self, resident: Resident[Delta]) -> None:
        del self._residents[resident.digest]
        self._free.append(resident.slot)
