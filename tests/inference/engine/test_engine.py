"""The engine answers like transformers, independent of the rest of the batch."""

import threading
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from deltadock.errors import InvalidArtifact
from deltadock.inference.model.weight_deltas import LowRank, TensorDelta
from tests.inference.merging import make_delta, merge

PROMPTS = [[1, 2, 3], [5] * 17, [7], list(range(20, 60)), [4, 4], [9] * 6]


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("llama", {"tie_word_embeddings": True}),
        ("llama", {"attention_bias": True, "num_key_value_heads": 4}),
        ("mistral", {"sliding_window": 8}),
        ("qwen2", {}),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1}),
        ("qwen3", {"tie_word_embeddings": True}),
    ],
)
def test_a_batch_of_base_and_deltas_answers_like_each_merged_model(
    make_bench: Any, make_model: Any, generate: Any, family: str, settings: dict[str, Any]
) -> None:
    base = make_model(family, **settings)
    bench = make_bench(base)
    deltas = {slot: make_delta(base, slot, low_rank=slot != 2) for slot in (1, 2)}
    models = {0: base} | {slot: merge(base, changes) for slot, changes in deltas.items()}
    for slot, changes in deltas.items():
        bench.install(slot, changes)
    jobs = [(prompt, (index + 1) % 3) for index, prompt in enumerate(PROMPTS)]
    jobs += [(PROMPTS[0], slot) for slot in models]
    outcomes = [bench.submit(prompt, slot) for prompt, slot in jobs]
    bench.finish(*outcomes)
    for (prompt, slot), outcome in zip(jobs, outcomes, strict=True):
        assert outcome.answer == generate(models[slot], prompt, 12)
    solo = [bench.run(PROMPTS[0], slot).answer for slot in models]
    assert solo == [outcome.answer for outcome in outcomes[-3:]]
    assert len({tuple(answer) for answer in solo}) == 3, "the deltas change the answers"


def test_removing_a_delta_restores_the_base(
    make_bench: Any, make_model: Any, generate: Any
) -> None:
    base = make_model("qwen2")
    bench = make_bench(base)
    bench.install(1, make_delta(base, 1))
    bench.model.remove(1)
    assert bench.run(PROMPTS[0], 1).answer == generate(base, PROMPTS[0], 12)


def test_seeded_sampling_does_not_depend_on_neighbours(make_bench: Any, make_model: Any) -> None:
    base = make_model("llama")
    bench = make_bench(base)
    bench.install(1, make_delta(base, 1))
    params = {"temperature": 0.9, "top_p": 0.95, "seed": 7}
    solo = bench.run(PROMPTS[0], 1, **params).answer
    crowd = [bench.submit(prompt, 0, temperature=1.0) for prompt in PROMPTS]
    crowded = bench.submit(PROMPTS[0], 1, **params)
    bench.finish(crowded, *crowd)
    assert crowded.answer == solo
    assert bench.run(PROMPTS[0], 1, choice=1, **params).answer != solo
    assert bench.run(PROMPTS[0], 1, **(params | {"seed": 8})).answer != solo


def test_penalties_and_bias_match_transformers_generate(make_bench: Any, make_model: Any) -> None:
    base = make_model("llama")
    bench = make_bench(base)
    bias = {7: 2.0, 73: -100.0}
    variants: list[dict[str, Any]] = [{}, {"repetition_penalty": 1.4}, {"logit_bias": bias}]
    variants.append(variants[1] | variants[2])
    outcomes = [bench.submit(prompt, **params) for prompt in PROMPTS for params in variants]
    bench.finish(*outcomes)
    expected = []
    for prompt in PROMPTS:
        for params in variants:
            settings = dict(params)
            if biases := settings.pop("logit_bias", None):
                settings["sequence_bias"] = [[[token], value] for token, value in biases.items()]
            tokens = torch.tensor([prompt])
            out = base.generate(
                tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=12, do_sample=False,
                eos_token_id=None, pad_token_id=0, **settings,
            )  # fmt: skip
            expected.append(out[0, len(prompt) :].tolist())
    assert [outcome.answer for outcome in outcomes] == expected
    assert len({tuple(answer) for answer in expected[:4]}) == 4, "each parameter changes the answer"


