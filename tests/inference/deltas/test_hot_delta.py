"""The delta with most of the traffic is merged once."""

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deltadock.errors import Conflict, Unavailable
from deltadock.inference.deltas import hot_delta
from deltadock.inference.deltas.hot_delta import (
    HOT_FRACTION,
    MIN_TOKENS,
    WINDOW_TOKENS,
    HotDeltaMerger,
    TrafficShares,
)


class Tiers:
    """Records merges, or fails them."""

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
    """Runs these requests; returns the deltas whose merge was tried."""

    async def scenario() -> None:
        merger = HotDeltaMerger("base", tiers.merge, lambda: tiers.merged)
        for model_key, tokens in served:
            merger.record(model_key, tokens)
            for _ in range(3):
                await asyncio.sleep(0)

    asyncio.run(scenario())
    return tiers.calls


def test_a_hot_delta_is_merged_once() -> None:
    assert after(Tiers(), ("a", MIN_TOKENS - 1)) == []
    assert after(Tiers(), ("a", MIN_TOKENS), ("a", 1), ("a", 1)) == ["a"]
    assert after(Tiers(), ("base", 3 * MIN_TOKENS)) == []
    assert after(Tiers(), ("a", MIN_TOKENS // 2), ("b", MIN_TOKENS // 2)) == []
    assert after(Tiers(), ("a", MIN_TOKENS), ("b", WINDOW_TOKENS * 8)) == ["a", "b"]


@pytest.mark.parametrize(("error", "calls"), [(Unavailable("no memory"), 1), (Conflict("used"), 3)])
def test_a_failed_merge_waits_and_a_conflict_is_retried(error: Exception, calls: int) -> None:
    tiers = Tiers()
    tiers.error = error
    assert after(tiers, ("a", MIN_TOKENS), ("a", 1), ("a", 1)) == ["a"] * calls


def test_a_failed_merge_is_retried_after_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hot_delta, "RETRY_SECONDS", 0.0)
    tiers = Tiers()
    tiers.error = Unavailable("no memory")
    assert after(tiers, ("a", MIN_TOKENS), ("a", 1)) == ["a", "a"]


def test_stopping_cancels_a_running_merge() -> None:
    class Slow(Tiers):
        async def merge(self, digest: str) -> None:
            self.calls.append(digest)
            await asyncio.sleep(60)

    async def scenario() -> list[str]:
        tiers = Slow()
        merger = HotDeltaMerger("base", tiers.merge, lambda: tiers.merged)
        merger.record("a", MIN_TOKENS)
        await asyncio.sleep(0)
        merger.record("a", 1)
        merger.stop()
        await asyncio.sleep(0)
        merger.record("a", 1)
        others = asyncio.all_tasks() - {asyncio.current_task()}
        assert not others
        return tiers.calls

    assert asyncio.run(scenario()) == ["a"]


@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, WINDOW_TOKENS)), max_size=20))
def test_a_hot_delta_has_most_of_the_recent_tokens(served: list[tuple[str, int]]) -> None:
    traffic = TrafficShares()
    for model_key, tokens in served:
        traffic.add(model_key, tokens)
    found = traffic.hot
    total = sum(tokens for _, tokens in served)
    if total <= WINDOW_TOKENS:
        own = sum(tokens for model_key, tokens in served if model_key == found)
        assert found is None or own >= HOT_FRACTION * total >= HOT_FRACTION * MIN_TOKENS
    for _ in range(8):
        traffic.add("z", WINDOW_TOKENS)
    assert traffic.hot == "z"
