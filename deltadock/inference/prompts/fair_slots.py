"""Slots for work, taken in turn by tenant."""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from deltadock.fair_queue import FairQueue


class FairSlots:
    """So many at once, of which one tenant has at most `share`; tenants that wait take turns.

    For one event loop.
    """

    def __init__(self, slots: int, share: int) -> None:
        self._free, self._share = slots, share
        self._kept: Counter[str | None] = Counter()
        """Slots by tenant."""
        self._waiting: FairQueue[asyncio.Future[None]] = FairQueue()

    @asynccontextmanager
    async def slot(self, tenant: str | None) -> AsyncIterator[None]:
        """Keep a slot while the block runs."""
        turn = asyncio.get_running_loop().create_future()
        self._waiting.put(tenant, turn)
        self._give()
        try:
            await turn
            yield
        finally:
            if turn.cancelled():
                self._waiting.remove(tenant, turn)
            else:
                self._free += 1
                self._kept[tenant] -= 1
                self._kept += Counter()  # forgets who has none
                self._give()

    def _give(self) -> None:
        """Give free slots to those whose turn it is."""
        while self._free and (taken := self._waiting.take(self._may_have)) is not None:
            tenant, turn = taken
            self._free -= 1
            self._kept[tenant] += 1
            turn.set_result(None)

    def _may_have(self, tenant: str | None, turn: asyncio.Future[None]) -> bool:
        return self._kept[tenant] < self._share and not turn.cancelled()
