"""Sequences share a prompt's prefill, on the same weights only, with equal answers."""

import threading
from typing import Any

import pytest
import torch

from deltadock.inference.engine.sampling import SamplingParams, make_draws
from tests.inference.merging import make_delta, merge

PROMPT = list(range(40, 90))
SAMPLED = {"temperature": 0.9, "top_p": 0.95, "seed": 11}


@pytest.fixture
def rows(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Records the rows of every pass."""
    from deltadock.inference.model.model import DeltaModel

    counted: list[int] = []
    forward = DeltaModel.forward

    def count(self: DeltaModel, tokens: torch.Tensor, *rest: Any) -> torch.Tensor:
        counted.append(len(tokens))
        return forward(self, tokens, *rest)

    monkeypatch.setattr(DeltaModel, "forward", count)
    return counted


def test_a_conversation_continues_from_its_cached_prefix(
    make_bench: Any, make_model: Any, generate: Any, rows: list[int]
) -> None:
    base = make_model("llama")
    bench = make_bench(base, context_tokens=128, pass_tokens=64)
    first = bench.run(PROMPT, max_tokens=6)
    rows.clear()
    longer = [*PROMPT, *first.answer, 7, 8, 9]
    assert bench.run(longer, max_tokens=6).answer == generate(base, longer, 6)
    assert rows == [4, 1, 1, 1, 1, 1]
    assert bench.engine.reused_tokens == len(PROMPT) + 5


def test_a_prefix_is_not_shared_with_other_weights(
    make_bench: Any, make_model: Any, generate: Any, rows: list[int]
) -> None:
    base = make_model("llama")
    bench = make_bench(base, context_tokens=128, pass_tokens=64)
    bench.install(1, changes := make_delta(base, 1))
    bench.run(PROMPT, 0, max_tokens=2)
    rows.clear()
    assert bench.run(PROMPT, 1).answer == generate(merge(base, changes), PROMPT, 12)
    assert rows[0] == len(PROMPT)
    assert bench.engine.reused_tokens == 0


@pytest.mark.parametrize("params", [{}, SAMPLED], ids=["greedy", "sampled"])
def test_one_prompt_on_several_deltas_is_answered_like_alone(
    make_bench: Any, make_model: Any, params: dict[str, Any]
) -> None:
    base = make_model("qwen2")
    bench = make_bench(base, context_tokens=128, pass_tokens=32, max_sequences=6, cache_slots=8)
    for slot in (1, 2):
        bench.install(slot, make_delta(base, slot))
    alone = [bench.run(PROMPT, slot, **params).answer for slot in (0, 1, 2)]
    assert len(set(map(tuple, alone))) == 3
    crowd = [bench.submit([3, slot], slot, temperature=1.0, max_tokens=20) for slot in (0, 1, 2)]
    together = [bench.submit(PROMPT, slot, **params) for slot in (2, 0, 1, 1, 0, 2)]
    bench.finish(*crowd, *together)
    assert [outcome.answer for outcome in together] == [alone[i] for i in (2, 0, 1, 1, 0, 2)]
    assert bench.engine.reused_tokens >= 6 * (len(PROMPT) - 1)


def test_answers_to_one_request_share_its_prompt_and_equal_their_solo_runs(
    make_bench: Any, make_model: Any, rows: list[int]
) -> None:
    base = make_model("llama")
    bench = make_bench(base, context_tokens=128, pass_tokens=64)
    answers = [bench.submit(PROMPT, choice=choice, **SAMPLED) for choice in range(3)]
    bench.finish(*answers)
    assert sum(rows) == len(PROMPT) + 2 + 3 * 11
    bench = make_bench(base, context_tokens=128, pass_tokens=64)
    for choice, answer in enumerate(answers):
        seed = SAMPLED["seed"] + choice
        assert bench.run(PROMPT, **(SAMPLED | {"seed": seed})).answer == answer.answer
    assert len({tuple(answer.answer) for answer in answers}) == 3


def test_each_choice_has_its_own_seed() -> None:
    params = SamplingParams(seed=2**63 - 1)
    first, second = (make_draws(params, choice) for choice in (0, 1))
    assert first.at(0) != second.at(0)


def test_a_preempted_sequence_continues_unchanged(make_bench: Any, make_model: Any) -> None:
    base = make_model("llama")
    bench = make_bench(base, context_tokens=128, pass_tokens=64, max_sequences=2)
    bench.install(1, make_delta(base, 1))
    params = SAMPLED | {"max_tokens": 40}
    alone = [bench.run([9, 9], **params).answer, bench.run([8], **params).answer]
    first = [bench.submit([9, 9], **params), bench.submit([8], **params)]
    while min(len(outcome.answer) for outcome in first) < 5:
        bench.step()
    late = bench.submit([7], 1, max_tokens=3)
    while late.finish is None:
        bench.step()
    assert all(outcome.finish is None for outcome in first), "it was admitted before they ended"
    bench.finish(*first)
    assert [outcome.answer for outcome in first] == alone


def test_a_cancelled_sequence_is_removed_before_the_next_pass(
    make_bench: Any, make_model: Any, rows: list[int]
) -> None:
    bench = make_bench(make_model("llama"))
    outcomes = [bench.submit([5, choice], max_tokens=50) for choice in range(3)]
    while min(len(outcome.answer) for outcome in outcomes) < 2:
        bench.step()
    held, go_on = threading.Event(), threading.Event()

    def hold() -> None:
        held.set()
        go_on.wait(30)

    bench.engine._inbox.put(hold)
    assert held.wait(30)
    for outcome in outcomes[:2]:
        bench.engine.cancel(outcome.sequence)
    rows.clear()
    go_on.set()
    bench.finish(*outcomes)
    assert set(rows) == {1}
    assert [outcome.finish for outcome in outcomes] == ["cancelled", "cancelled", "length"]


def test_a_broken_deltas_prefix_is_not_cached(make_bench: Any, make_model: Any) -> None:
    base = make_model("llama")
    bench = make_bench(base, max_sequences=1)
    name = "model.layers.1.self_attn.k_proj.weight"
    bench.install(1, {name: torch.full_like(base.get_parameter(name), float("inf"))})
    assert bench.run(PROMPT[:20], 1).finish == "error"
    bench.model.remove(1)  # the same digest, now without NaN
    assert bench.run(PROMPT[:20], 1).answer == bench.run(PROMPT[:20], 0).answer
    assert bench.engine.reused_tokens == 0
