"""Admission, chunked prefill and priorities."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deltadock.inference.engine.scheduler import Scheduler
from deltadock.inference.prompts.tokenizer import Tokenizer
from tests.inference.scheduling import make_cache, make_sequence, run_pass


@given(
    requests=st.lists(
        st.tuples(st.integers(1, 40), st.integers(0, 3), st.integers(1, 5)), min_size=1, max_size=12
    ),
    slots=st.integers(1, 4),
    spare=st.integers(0, 2),
    budget=st.integers(1, 16),
)
def test_every_sequence_ends_and_passes_keep_their_limits(
    tokenizer: Tokenizer,
    requests: list[tuple[int, int, int]],
    slots: int,
    spare: int,
    budget: int,
) -> None:
    scheduler = Scheduler(make_cache(slots + spare), budget, slots)
    sequences = [
        make_sequence(tokenizer, [slot] * length, slot, max_tokens=count)
        for length, slot, count in requests
    ]
    for sequence in sequences:
        scheduler.add(sequence)
    passes = 0
    while scheduler.busy:
        starts = {id(sequence): sequence.computed for sequence in scheduler.running}
        work = run_pass(scheduler)
        passes += 1
        assert passes < 2000
        assert work, "every pass runs a chunk"
        assert len({item.sequence.kv_slot for item in work if item.sequence.kv_slot >= 0}) == len(
            [item for item in work if item.sequence.kv_slot >= 0]
        )
        assert len(work) <= slots
        assert sum(end - begin for _, begin, end in work) <= max(budget, len(work))
        for sequence, begin, end in work:
            assert begin < end
            assert begin == starts.get(id(sequence), begin), "every token is computed"
    assert [sequence.generated for sequence in sequences] == [count for _, _, count in requests]
    assert scheduler.slots.free == slots + spare


def test_a_long_prompt_does_not_stall_decoding(tokenizer: Tokenizer) -> None:
    scheduler = Scheduler(make_cache(2), 8, 2)
    short, long = make_sequence(tokenizer, 4), make_sequence(tokenizer, 40)
    scheduler.add(short)
    run_pass(scheduler)
    scheduler.add(long)
    for passes in range(1, 4):
        run_pass(scheduler)
        assert short.generated == 1 + passes
        assert long.computed == 7 * passes


def test_rows_of_a_delta_are_adjacent(tokenizer: Tokenizer) -> None:
    scheduler = Scheduler(make_cache(8), 64, 8)
    for slot in (2, 0, 1, 2, 0):
        scheduler.add(make_sequence(tokenizer, 3, slot))
    assert [item.sequence.delta_slot for item in scheduler.schedule()] == [0, 0, 1, 2, 2]


def test_answers_to_one_prompt_share_its_prefill(tokenizer: Tokenizer) -> None:
    scheduler = Scheduler(make_cache(4), 50, 4)
    prompt = list(range(100))
    answers = [make_sequence(tokenizer, prompt, max_tokens=3) for _ in range(4)]
    for answer in answers:
        scheduler.add(answer)
    computed = Counter[int]()
    while scheduler.busy:
        for sequence, begin, end in run_pass(scheduler):
            computed[id(sequence)] += end - begin
    assert sorted(computed.values()) == [3, 3, 3, 102]
    assert scheduler.slots.reused_tokens == 3 * 99


def test_a_waiting_prompt_is_looked_up_once_per_pass(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many prompts run: a look-up compares it with every slot."""
    scheduler = Scheduler(make_cache(16), 8, 16)
    for _ in range(14):
        scheduler.add(make_sequence(tokenizer, 50, 0))
    shared = make_sequence(tokenizer, 40).tokens
    for _ in range(2):
        scheduler.add(make_sequence(tokenizer, shared, 0))
    run_pass(scheduler)
    assert len(scheduler.running) == 15
    looked_up = []
    find = scheduler.slots.find
    monkeypatch.setattr(
        scheduler.slots, "find", lambda *args: (looked_up.append(args), find(*args))[1]
    )
    run_pass(scheduler)
    assert len(scheduler.waiting) == 1
    assert len(looked_up) == 1


