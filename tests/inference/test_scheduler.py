"""Admission and chunked prefill."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from inference.kv_cache import KVCache
from inference.sampler import SamplingParams
from inference.scheduler import Scheduler, Sequence
from inference.tokens import TextStream, Tokenizer


def make_cache(slots: int, length: int = 64) -> KVCache:
    return KVCache(1, slots, 1, length, 2, dtype=torch.float32, device=torch.device("cpu"))


def make_sequence(tokenizer: Tokenizer, length: int, slot: int = 0) -> Sequence:
    prompt = [1] * length
    stream = TextStream(tokenizer, prompt, ())
    return Sequence(prompt, SamplingParams(), slot, frozenset(), stream, lambda _: None)


def run_pass(scheduler: Scheduler) -> list[tuple[Sequence, int, int]]:
    """Plan a pass and pretend that it was computed and every finished prompt got a token."""
    work = scheduler.plan()
    for item in work:
        samples = item.samples
        item.sequence.computed = item.end
        if samples:
            item.sequence.tokens.append(2)
    return [tuple(item) for item in work]


@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=8),
    slots=st.integers(1, 4),
    budget=st.integers(1, 16),
)
def test_every_token_is_computed_once_and_in_order(
    tokenizer: Tokenizer, lengths: list[int], slots: int, budget: int
) -> None:
    scheduler = Scheduler(make_cache(slots), budget)
    sequences = [make_sequence(tokenizer, length) for length in lengths]
    for sequence in sequences:
        scheduler.add(sequence)
    reached = dict.fromkeys(map(id, sequences), 0)
    while scheduler.busy:
        work = run_pass(scheduler)
        assert len({sequence.kv_slot for sequence, _, _ in work}) == len(work) <= slots
        assert sum(end - begin for _, begin, end in work) <= max(budget, len(work))
        for sequence, begin, end in work:
            assert begin == reached[id(sequence)] < end
            reached[id(sequence)] = end
            if sequence.generated == 3:
                assert scheduler.drop(sequence)
    assert list(reached.values()) == [length + 2 for length in lengths]


def test_a_long_prompt_does_not_hold_up_decoding(tokenizer: Tokenizer) -> None:
    scheduler = Scheduler(make_cache(2), pass_tokens=8)
    short, long = make_sequence(tokenizer, 4), make_sequence(tokenizer, 40)
    scheduler.add(short)
    run_pass(scheduler)
    scheduler.add(long)
    for passes in range(1, 4):
        run_pass(scheduler)
        assert short.generated == 1 + passes
        assert long.computed == 7 * passes


def test_rows_of_a_delta_lie_together(tokenizer: Tokenizer) -> None:
    scheduler = Scheduler(make_cache(8), pass_tokens=64)
    for slot in (2, 0, 1, 2, 0):
        scheduler.add(make_sequence(tokenizer, 3, slot))
    assert [item.sequence.delta_slot for item in scheduler.plan()] == [0, 0, 1, 2, 2]


def test_a_released_cache_slot_is_empty() -> None:
    cache = make_cache(2)
    slot = cache.allocate()
    for layer in (*cache.keys, *cache.values):
        layer[slot, :, :5] = float("nan")
    cache.release(slot, 5)
    assert cache.free_slots == 2
    assert all(bool((layer == 0).all()) for layer in (*cache.keys, *cache.values))
    assert cache.allocate() == slot
