"""Loading, eviction and pinning of slots; a slot in use is never reassigned."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from deltadock.errors import Conflict, Unavailable
from deltadock.inference.deltas.slots import SlotManager, SlotsClosed

Fill = Callable[[int, str], Awaitable[Any]]


class Slots:
    """The contents of the slots."""

    def __init__(self) -> None:
        self.installed: dict[int, str] = {}
        self.loads: list[str] = []

    async def fill(self, slot: int, digest: str) -> Any:
        self.loads.append(digest)
        await asyncio.sleep(0)
        self.installed[slot] = digest
        return digest

    async def clear(self, slot: int) -> None:
        await asyncio.sleep(0)
        self.installed.pop(slot, None)

    def manager(self, limit: int, fill: Fill | None = None) -> SlotManager[Any]:
        return SlotManager(limit, fill=fill or self.fill, clear=self.clear)


def test_concurrent_acquires_load_a_delta_once() -> None:
    async def scenario() -> None:
        slots = Slots()
        manager = slots.manager(2)
        acquired = await asyncio.gather(*(manager.acquire("a") for _ in range(5)))
        assert acquired == [(1, "a")] * 5
        assert slots.loads == ["a"]

    asyncio.run(scenario())


def test_the_least_recently_used_idle_delta_is_evicted() -> None:
    async def scenario() -> None:
        slots = Slots()
        manager = slots.manager(3)
        for digest in ("a", "b", "c", "a"):
            await manager.acquire(digest)
            if digest != "b":
                manager.release(digest)
        await manager.acquire("d")
        assert list(manager.residents) == ["b", "a", "d"], "b is in use, c has been idle longest"
        assert manager.counts.evictions == 1

    asyncio.run(scenario())


def test_acquire_waits_for_a_free_slot() -> None:
    async def scenario() -> None:
        slots = Slots()
        manager = slots.manager(1)
        await manager.acquire("a")
        assert manager.full
        waiting = asyncio.create_task(manager.acquire("b"))
        await asyncio.sleep(0)
        assert not waiting.done()
        manager.release("a")
        assert await waiting == (1, "b")
        assert slots.installed == {1: "b"}

    asyncio.run(scenario())


def test_tenants_that_wait_for_slots_take_turns() -> None:
    async def scenario() -> list[str]:
        manager, given = Slots().manager(2), []

        async def use(digest: str) -> None:
            await manager.acquire(digest, digest[0])
            given.append(digest)
            await asyncio.sleep(0.02)
            manager.release(digest, digest[0])

        names = [f"a{number}" for number in range(8)] + ["b1", "c1", "b2"]
        await asyncio.gather(*map(use, names))
        return given

    given = asyncio.run(scenario())
    assert given[:2] == ["a0", "a1"]
    assert sorted(given[2:5]) == ["a2", "b1", "c1"]
    assert given.index("b2") < given.index("a5")
    assert len(given) == 11


def test_a_resident_delta_is_given_to_all_that_wait_for_it() -> None:
    async def scenario() -> None:
        manager = Slots().manager(1)
        await manager.acquire("a")
        waiting = [asyncio.create_task(manager.acquire("b", tenant)) for tenant in "xxyz"]
        await asyncio.sleep(0)
        manager.release("a")
        assert await asyncio.gather(*waiting) == [(1, "b")] * 4
        assert manager.residents["b"].users == 4

    asyncio.run(scenario())


class Answers:
    """Requests of the tenant that is a delta's first letter; each answers until it is released."""

    def __init__(self, limit: int) -> None:
        self.manager = Slots().manager(limit)

    async def ask(self, *digests: str) -> list[asyncio.Task[Any]]:
        """Requests that have their deltas, once they are done."""
        asked = [asyncio.create_task(self.manager.acquire(digest, digest[0])) for digest in digests]
        for _ in range(20):
            await asyncio.sleep(0)
        return asked

    async def end(self, digest: str) -> None:
        self.manager.release(digest, digest[0])
        await self.ask()


def have_theirs(asked: list[asyncio.Task[Any]]) -> list[bool]:
    return [request.done() for request in asked]


