"""Slots for work, taken in turn by tenant."""

import asyncio
from collections import Counter, OrderedDict, deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager


class FairSlots:
    """So many at once, of which one tenant has at most `share`; tenants that wait take turns.

    For one event loop.
    """

    def __init__(self, slots: int, share: int) -> None:
        self._free, self._share = slots, share
        self._kept: Counter[str | None] = Counter()
        """Slots by tenant."""
        self._waiting: OrderedDict[str | None, deque[asyncio.Future[None]]] = OrderedDict()
        """By tenant, in the order of their turns."""

    @asynccontextmanager
    async def slot(self, tenant: str | None) -> AsyncIterator[None]:
        """Keep a slot while the block runs."""
        await self.take(tenant)
        try:
            yield
        finally:
            self.release(tenant)

    async def take(self, tenant: str | None) -> None:
        """Keep a slot until `release`."""
        if self._free and self._kept[tenant] < self._share:
            self._keep(tenant)
        else:
            await self._turn(tenant)

    def _keep(self, tenant: str | None) -> None:
        self._free -= 1
        self._kept[tenant] += 1

    async def _turn(self, tenant: str | None) -> None:
        """Wait until a slot is passed on to this request."""
        turn = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(tenant, deque()).append(turn)
        try:
            await turn
        except asyncio.CancelledError:
            if not turn.cancelled():  # it had its turn just before
                self.release(tenant)
            elif turn in (turns := self._waiting.get(tenant, deque())):
                turns.remove(turn)
            raise

    def release(self, tenant: str | None) -> None:
        """Give a tenant's slot to the first that still waits of the next that may have one."""
        self._free += 1
        self._kept[tenant] -= 1
        if not self._kept[tenant]:
            del self._kept[tenant]
        for waiting in [one for one in self._waiting if self._kept[one] < self._share]:
            turns = self._waiting.pop(waiting)
            while turns:
                turn = turns.popleft()
                if turn.done():  # it gave up, which is no turn of its tenant's
                    continue
                if turns:
                    self._waiting[waiting] = turns
                self._keep(waiting)
                turn.set_result(None)
                return