def test_frequency_and_presence_count_output_tokens_only(make_bench: Any, make_model: Any) -> None:
    base = make_model("llama")
    bench = make_bench(base)
    for frequency, presence in ((1.5, 0.5), (-1.0, 0.0), (0.0, 2.0)):
        tokens = list(PROMPTS[4])
        for _ in range(12):
            with torch.no_grad():
                logits = base(torch.tensor([tokens])).logits[0, -1]
            for token, count in Counter(tokens[2:]).items():
                logits[token] -= count * frequency + presence
            tokens.append(int(logits.argmax()))
        params = {"frequency_penalty": frequency, "presence_penalty": presence}
        assert bench.run(PROMPTS[4], **params).answer == tokens[2:]


def test_logprobs_match_the_model(make_bench: Any, make_model: Any) -> None:
    base = make_model("qwen3")
    outcome = make_bench(base).run(PROMPTS[1], logprobs=3, temperature=0.0)
    tokens_out = [token for event in outcome.events for token in event.tokens]
    tokens = torch.tensor([PROMPTS[1] + outcome.answer])
    with torch.no_grad():
        expected = base(tokens).logits[0].log_softmax(-1)[len(PROMPTS[1]) - 1 : -1]
    assert [token.id for token in tokens_out] == outcome.answer
    for token, row in zip(tokens_out, expected, strict=True):
        assert token.logprob == pytest.approx(float(row[token.id]), abs=1e-4)
        assert [i for i, _ in token.top] == row.topk(3).indices.tolist()


def test_an_end_of_sequence_token_ends_the_answer(
    make_bench: Any, make_model: Any, generate: Any
) -> None:
    base = make_model("llama")
    expected = generate(base, PROMPTS[0], 12)
    position = next(i for i, token in enumerate(expected) if i > 2 and token not in expected[:i])
    outcome = make_bench(base, eos=expected[position]).run(PROMPTS[0])
    assert outcome.finish == "stop"
    assert outcome.answer == expected[: position + 1]


def test_cancelling_frees_the_slot(make_bench: Any, make_model: Any) -> None:
    bench = make_bench(make_model("llama"), max_sequences=1)
    endless = bench.submit([1], max_tokens=60)
    bench.step()
    waiting = bench.submit([2])
    gone = bench.submit([3])
    bench.engine.cancel(gone.sequence)
    bench.engine.cancel(endless.sequence)
    bench.finish(endless, waiting, gone)
    assert [endless.finish, waiting.finish, gone.finish] == ["cancelled", "length", "cancelled"]
    assert len(endless.answer) < 60
    bench.engine.cancel(waiting.sequence)
    assert bench.run([4]).finish == "length", "cancelling an ended sequence has no effect"


def test_an_exception_in_one_sequence_fails_only_that_sequence(
    make_bench: Any, make_model: Any, generate: Any
) -> None:
    base = make_model("llama")
    bench = make_bench(base)
    broken = bench.submit(PROMPTS[0], temperature=1.0, logit_bias={10_000: 1.0})  # no such token
    other = bench.submit(PROMPTS[1])
    bench.finish(broken, other)
    assert broken.finish == "error"
    assert broken.events[-1].error.code == "inference_failed"
    assert other.answer == generate(base, PROMPTS[1], 12)


class LateMatcher:
    """A grammar of any text, whose masks after some tokens are there only when they are let go."""

    complete = False
    work = None

    def __init__(self, tokens: int) -> None:
        self.asked = threading.Event()
        self.let_go = threading.Event()
        self._left = tokens

    @property
    def ready(self) -> bool:
        if self._left:
            return True
        self.asked.set()
        return self.let_go.is_set()

    def fill(self, words: NDArray[np.int32]) -> None:
        assert self.ready
        words[:] = -1

    def accept(self, _: int) -> None:
        self._left = max(self._left - 1, 0)

    def start(self) -> None: ...
    def close(self) -> None: ...
    def register(self, _: object) -> None: ...


@pytest.mark.parametrize("tokens", [0, 1, 5])
def test_a_sequence_without_its_mask_holds_up_no_other(
    make_bench: Any, make_model: Any, generate: Any, tokens: int
) -> None:
    base = make_model("llama")
    bench = make_bench(base)
    matcher = LateMatcher(tokens)
    late = bench.submit(PROMPTS[0], matcher=matcher)
    assert matcher.asked.wait(30)
    others = [bench.run(prompt) for prompt in PROMPTS[1:3]]
    assert late.finish is None
    assert late.sequence.generated == tokens
    matcher.let_go.set()
    bench.finish(late)
    for outcome, prompt in zip((late, *others), PROMPTS, strict=False):
        assert outcome.answer == generate(base, prompt, 12)


