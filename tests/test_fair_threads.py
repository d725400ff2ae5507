"""Tenants take turns at threads, and none has all of them."""

import threading
from collections.abc import Callable, Iterator

import pytest

from deltadock.fair_threads import FairThreads


class Works:
    """Works that note their start and end when they are told to, one after another."""

    def __init__(self, threads: FairThreads) -> None:
        self.threads = threads
        self.begun: list[str] = []
        self.changed = threading.Condition()
        self.may_end = threading.Semaphore(0)

    def submit(self, name: str) -> Callable[[float], None]:
        """A work of the tenant that is the name's first letter."""

        def work() -> None:
            with self.changed:
                self.begun.append(name)
                self.changed.notify_all()
            assert self.may_end.acquire(timeout=10)

        return self.threads.submit(name[0], work).result

    def end(self, count: int = 1) -> None:
        self.may_end.release(count)

    def wait(self, count: int) -> list[str]:
        """What has begun, when so many have."""
        with self.changed:
            assert self.changed.wait_for(lambda: len(self.begun) >= count, 10)
            return list(self.begun)


@pytest.fixture
def works() -> Iterator[Works]:
    works = Works(FairThreads(2, 2, "works"))
    yield works
    works.end(99)
    works.threads.shutdown()


def test_tenants_take_turns(works: Works) -> None:
    results = [works.submit(name) for name in ("a1", "a2", "a3", "a4", "b1", "b2", "c1")]
    assert sorted(works.wait(2)) == ["a1", "a2"]
    for count, name in enumerate(("a3", "b1", "c1", "a4", "b2"), start=3):
        works.end()
        assert works.wait(count)[-1] == name
    works.end(2)
    for result in results:
        result(10)


def test_a_tenant_has_its_share_alone() -> None:
    works = Works(FairThreads(3, 2, "works"))
    for name in ("a1", "a2", "a3"):
        works.submit(name)
    assert sorted(works.wait(2)) == ["a1", "a2"]
    works.submit("b1")
    assert works.wait(3)[-1] == "b1", "a thread was left for it"
    works.end()
    works.wait(4)
    works.end(99)
    works.threads.shutdown()


def test_a_work_that_fails_leaves_its_thread(works: Works) -> None:
    def fail() -> None:
        raise ValueError("no")

    failed = [works.threads.submit("a", fail) for _ in range(5)]
    for future in failed:
        with pytest.raises(ValueError, match="no"):
            future.result(10)
    works.submit("a1")
    assert works.wait(1) == ["a1"]


def test_who_gives_up_costs_its_tenant_no_turn() -> None:
    works = Works(FairThreads(1, 1, "works"))
    works.submit("x1")
    works.wait(1)
    leaving = works.threads.submit("a", lambda: None)
    for name in ("b1", "a2", "b2"):
        works.submit(name)
    assert leaving.cancel()
    works.end(99)
    assert works.wait(4) == ["x1", "a2", "b1", "b2"]
    works.threads.shutdown()


def test_what_waits_is_cancelled_by_a_shutdown() -> None:
    works = Works(FairThreads(1, 1, "works"))
    first = works.submit("a1")
    works.wait(1)
    later = works.threads.submit("a", lambda: None)
    stop = threading.Thread(target=works.threads.shutdown)
    stop.start()
    while not later.cancelled():
        assert stop.is_alive()
    works.end()
    first(10)
    stop.join(10)
    assert not stop.is_alive()
