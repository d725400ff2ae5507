"""Who takes most of the traffic is merged, once, and only while it does."""

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deltadock.errors import Conflict, Unavailable
from deltadock.inference.deltas import hot_adapter
from deltadock.inference.deltas.hot_adapter import (
    LEAST_TOKENS,
    SHARE,
    WINDOW_TOKENS,
    Favourite,
    TrafficShares,
)


class Tiers:
    """Merges as told, or fails."""

    def __init__(self) -> None:
        self.merged: str | None = None
        self.calls: list[str] = []
        self.error: Exception | None = None

    async def merge(self, digest: str) -> None:
        self.calls.append(digest)
        await asyncio.sleep(0)
        if self.error is not None:
            raise self.error
        self.merged = digest


def after(tiers: Tiers, *served: tuple[str, int]) -> list[str]:
    """Whom the favourite merged, or tried to, after these requests."""

    async def scenario() -> None:
        favourite = Favourite(tiers, "base")
        for model_key, tokens in served:
            favourite.served(model_key, tokens)
            for _ in range(3):
                await asyncio.sleep(0)

    asyncio.run(scenario())
    return tiers.calls


def test_a_favourite_is_merged_once() -> None:
    assert after(Tiers(), ("a", LEAST_TOKENS - 1)) == []
    assert after(Tiers(), ("a", LEAST_TOKENS), ("a", 1), ("a", 1)) == ["a"]
    assert after(Tiers(), ("base", 3 * LEAST_TOKENS)) == []
    assert after(Tiers(), ("a", LEAST_TOKENS // 2), ("b", LEAST_TOKENS // 2)) == []
    assert after(Tiers(), ("a", LEAST_TOKENS), ("b", WINDOW_TOKENS * 8)) == ["a", "b"]


@pytest.mark.parametrize(("error", "calls"), [(Unavailable("no memory"), 1), (Conflict("used"), 3)])
def test_what_cannot_be_merged_is_left_and_what_is_in_use_tried_again(
    error: Exception, calls: int
) -> None:
    tiers = Tiers()
    tiers.error = error
    assert after(tiers, ("a", LEAST_TOKENS), ("a", 1), ("a", 1)) == ["a"] * calls


def test_what_failed_is_tried_again_after_a_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hot_adapter, "REST_SECONDS", 0.0)
    tiers = Tiers()
    tiers.error = Unavailable("no memory")
    assert after(tiers, ("a", LEAST_TOKENS), ("a", 1)) == ["a", "a"]


def test_a_merge_that_goes_on_can_be_stopped() -> None:
    class Slow(Tiers):
        async def merge(self, digest: str) -> None:
            self.calls.append(digest)
            await asyncio.sleep(60)

    async def scenario() -> list[str]:
        tiers = Slow()
        found = Favourite(tiers, "base")
        found.served("a", LEAST_TOKENS)
        await asyncio.sleep(0)
        found.served("a", 1)
        found.stop()
        await asyncio.sleep(0)
        found.served("a", 1)
        others = asyncio.all_tasks() - {asyncio.current_task()}
        assert not others
        return tiers.calls

    assert asyncio.run(scenario()) == ["a"]


@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, WINDOW_TOKENS)), max_size=20))
def test_a_favourite_has_its_share_of_recent_tokens(served: list[tuple[str, int]]) -> None:
    traffic = TrafficShares()
    for model_key, tokens in served:
        traffic.add(model_key, tokens)
    found = traffic.favourite
    total = sum(tokens for _, tokens in served)
    if total <= WINDOW_TOKENS:
        own = sum(tokens for model_key, tokens in served if model_key == found)
        assert found is None or own >= SHARE * total >= SHARE * LEAST_TOKENS
    for _ in range(8):
        traffic.add("z", WINDOW_TOKENS)
    assert traffic.favourite == "z"
