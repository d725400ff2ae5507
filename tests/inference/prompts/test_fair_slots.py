"""Slots that tenants take in turn."""

import asyncio
from contextlib import suppress

from deltadock.inference.prompts.fair_slots import FairSlots


class Work:
    """Requests that take slots; they keep them until they are let go, one after the other."""

    def __init__(self, slots: int) -> None:
        self.slots = FairSlots(slots, max(slots - 1, 1))
        self.begun: list[str] = []
        self.go_on = asyncio.Semaphore(0)

    async def do(self, name: str) -> None:
        async with self.slots.slot(name[0]):
            self.begun.append(name)
            await self.go_on.acquire()

    async def ask(self, *names: str) -> list[asyncio.Task[None]]:
        tasks = [asyncio.create_task(self.do(name)) for name in names]
        await self.settle()
        return tasks

    async def settle(self) -> None:
        for _ in range(20):
            await asyncio.sleep(0)


def test_tenants_take_turns() -> None:
    async def run() -> list[str]:
        work = Work(3)
        tasks = await work.ask("a1", "a2", "a3", "a4", "a5", "b1", "c1", "b2")
        assert work.begun == ["a1", "a2", "b1"]
        for _ in tasks:
            work.go_on.release()
            await work.settle()
        await asyncio.gather(*tasks)
        return work.begun

    assert asyncio.run(run()) == ["a1", "a2", "b1", "a3", "c1", "b2", "a4", "a5"]


def test_a_tenant_leaves_a_slot_to_others() -> None:
    async def run() -> list[str]:
        work = Work(3)
        tasks = await work.ask("a1", "a2", "a3", "a4")
        assert work.begun == ["a1", "a2"]
        tasks += await work.ask("b1", "b2")
        assert work.begun == ["a1", "a2", "b1"]
        for _ in tasks:
            work.go_on.release()
            await work.settle()
        await asyncio.gather(*tasks)
        return work.begun

    assert asyncio.run(run()) == ["a1", "a2", "b1", "a3", "b2", "a4"]


def test_who_gives_up_takes_no_slot() -> None:
    async def run() -> None:
        work = Work(1)
        running, waiting, late, last = await work.ask("a1", "b1", "b2", "c1")
        waiting.cancel()
        await work.settle()
        work.go_on.release()
        await running
        late.cancel()  # at the moment in which it has its turn
        with suppress(asyncio.CancelledError):
            await late
        work.go_on.release()
        await last
        assert work.begun[-1] == "c1"
        work.go_on.release()
        await work.do("d1")

    asyncio.run(run())


def test_who_gives_up_costs_its_tenant_no_turn() -> None:
    async def run() -> list[str]:
        work = Work(1)
        first, waiting, *tasks = await work.ask("x1", "a1", "a2", "b1", "b2")
        work.go_on.release()
        waiting.cancel()
        for _ in tasks:
            await work.settle()
            work.go_on.release()
        await asyncio.gather(first, *tasks)
        return work.begun

    assert asyncio.run(run()) == ["x1", "a2", "b1", "b2"]


def test_nothing_is_kept_of_who_gave_up() -> None:
    async def run() -> None:
        work = Work(1)
        [running] = await work.ask("x1")
        for task in await work.ask("a1", "a2", "b1"):
            task.cancel()
        await work.settle()
        assert not work.slots._waiting
        work.go_on.release()
        await running
        assert not work.slots._kept

    asyncio.run(run())
