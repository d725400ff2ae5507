"""Which base a node has, with bases that hold nothing."""

import asyncio
import threading
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import Mock

import pytest

from deltadock.artifacts.checkpoint import CheckpointManifest
from deltadock.errors import Unavailable
from deltadock.inference.base import ServedBase
from deltadock.inference.turns import BaseTurns, FetchedCheckpoint


class EmptyBase(ServedBase):
    """A base that counts its users and no more."""

    def __init__(self, digest: str) -> None:
        self.digest = digest
        self.users = 0
        self.idle = asyncio.Event()
        self.deltas = Mock()
        self.closed = False

    def close(self) -> None:
        self.closed = True


class Turns(BaseTurns):
    """Turns that note which checkpoints were fetched and which bases loaded."""

    def __init__(self) -> None:
        super().__init__(self._hold, self._read)
        self.fetched: list[str] = []
        self.held: list[str] = []
        self.loaded: list[str] = []
        self.downloads: dict[str, threading.Event] = {}
        """Fetching these waits for the event."""

    @contextmanager
    def _hold(self, digest: str) -> Iterator[FetchedCheckpoint]:
        self.fetched.append(digest)
        if digest in self.downloads:
            assert self.downloads[digest].wait(60)
        self.held.append(digest)
        try:
            yield Path(digest), CheckpointManifest((), (), {})
        finally:
            self.held.remove(digest)

    def _read(self, digest: str, fetched: FetchedCheckpoint) -> EmptyBase:
        assert digest in self.held, "it is kept on disk until it is in memory"
        assert fetched[0] == Path(digest)
        assert self.current is None, "memory may not hold two"
        self.loaded.append(digest)
        return EmptyBase(digest)

    async def ask(self, digest: str) -> str:
        """A short request; the base that answered."""
        base = await self.enter(digest, digest)
        await asyncio.sleep(0)
        base.leave()
        return base.digest

    async def refused(self, digest: str) -> asyncio.Task[str]:
        """A request for the current base, once it takes no more."""
        while True:
            request = asyncio.create_task(self.ask(digest))
            for _ in range(10):  # turns of the event loop, of which an answer needs three
                await asyncio.sleep(0)
            if not request.done():
                return request
            await asyncio.sleep(0.01)


async def until(condition: Callable[[], object]) -> None:
    while not condition():
        await asyncio.sleep(0.01)


def run(scenario: Callable[[Turns], Awaitable[None]]) -> None:
    async def within_a_minute() -> None:
        async with asyncio.timeout(60):
            await scenario(Turns())

    asyncio.run(within_a_minute())


@pytest.fixture
def seconds(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Set durations of `turns`, by name."""

    def set_(**durations: float) -> None:
        for name, value in durations.items():
            monkeypatch.setattr(f"deltadock.inference.turns.{name.upper()}_SECONDS", value)

    set_(min_turn=0.0)
    return set_


@pytest.mark.usefixtures("seconds")
def test_bases_take_turns_in_order_of_arrival() -> None:
    async def scenario(turns: Turns) -> None:
        first = await turns.enter("a", "a")
        asked = [asyncio.create_task(turns.ask("b")) for _ in range(2)]
        asked.append(await turns.refused("a"))
        assert not any(request.done() for request in asked)
        first.leave()
        assert await asyncio.gather(*asked) == ["b", "b", "a"]
        assert turns.loaded == ["a", "b", "a"]
        assert isinstance(first, EmptyBase)
        assert first.closed

    run(scenario)


def test_a_base_that_others_wait_for_has_its_turn(seconds: Callable[..., None]) -> None:
    async def scenario(turns: Turns) -> None:
        seconds(min_turn=3600.0, max_wait=0.2)
        await turns.ask("a")
        for _ in range(2):
            with pytest.raises(Unavailable):
                await turns.ask("b")
            assert await turns.ask("a") == "a"
            await until(lambda: not turns.held)
        assert turns.fetched == ["a", "b", "b"], "once nobody waits for it, it is not kept"
        assert turns.loaded == ["a"]

    run(scenario)


def test_a_request_that_waited_too_long_can_be_repeated(seconds: Callable[..., None]) -> None:
    async def scenario(turns: Turns) -> None:
        seconds(max_wait=0.2)
        running = await turns.enter("a", "a")
        with pytest.raises(Unavailable, match="base maths is not loaded"):
            await turns.enter("b", "maths")
        running.leave()
        seconds(max_wait=60.0)
        assert await turns.ask("b") == "b"

    run(scenario)


def test_a_base_with_a_long_answer_takes_requests_again(seconds: Callable[..., None]) -> None:
    async def scenario(turns: Turns) -> None:
        seconds(max_closed=0.2)
        running = await turns.enter("a", "a")
        asked = asyncio.create_task(turns.ask("b"))
        assert await (await turns.refused("a")) == "a"
        assert not asked.done(), "it waits on"
        running.leave()
        assert await asked == "b"

    run(scenario)


def test_a_change_whose_clients_have_gone_is_not_made(seconds: Callable[..., None]) -> None:
    async def scenario(turns: Turns) -> None:
        seconds(max_closed=3600.0)
        running = await turns.enter("a", "a")
        asked = asyncio.create_task(turns.ask("b"))
        late = await turns.refused("a")
        asked.cancel()
        assert await late == "a"
        assert turns.current is running
        await until(lambda: not turns.held)
        assert turns.loaded == ["a"]

    run(scenario)


def test_one_base_is_fetched_at_a_time_and_only_while_somebody_waits(
    seconds: Callable[..., None],
) -> None:
    async def scenario(turns: Turns) -> None:
        seconds(max_wait=0.2)
        turns.downloads["a"] = threading.Event()
        asked = asyncio.create_task(turns.ask("a"))
        await until(lambda: turns.fetched)
        for digest in ("b", "c", "d"):
            with pytest.raises(Unavailable, match="is not loaded"):
                await turns.ask(digest)
        seconds(max_wait=60.0)
        again = [asyncio.create_task(turns.ask(digest)) for digest in ("d", "b")]
        await asyncio.sleep(0)
        turns.downloads["a"].set()
        assert await asyncio.gather(asked, *again) == ["a", "d", "b"]
        assert turns.fetched == ["a", "b", "d"], "nobody waits for c, and b has kept its place"

    run(scenario)


@pytest.mark.usefixtures("seconds")
def test_a_download_holds_up_no_request() -> None:
    """The current base answers meanwhile; it goes when its requests are done."""

    async def scenario(turns: Turns) -> None:
        await turns.ask("a")
        downloaded = turns.downloads["b"] = threading.Event()
        change = asyncio.create_task(turns.ask("b"))
        await until(lambda: "b" in turns.fetched)
        assert await turns.ask("a") == "a"
        running = await turns.enter("a", "a")
        downloaded.set()
        late = await turns.refused("a")
        assert not change.done()
        running.leave()
        assert await asyncio.gather(change, late) == ["b", "a"]

    run(scenario)
