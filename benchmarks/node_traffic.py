"""Time to the first token when many deltas are asked for by Zipf's law."""

import asyncio
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import torch

from benchmarks.node_bench import Bench
from deltadock.inference.deltas.reading import place_delta
from deltadock.inference.deltas.slots import SlotManager


class _Traffic:
    """Requests for named deltas, all with the same bytes, on the node's own slots."""

    def __init__(self, bench: Bench) -> None:
        self._bench = bench
        self._placer = ThreadPoolExecutor(1)
        self._slots = SlotManager[None](bench.scale.room, fill=self._fill, clear=self._clear)
        self.loads = 0
        self.waits: list[float] = []
        """Seconds from a request's arrival to its first token."""

    async def _fill(self, slot: int, _: str) -> None:
        self.loads += 1
        await self._clear(slot)
        await self._beside(partial(place_delta, self._bench.model, slot, self._bench.host))

    async def _clear(self, slot: int) -> None:
        await self._beside(partial(self._bench.model.remove, slot))

    async def _beside(self, work: partial[None]) -> None:
        await asyncio.get_running_loop().run_in_executor(self._placer, work)

    async def ask(self, name: str) -> None:
        """One request, from its arrival to its end."""
        began = time.monotonic()
        slot, _ = await self._slots.acquire(name)
        ended = asyncio.Event()
        tell = partial(asyncio.get_running_loop().call_soon_threadsafe, ended.set)
        request = self._bench.request(slot, name, self._bench.scale.answer, ended=tell)
        request.send(self._bench.engine)
        await ended.wait()
        self._slots.release(name)
        request.wait()
        self.waits.append(request.first - began)


async def first_tokens(bench: Bench, rate: float) -> None:
    """Send `rate` requests a second, by chance, and print how long their first tokens took."""
    scale, traffic = bench.scale, _Traffic(bench)
    for slot in range(1, max(scale.held) + 1):
        bench.model.remove(slot)
    generator = torch.Generator().manual_seed(0)
    shares = 1 / torch.arange(1, scale.names + 1)
    names = torch.multinomial(shares, scale.arrivals, replacement=True, generator=generator)
    gaps = torch.empty(scale.arrivals).exponential_(rate, generator=generator)
    asking = []
    for name, gap in zip(names.tolist(), gaps.tolist(), strict=True):
        await asyncio.sleep(gap)
        asking.append(asyncio.create_task(traffic.ask(f"delta {name}")))
    await asyncio.gather(*asking)
    found = 1 - traffic.loads / scale.arrivals
    print(f"Zipf over {scale.names} deltas, room for {scale.room}, {rate:.1f} requests/s")
    print(f"found in a slot: {found:.0%}")
    waits = sorted(traffic.waits)
    for share in (0.5, 0.99):
        print(f"first token, p{share * 100:g}: {waits[int(share * len(waits))] * 1e3:.0f} ms")