def test_a_different_prompt_does_not_wait(tokenizer: Tokenizer) -> None:
    scheduler = Scheduler(make_cache(4), 50, 4)
    for prompt in ([7] * 5 + [1] * 90, [7] * 5 + [2] * 90):
        scheduler.add(make_sequence(tokenizer, prompt))
    run_pass(scheduler)
    assert len(scheduler.running) == 2


def test_a_delta_without_sequences_preempts_the_one_with_most(tokenizer: Tokenizer) -> None:
    scheduler = Scheduler(make_cache(4), 64, 4)
    flood = [make_sequence(tokenizer, 4, 1, max_tokens=30) for _ in range(9)]
    for sequence in flood:
        scheduler.add(sequence)
    for _ in range(5):
        run_pass(scheduler)
    others = [make_sequence(tokenizer, 4, 2, max_tokens=30) for _ in range(3)]
    for sequence in others:
        scheduler.add(sequence)
    run_pass(scheduler)
    assert others[0].generated == 1, "immediately"
    run_pass(scheduler)
    assert Counter(sequence.queue_key for sequence in scheduler.running) == {
        "digest-1": 2,
        "digest-2": 2,
    }
    assert [flood[2] in scheduler.waiting, flood[3] in scheduler.waiting] == [True, True]
    assert flood[3].generated >= 5, "its generated tokens are kept"
    while scheduler.busy:
        run_pass(scheduler)
    assert {sequence.generated for sequence in (*flood, *others)} == {30}


def test_a_preempted_prompt_is_scored_once(tokenizer: Tokenizer) -> None:
    """Its scores are sent with its first token; a preemption is later."""
    scheduler = Scheduler(make_cache(2), 64, 2)
    asked = [make_sequence(tokenizer, 9, 1, max_tokens=30, prompt_logprobs=True) for _ in range(2)]
    scored = Counter[int]()
    for sequence in asked:
        scheduler.add(sequence)
    for _ in range(5):
        run_pass(scheduler, scored=scored)
    scheduler.add(make_sequence(tokenizer, 4, 2, max_tokens=30))
    run_pass(scheduler, scored=scored)
    assert asked[1] in scheduler.waiting
    while scheduler.busy:
        run_pass(scheduler, scored=scored)
    assert [scored[id(sequence)] for sequence in asked] == [8, 8]
    assert [sequence.generated for sequence in asked] == [30, 30]


def time_to_first_token(
    tokenizer: Tokenizer, *, flood: int, every: int, prompt: int, sender: str = "flood"
) -> float:
    """Mean number of passes from arrival to first token of a tenant with constant load.

    Every `every` passes the first tenant sends one request and the second sends `flood`; at
    `flood=1` the two together are the node's capacity.
    """
    scheduler = Scheduler(make_cache(8, 256), 64, 8)
    quiet, arrived, waited = [], {}, {}
    for passes in range(400):
        if passes % every == 0:
            quiet.append(make_sequence(tokenizer, prompt, 1, queue_key="quiet"))
            arrived[quiet[-1]] = passes
            scheduler.add(quiet[-1])
            for _ in range(flood):
                scheduler.add(make_sequence(tokenizer, prompt, 2, queue_key=sender))
        run_pass(scheduler)
        for sequence in quiet:
            if sequence.generated:
                waited.setdefault(sequence, passes + 1 - arrived[sequence])
    late = [400 - arrived[sequence] for sequence in quiet if sequence not in waited]
    return sum([*waited.values(), *late]) / len(quiet)


@pytest.mark.parametrize(("every", "prompt"), [(4, 24), (8, 200)])
def test_a_flood_does_not_double_the_other_tenants_time_to_first_token(
    tokenizer: Tokenizer, every: int, prompt: int
) -> None:
    def wait(flood: int, sender: str = "flood") -> float:
        return time_to_first_token(
            tokenizer, flood=flood, every=every, prompt=prompt, sender=sender
        )

    assert wait(20) <= 2 * wait(1)
    assert wait(20, "quiet") > 10 * wait(1), "a tenant waits for its own flood"