def test_a_tenant_with_many_slots_leaves_one_to_another() -> None:
    async def scenario() -> None:
        answers = Answers(4)
        assert all(have_theirs(await answers.ask("a1", "a2", "a3", "a4")))
        asked = await answers.ask("b1", "b2", "a1", "a2")
        assert not any(have_theirs(asked)), "answers of a end first"
        await answers.end("a3")
        assert have_theirs(asked) == [True, False, False, False]
        await answers.end("a4")
        assert all(have_theirs(asked)), "each has its share"
        waiting = await answers.ask("b3", "a1", "a3", "b1")
        assert have_theirs(waiting) == [False, True, False, True]
        await answers.end("b2")
        assert have_theirs(waiting) == [True, True, False, True], "a has its share already"

    asyncio.run(scenario())


def test_answers_of_a_tenant_alone_do_not_wait() -> None:
    async def scenario() -> None:
        answers = Answers(2)
        assert have_theirs(await answers.ask("a1", "a2", "a3", "a1")) == [True, True, False, True]

    asyncio.run(scenario())


def test_answers_go_on_once_nobody_waits_for_a_slot() -> None:
    async def scenario() -> None:
        answers = Answers(2)
        await answers.ask("a1", "a2")
        [leaving, later] = await answers.ask("b1", "a1")
        assert not later.done()
        leaving.cancel()
        await answers.ask()
        assert later.done()

    asyncio.run(scenario())


def test_nobody_waits_for_a_pinned_slot_to_be_free() -> None:
    async def scenario() -> None:
        answers = Answers(3)
        await answers.ask("a1", "a2", "a3")
        answers.manager.pin("a1")
        assert have_theirs(await answers.ask("b1", "a1", "a2")) == [False, True, False]

    asyncio.run(scenario())


def test_more_tenants_than_slots_take_turns_with_all_that_waits_for_a_delta() -> None:
    async def scenario() -> None:
        answers = Answers(1)
        await answers.ask("a1")
        asked = await answers.ask("b1", "a1", "c1", "b1", "a1")
        for digest, expected in (
            ("a1", [True, False, False, True, False]),
            ("b1", [True, False, False, True, False]),
            ("b1", [True, True, False, True, True]),
        ):
            await answers.end(digest)
            assert have_theirs(asked) == expected
        late = await answers.ask("a1")
        for _ in range(2):
            await answers.end("a1")
        assert have_theirs(asked)[2], "before the one that came later"
        await answers.end("c1")
        assert all(have_theirs(late))

    asyncio.run(scenario())


def test_who_would_wait_while_slots_are_closed_is_sent_away() -> None:
    async def scenario() -> None:
        answers = Answers(1)
        await answers.ask("a1")
        [waiting] = await answers.ask("b1")
        answers.manager.close()
        [there, later] = await answers.ask("a1", "c1")
        assert await there
        for request in (waiting, later):
            with pytest.raises(SlotsClosed, match="again"):
                await request
        answers.manager.open()
        [waiting] = await answers.ask("b1")
        for _ in range(2):
            await answers.end("a1")
        assert await waiting

    asyncio.run(scenario())


def test_answers_that_overlap_without_a_pause_keep_nobody_out() -> None:
    async def scenario() -> None:
        manager, stopped = Slots().manager(3), False

        async def answer_on(digest: str, tenant: str, length: int) -> None:
            while not stopped:
                await manager.acquire(digest, tenant)
                for _ in range(length):
                    await asyncio.sleep(0)
                manager.release(digest, tenant)

        tenants = [("a1", "a"), ("a2", "a"), ("a3", "a"), ("b1", "b"), ("b2", "b")]
        busy = [
            asyncio.create_task(answer_on(*one, length))
            for one in tenants
            for length in (7, 11, 13)
        ]
        for number in range(20):
            await asyncio.wait_for(manager.acquire(f"c{number}", "c"), 10)
            manager.release(f"c{number}", "c")
        stopped = True
        await asyncio.gather(*busy)

    asyncio.run(scenario())


