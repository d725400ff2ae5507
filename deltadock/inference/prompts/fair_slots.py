"""Slots for work, taken in turn by tenant."""

import asyncio
from collections import OrderedDict, deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager


class FairSlots:
    """So many at once; of those who wait, each tenant's first comes in turn. For one event loop."""

    def __init__(self, slots: int) -> None:
        self._free = slots
        self._waiting: OrderedDict[str | None, deque[asyncio.Future[None]]] = OrderedDict()
        """By tenant, in the order of their turns."""

    @asynccontextmanager
    async def slot(self, tenant: str | None) -> AsyncIterator[None]:
        """Keep a slot while the block runs."""
        await self.take(tenant)
        try:
            yield
        finally:
            self.release()

    async def take(self, tenant: str | None) -> None:
        """Keep a slot until `release`."""
        if self._free:
            self._free -= 1
        else:
            await self._turn(tenant)

    async def _turn(self, tenant: str | None) -> None:
        """Wait until a slot is passed on to this request."""
        turn = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(tenant, deque()).append(turn)
        try:
            await turn
        except asyncio.CancelledError:
            if not turn.cancelled():  # it had its turn just before
                self.release()
            elif turn in (turns := self._waiting.get(tenant, deque())):
                turns.remove(turn)
            raise

    def release(self) -> None:
        """Give a slot to the next tenant's first request that still waits."""
        while self._waiting:
            tenant, turns = self._waiting.popitem(last=False)
            while turns:
                turn = turns.popleft()
                if turn.done():  # it gave up, which is no turn of its tenant's
                    continue
                if turns:
                    self._waiting[tenant] = turns
                turn.set_result(None)
                return
        self._free += 1
