"""Deltas come into slots and leave them; nobody's slot is ever given away."""

import asyncio
import threading
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from inference.slots import SlotManager

Load = Callable[[str], Any]


class Slots:
    """What lies in the slots, as the model sees it."""

    def __init__(self) -> None:
        self.installed: dict[int, str] = {}
        self.loads: list[str] = []

    def load(self, digest: str) -> Any:
        self.loads.append(digest)
        return digest

    def install(self, slot: int, delta: Any) -> None:
        assert slot not in self.installed, "the slot was not empty"
        self.installed[slot] = delta

    def remove(self, slot: int) -> None:
        self.installed.pop(slot, None)

    def manager(self, limit: int, load: Load | None = None) -> SlotManager:
        return SlotManager(limit, load=load or self.load, install=self.install, remove=self.remove)


def test_a_delta_is_loaded_once_for_all_who_want_it() -> None:
    async def scenario() -> None:
        slots = Slots()
        manager = slots.manager(2)
        found = await asyncio.gather(*(manager.acquire("a") for _ in range(5)))
        assert found == [(1, "a")] * 5
        assert slots.loads == ["a"]

    asyncio.run(scenario())


def test_the_least_recently_used_idle_delta_leaves() -> None:
    async def scenario() -> None:
        slots = Slots()
        manager = slots.manager(3)
        for digest in ("a", "b", "c", "a"):
            await manager.acquire(digest)
            if digest != "b":
                manager.release(digest)
        await manager.acquire("d")
        assert manager.digests == ["b", "a", "d"], "b is in use, c was idle for longest"
        assert manager.evictions == 1

    asyncio.run(scenario())


def test_whoever_finds_no_slot_waits_for_one() -> None:
    async def scenario() -> None:
        slots = Slots()
        manager = slots.manager(1)
        await manager.acquire("a")
        waiting = asyncio.create_task(manager.acquire("b"))
        await asyncio.sleep(0)
        assert not waiting.done()
        manager.release("a")
        assert await waiting == (1, "b")
        assert slots.installed == {1: "b"}

    asyncio.run(scenario())


def test_a_failed_load_fails_those_who_wanted_it_and_is_tried_again() -> None:
    async def scenario() -> None:
        slots = Slots()

        def load(digest: str) -> str:
            slots.loads.append(digest)
            if len(slots.loads) == 1:
                raise OSError("the disk is gone")
            return digest

        manager = slots.manager(1, load)
        failures = await asyncio.gather(
            manager.acquire("a"), manager.acquire("a"), return_exceptions=True
        )
        assert [str(failure) for failure in failures] == ["the disk is gone"] * 2
        assert manager.digests == []
        assert await manager.acquire("a") == (1, "a")

    asyncio.run(scenario())


def test_a_delta_that_cannot_be_installed_leaves_nothing_behind() -> None:
    async def scenario() -> None:
        slots = Slots()

        def install(slot: int, delta: Any) -> None:
            slots.installed[slot] = delta
            raise ValueError("half of it fits")

        manager = SlotManager(1, load=slots.load, install=install, remove=slots.remove)
        with pytest.raises(ValueError, match="half"):
            await manager.acquire("a")
        assert slots.installed == {}
        assert manager.digests == []

    asyncio.run(scenario())


def test_a_load_goes_on_when_the_one_who_waits_gives_up() -> None:
    async def scenario() -> None:
        slots = Slots()
        may_end = threading.Event()

        def load(digest: str) -> str:
            may_end.wait(10)
            return digest

        manager = slots.manager(1, load)
        impatient = asyncio.create_task(manager.acquire("a"))
        patient = asyncio.create_task(manager.acquire("a"))
        other = asyncio.create_task(manager.acquire("b"))
        await asyncio.sleep(0)
        impatient.cancel()
        await asyncio.wait({impatient})
        may_end.set()
        assert await patient == (1, "a")
        assert not other.done(), "the slot is in use"
        manager.release("a")
        assert await other == (1, "b")

    asyncio.run(scenario())


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    limit=st.integers(1, 3),
    users=st.lists(st.tuples(st.sampled_from("abcde"), st.integers(0, 3)), max_size=12),
)
def test_a_user_keeps_its_delta_until_it_lets_go(limit: int, users: list[tuple[str, int]]) -> None:
    async def use(manager: SlotManager, slots: Slots, digest: str, pauses: int) -> None:
        slot, _ = await manager.acquire(digest)
        for _ in range(pauses + 1):
            assert slots.installed[slot] == digest
            await asyncio.sleep(0)
        manager.release(digest)

    async def scenario() -> None:
        slots = Slots()
        manager = slots.manager(limit)
        await asyncio.gather(*(use(manager, slots, *user) for user in users))
        assert sorted(slots.installed.values()) == sorted(manager.digests)
        assert len(manager.digests) <= limit

    asyncio.run(scenario())