def test_who_gives_up_or_waits_too_long_keeps_no_slot(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        manager = Slots().manager(1)
        await manager.acquire("a")
        leaving, late = (asyncio.create_task(manager.acquire("b", "t")) for _ in range(2))
        await asyncio.sleep(0)
        leaving.cancel()
        await asyncio.wait({leaving})
        manager.release("a")
        late.cancel()  # at the moment in which it has its turn
        await asyncio.wait({late})
        while manager.residents["b"].users:
            await asyncio.sleep(0)
        assert not manager.full
        await manager.acquire("c")
        monkeypatch.setattr("deltadock.inference.deltas.slots.MAX_WAIT_SECONDS", 0.02)
        with pytest.raises(Unavailable, match="All 1 slots are in use"):
            await manager.acquire("d", "t")
        manager.release("c")
        assert not manager._waiting
        assert not manager.full

    asyncio.run(scenario())


def test_a_failed_load_fails_its_waiters_and_is_retried() -> None:
    async def scenario() -> None:
        slots = Slots()

        async def fill(slot: int, digest: str) -> Any:
            slots.installed[slot] = "half of it"
            if len(slots.loads) == 0:
                slots.loads.append(digest)
                raise OSError("the disk is gone")
            return await slots.fill(slot, digest)

        manager = slots.manager(1, fill)
        failures = await asyncio.gather(
            manager.acquire("a"), manager.acquire("a"), return_exceptions=True
        )
        assert [str(failure) for failure in failures] == ["the disk is gone"] * 2
        assert list(manager.residents) == []
        assert slots.installed == {}, "the partial load is cleared"
        assert await manager.acquire("a") == (1, "a")

    asyncio.run(scenario())


def test_a_load_continues_when_a_waiter_is_cancelled() -> None:
    async def scenario() -> None:
        slots = Slots()
        may_end = asyncio.Event()

        async def fill(slot: int, digest: str) -> Any:
            await may_end.wait()
            return await slots.fill(slot, digest)

        manager = slots.manager(1, fill)
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


def test_a_pinned_delta_is_not_evicted_and_one_slot_stays_free() -> None:
    async def scenario() -> None:
        manager = Slots().manager(2)
        for digest in "ab":
            await manager.acquire(digest)
            manager.release(digest)
        manager.pin("a")
        with pytest.raises(Conflict, match="1 of 2 slots are pinned"):
            manager.pin("b")
        for digest in "cd":
            await manager.acquire(digest)
            manager.release(digest)
        assert list(manager.residents) == ["a", "d"]
        with pytest.raises(Conflict, match="pinned"):
            await manager.unload("a")
        manager.unpin("a")
        await manager.unload("a")
        assert list(manager.residents) == ["d"]

    asyncio.run(scenario())


def test_a_delta_being_unloaded_is_loaded_again_on_acquire() -> None:
    async def scenario() -> None:
        slots = Slots()
        manager = slots.manager(1)
        await manager.acquire("a")
        with pytest.raises(Conflict, match="used by 1"):
            await manager.unload("a")
        manager.release("a")
        dropping = asyncio.create_task(manager.unload("a"))
        await asyncio.sleep(0)
        again = asyncio.create_task(manager.acquire("a"))
        await dropping
        assert await again == (1, "a")
        assert slots.loads == ["a", "a"]
        assert slots.installed == {1: "a"}

    asyncio.run(scenario())


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    limit=st.integers(1, 3),
    users=st.lists(st.tuples(st.sampled_from("abcde"), st.integers(0, 3)), max_size=12),
)
def test_an_acquired_delta_stays_until_release(limit: int, users: list[tuple[str, int]]) -> None:
    async def use(manager: SlotManager[Any], slots: Slots, digest: str, pauses: int) -> None:
        tenant = str(pauses % 2)
        slot, _ = await manager.acquire(digest, tenant)
        for _ in range(pauses + 1):
            assert slots.installed[slot] == digest
            await asyncio.sleep(0)
        manager.release(digest, tenant)

    async def scenario() -> None:
        slots = Slots()
        manager = slots.manager(limit)
        await asyncio.gather(*(use(manager, slots, *user) for user in users))
        assert sorted(slots.installed.values()) == sorted(manager.residents)
        assert len(manager.residents) <= limit
        assert not any(resident.users for resident in manager.residents.values())
        assert not any(resident.tenants for resident in manager.residents.values())
        assert not manager._waiting

    asyncio.run(scenario())
