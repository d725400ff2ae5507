"""Prefix reuse between sequences of one model, and isolation between models."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from deltadock.inference.engine.prefix_cache import CacheSlots, common_prefix
from tests.inference.scheduling import make_cache

TOKENS = st.lists(st.integers(0, 2), min_size=1, max_size=12)


@given(TOKENS, TOKENS, st.integers(0, 14))
def test_common_prefix(first: list[int], second: list[int], most: int) -> None:
    count = common_prefix(first, second, most)
    assert first[:count] == second[:count]
    if count < min(most, len(first), len(second)):
        assert first[count] != second[count]


def test_a_prefix_of_the_same_model_is_reused_in_place() -> None:
    slots = CacheSlots(make_cache(2))
    slot, reused = slots.take("a", tokens := [1, 2, 3])
    assert reused == 0
    tokens += [4, 5]
    slots.confirm(slot, 4)
    slots.release(slot, 5, keep=True)
    assert slots.take("a", [1, 2, 3, 4, 5, 6]) == (slot, 4)


def test_different_models_never_share_a_prefix() -> None:
    cache = make_cache(1)
    slots = CacheSlots(cache)
    slot, _ = slots.take("a", [1, 2, 3])
    for layer in (*cache.keys, *cache.values):
        layer[slot, :, :3] = 7
    slots.confirm(slot, 3)
    slots.release(slot, 3, keep=True)
    assert slots.take("b", [1, 2, 3]) == (slot, 0)
    assert all(bool((layer == 0).all()) for layer in (*cache.keys, *cache.values))


def test_a_running_sequences_prefix_is_copied() -> None:
    cache = make_cache(2)
    slots = CacheSlots(cache)
    first, _ = slots.take("a", [1, 2, 3])
    for layer in (*cache.keys, *cache.values):
        layer[first, :, :3] = torch.arange(3.0)[:, None]
    assert slots.find("a", [1, 2, 3]) == (-1, 0), "no finite logits have confirmed it yet"
    slots.confirm(first, 3)
    second, reused = slots.take("a", [1, 2, 9])
    assert (second != first, reused) == (True, 2)
    for layer in (*cache.keys, *cache.values):
        assert layer[second, 0, :3, 0].tolist() == [0, 1, 0]


def test_the_least_recently_used_prefix_is_evicted_first() -> None:
    slots = CacheSlots(make_cache(2))
    for queue_key in ("a", "b"):
        slot, _ = slots.take(queue_key, [1, 2, 3])
        slots.confirm(slot, 3)
        slots.release(slot, 3, keep=True)
    slot, _ = slots.take("a", [1, 2, 3, 4])
    slots.release(slot, 3, keep=True)
    slot, _ = slots.take("c", [5])
    assert slots.find("b", [1, 2, 3]) == (-1, 0)
    assert slots.find("a", [1, 2, 3, 4])[1] == 3


def test_a_short_match_does_not_overwrite_a_long_conversation() -> None:
    slots = CacheSlots(make_cache(2))
    slot, _ = slots.take("a", list(range(40)))
    slots.confirm(slot, 40)
    slots.release(slot, 40, keep=True)
    other, reused = slots.take("a", [0, 1, 2, 3, 99])
    assert (other != slot, reused) == (True, 4)
    assert slots.find("a", [*range(40), 50]) == (slot, 40)


class SlotsMachine(RuleBasedStateMachine):
    """Sequences of three digests in any order; some write NaN. The value at a cache position
    identifies the token written there."""

    def __init__(self) -> None:
        super().__init__()
        self.cache = make_cache(3, 16)
        self.slots = CacheSlots(self.cache)
        self.running: dict[int, tuple[int, list[int], int]] = {}

    @staticmethod
    def mark(queue_key: int, tokens: list[int], at: int) -> float:
        return float(hash((queue_key, *tokens[: at + 1])) % 1009 + 1)

    @precondition(lambda self: self.slots.free)
    @rule(queue_key=st.integers(0, 2), tokens=TOKENS)
    def take(self, queue_key: int, tokens: list[int]) -> None:
        slot, reused = self.slots.take(str(queue_key), tokens)
        assert slot not in self.running
        assert reused < len(tokens)
        for at in range(reused):
            assert self.cache.keys[0][slot, 0, at, 0] == self.mark(queue_key, tokens, at)
        self.running[slot] = (queue_key, tokens, reused)

    @precondition(lambda self: self.running)
    @rule(data=st.data(), broken=st.booleans())
    def compute(self, data: st.DataObject, broken: bool) -> None:
        slot = data.draw(st.sampled_from(sorted(self.running)))
        queue_key, tokens, done = self.running[slot]
        for layer in (*self.cache.keys, *self.cache.values):
            for at in range(done, len(tokens)):
                layer[slot, :, at] = float("nan") if broken else self.mark(queue_key, tokens, at)
        if broken:
            self.slots.release(slot, len(tokens), keep=False)
            del self.running[slot]
        else:
            self.slots.confirm(slot, len(tokens))
            self.running[slot] = (queue_key, tokens, len(tokens))

    @precondition(lambda self: self.running)
    @rule(data=st.data(), keep=st.booleans())
    def give_back(self, data: st.DataObject, keep: bool) -> None:
        slot = data.draw(st.sampled_from(sorted(self.running)))
        self.slots.release(slot, len(self.running.pop(slot)[1]), keep=keep)

    @invariant()
    def free_slots_contain_no_nan(self) -> None:
        assert self.slots.free == 3 - len(self.running)
        for layer in (*self.cache.keys, *self.cache.values):
            assert not bool(layer.isnan().any())


TestSlots = SlotsMachine.TestCase
TestSlots.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
