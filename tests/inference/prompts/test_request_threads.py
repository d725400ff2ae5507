"""Blocking work on requests: one of a delta and tenant at a time, tenants in turn."""

import asyncio
import threading
from contextlib import suppress

from deltadock.inference.prompts.request_threads import RequestThreads
from deltadock.model_target import ModelTarget


def target(tenant: str, delta: int = 1) -> ModelTarget:
    return ModelTarget("0" * 64, f"{delta:064x}", tenant)


def test_work_of_a_cancelled_request_holds_up_its_tenants_delta_alone() -> None:
    begun, go_on = threading.Event(), threading.Event()
    order: list[str] = []

    def slow() -> None:
        begun.set()
        go_on.wait(30)
        order.append("slow")

    async def run() -> None:
        threads = RequestThreads(4, "test")
        cancelled = asyncio.create_task(threads.run(target("own"), slow))
        while not begun.is_set():
            await asyncio.sleep(0.01)
        cancelled.cancel()
        with suppress(asyncio.CancelledError):
            await cancelled
        later = asyncio.create_task(threads.run(target("own"), lambda: order.append("own")))
        await threads.run(target("other"), lambda: order.append("other"))
        go_on.set()
        await later
        threads.close()

    asyncio.run(run())
    assert order == ["other", "slow", "own"]


def test_one_tenants_many_deltas_hold_another_up_for_one_turn() -> None:
    order: list[str] = []
    may_end = threading.Semaphore(0)

    def work(name: str) -> None:
        may_end.acquire(timeout=30)
        order.append(name)

    async def run() -> None:
        threads = RequestThreads(3, "test")
        tasks = [
            asyncio.create_task(threads.run(target("many", delta), lambda: work("many")))
            for delta in range(8)
        ]
        tasks.append(asyncio.create_task(threads.run(target("busy"), lambda: work("busy"))))
        await asyncio.sleep(0)
        cancelled = asyncio.create_task(threads.run(target("gone"), lambda: work("gone")))
        other = asyncio.create_task(threads.run(target("other"), lambda: work("other")))
        await asyncio.sleep(0)
        cancelled.cancel()
        while not all(task.done() for task in (*tasks, other)):
            may_end.release()
            await asyncio.sleep(0.05)
        await asyncio.gather(*tasks, other)
        threads.close()

    asyncio.run(run())
    assert order.count("many") == 8
    assert "gone" not in order
    assert "other" in order[:5]


def test_one_tenants_many_deltas_leave_a_thread_to_others() -> None:
    go_on = threading.Event()

    async def run() -> None:
        threads = RequestThreads(4, "test")
        slow = [
            asyncio.create_task(threads.run(target("many", delta), lambda: go_on.wait(30)))
            for delta in range(8)
        ]
        await asyncio.sleep(0)
        try:
            await asyncio.wait_for(threads.run(target("other"), lambda: None), 10)
        finally:
            go_on.set()
            await asyncio.gather(*slow)
            threads.close()

    asyncio.run(run())