def test_a_sequence_can_be_cancelled_while_it_waits_for_its_mask(
    make_bench: Any, make_model: Any
) -> None:
    bench = make_bench(make_model("llama"))
    matcher = LateMatcher(2)
    late = bench.submit(PROMPTS[0], matcher=matcher)
    assert matcher.asked.wait(30)
    bench.engine.cancel(late.sequence)
    bench.finish(late)
    assert late.finish == "cancelled"
    assert bench.engine.running == 0


def test_a_failing_pass_fails_only_the_sequences_that_cause_it(
    make_bench: Any, make_model: Any, generate: Any
) -> None:
    base = make_model("llama")
    bench = make_bench(base)
    bench.model.install(3, {"lm_head.weight": torch.ones(5, 5)})  # cannot be multiplied with
    outcomes = [bench.submit(prompt, slot) for slot in (0, 3, 0) for prompt in PROMPTS[:2]]
    bench.finish(*outcomes)
    assert [outcome.finish for outcome in outcomes] == ["length"] * 2 + ["error"] * 2 + [
        "length"
    ] * 2
    for outcome in (*outcomes[:2], *outcomes[4:]):
        assert outcome.answer == generate(base, outcome.sequence.tokens[:-12], 12)


@pytest.mark.parametrize("out_of", ["a pass with others", "a prompt alone"])
def test_out_of_memory_for_one_slot_fails_only_that_slot(
    make_bench: Any,
    make_model: Any,
    generate: Any,
    monkeypatch: pytest.MonkeyPatch,
    out_of: str,
) -> None:
    base = make_model("llama")
    bench = make_bench(base)
    forward = bench.model.forward

    def exhausted(tokens: torch.Tensor, step: Any, slots: list[int]) -> torch.Tensor:
        if 3 in slots:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(tokens, step, slots)

    monkeypatch.setattr(bench.model, "forward", exhausted)
    slots = (0, 3, 0) if out_of == "a pass with others" else (3,)
    outcomes = [bench.submit(prompt, slot) for slot in slots for prompt in PROMPTS[:2]]
    bench.finish(*outcomes)
    for outcome in outcomes:
        if outcome.sequence.delta_slot == 3:
            assert outcome.finish == "error"
            assert "out of memory" in outcome.events[-1].error.message
        else:
            assert outcome.answer == generate(base, outcome.sequence.tokens[:-12], 12)


def test_a_delta_of_nans_does_not_affect_others(
    make_bench: Any, make_model: Any, generate: Any
) -> None:
    base = make_model("llama")
    bench = make_bench(base, max_sequences=2)
    name = "model.layers.0.self_attn.v_proj.weight"
    bench.install(1, {name: torch.full_like(base.get_parameter(name), float("nan"))})
    others = [bench.submit([8], max_tokens=40)]
    broken = bench.submit(PROMPTS[3], 1)
    bench.finish(broken)
    others += [bench.submit([6], max_tokens=8)]  # reuses the broken sequence's cache slot
    bench.finish(*others)
    assert broken.finish == "error"
    assert [outcome.answer for outcome in others] == [
        generate(base, [8], 40),
        generate(base, [6], 8),
    ]


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("model.layers.9.mlp.up_proj.weight", torch.ones(2, 2)),
        ("model.norm.weight", torch.ones(31)),
        ("model.norm.weight", LowRank(torch.ones(32, 1), torch.ones(1, 1))),
        ("model.layers.0.mlp.up_proj.weight", LowRank(torch.ones(48, 2), torch.ones(3, 32))),
        ("model.layers.0.mlp.up_proj.weight", LowRank(torch.ones(32, 2), torch.ones(2, 48))),
    ],
)
def test_a_delta_of_another_shape_is_refused(
    make_bench: Any, make_model: Any, name: str, change: TensorDelta
) -> None:
    with pytest.raises(InvalidArtifact, match=name):
        make_bench(make_model("llama")).model.prepare({name: change})
