"""Deltas that add tokens, in one batch with the base and other deltas."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from deltadock.errors import InvalidArtifact
from deltadock.inference.model.added_tokens import PADDING, Logits
from deltadock.inference.model.attention import Span, make_attention_metadata
from deltadock.inference.model.model import DeltaModel
from deltadock.inference.model.weight_deltas import NewRows, TensorDelta
from tests.inference.conftest import VOCABULARY, Bench
from tests.inference.merging import make_delta, merge

ADDED = 5
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
PLAIN = [1, 2, 3, 250, 7]
OWN = [1, VOCABULARY, 3, VOCABULARY + ADDED - 1, 7]
"""A prompt with added tokens."""

TIED = pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])


def deltas(base: Any) -> dict[int, dict[str, TensorDelta]]:
    """Slot 1 adds no tokens; the others do, each with another delta of the old rows."""
    unchanged = make_delta(base, 4, added=ADDED - 2)
    for name, change in unchanged.items():
        if isinstance(change, NewRows):
            unchanged[name] = NewRows(None, change.added)
    return {
        1: make_delta(base, 1),
        2: make_delta(base, 2, added=ADDED),
        3: make_delta(base, 3, added=ADDED, low_rank=False),
        4: unchanged,
    }


@pytest.fixture
def fill(make_bench: Callable[..., Bench], make_model: Any) -> Callable[[bool], tuple[Any, Bench]]:
    """`fill(tied)`: a base, and an engine on it with `deltas` in its slots."""

    def make(tied: bool) -> tuple[Any, Bench]:
        base = make_model("qwen3", tie_word_embeddings=tied)
        bench = make_bench(base, max_sequences=8)
        for slot, changes in deltas(base).items():
            bench.install(slot, changes)
        return base, bench

    return make


def prompt_of(slot: int) -> list[int]:
    return OWN if slot in (2, 3) else [VOCABULARY + 2, *PLAIN] if slot == 4 else PLAIN


@TIED
def test_a_batch_answers_like_each_merged_model(fill: Any, generate: Any, tied: bool) -> None:
    base, bench = fill(tied)
    models = {0: base} | {slot: merge(base, changes) for slot, changes in deltas(base).items()}
    outcomes = {slot: bench.submit(prompt_of(slot), slot) for slot in models}
    bench.finish(*outcomes.values())
    for slot, model in models.items():
        assert bench.model.vocabulary(slot) == model.config.vocab_size
        assert outcomes[slot].answer == generate(model, prompt_of(slot), 12)
        assert bench.run(prompt_of(slot), slot).answer == outcomes[slot].answer
    assert any(token >= VOCABULARY for slot in (2, 3, 4) for token in outcomes[slot].answer)


@TIED
def test_sampling_does_not_depend_on_neighbours(fill: Any, tied: bool) -> None:
    """Nor is a token beyond a slot's vocabulary sampled, even at a high temperature."""
    _, bench = fill(tied)
    params = {"temperature": 5.0, "seed": 7, "max_tokens": 40, "logprobs": 5}
    together = {slot: bench.submit(prompt_of(slot), slot, **params) for slot in range(5)}
    bench.finish(*together.values())
    for slot, outcome in together.items():
        assert outcome.answer == bench.run(prompt_of(slot), slot, **params).answer
        tokens_out = [token for event in outcome.events for token in event.tokens]
        ids = {token.id for token in tokens_out} | {i for token in tokens_out for i, _ in token.top}
        assert (max(ids) >= VOCABULARY) == (slot > 1)
        assert max(ids) < bench.model.vocabulary(slot)


def pass_over(model: DeltaModel, prompts: list[list[int]]) -> Logits:
    """Logits of prompt i on slot i; all prompts have the same length."""
    length = len(prompts[0])
    spans = [Span(i, i * length, (i + 1) * length, 0) for i in range(len(prompts))]
    slots = [slot for slot, prompt in enumerate(prompts) for _ in prompt]
    with torch.inference_mode():
        step = make_attention_metadata(model.make_cache(len(prompts), 8), spans)
        hidden = model.forward(torch.tensor(prompts).flatten(), step, slots)
        return model.logits(hidden, slots)


@TIED
def test_other_rows_are_bitwise_equal(fill: Any, tied: bool) -> None:
    base, bench = fill(tied)
    model, changes = bench.model, deltas(base)[2]
    logits = pass_over(model, [PLAIN, PLAIN, OWN])
    longer = pass_over(model, [PLAIN, PLAIN, PLAIN])
    model.remove(2)
    old = {n: one.old if isinstance(one, NewRows) else one for n, one in changes.items()}
    bench.install(2, old)
    without = pass_over(model, [PLAIN, PLAIN, PLAIN])
    others = 2 * len(PLAIN)
    assert without.values.shape[1] == VOCABULARY
    assert torch.equal(logits.values[:others, :VOCABULARY], without.values[:others])
    assert (logits.values[:others, VOCABULARY:] == PADDING).all()
    assert torch.equal(longer.values[:, :VOCABULARY], without.values)
    assert [len(row) for row in logits.rows()] == [VOCABULARY] * others + [VOCABULARY + ADDED] * 5


def test_removing_a_delta_removes_its_tokens(fill: Any, generate: Any) -> None:
    base, bench = fill(False)
    bench.model.remove(2)
    assert bench.model.vocabulary(2) == VOCABULARY
    assert bench.run(PLAIN, 2).answer == generate(base, PLAIN, 12)


def test_empty_added_rows_add_no_token(fill: Any, generate: Any) -> None:
    base, bench = fill(False)
    none = NewRows(None, torch.empty(0, 32))
    bench.install(5, {EMBEDDING: none, HEAD: none})
    outcomes = [bench.submit(PLAIN, 5), bench.submit(OWN, 2)]
    bench.finish(*outcomes)
    assert bench.model.vocabulary(5) == VOCABULARY
    assert outcomes[0].answer == generate(base, PLAIN, 12)


def rows(count: int, columns: int = 32) -> NewRows:
    return NewRows(None, torch.ones(count, columns))


def matrix(*shape: int) -> Tensor:
    return torch.ones(shape)


@pytest.mark.parametrize(
    ("tied", "changes", "words"),
    [
        (False, {EMBEDDING: rows(2), HEAD: rows(2, 31)}, "'lm_head.weight' does not fit"),
        (True, {EMBEDDING: rows(2, 33)}, "'model.embed_tokens.weight' does not fit"),
        (False, {EMBEDDING: rows(2)}, "2 tokens to the embedding, but 0 to the head"),
        (False, {HEAD: rows(3)}, "0 tokens to the embedding, but 3 to the head"),
        (False, {EMBEDDING: rows(2), HEAD: rows(1)}, "2 tokens to the embedding, but 1 to the"),
        (True, {EMBEDDING: rows(2), HEAD: rows(1)}, "2 tokens to the embedding, but 1 to the"),
        (True, {"model.layers.0.mlp.up_proj.weight": rows(2)}, "not have one row per token"),
        (True, {"model.norm.weight": rows(2)}, "'model.norm.weight' does not fit"),
        (True, {EMBEDDING: NewRows(matrix(9, 32), matrix(2, 32))}, "does not fit"),
    ],
)
def test_rows_that_do_not_fit_are_refused(
    make_bench: Callable[..., Bench],
    make_model: Any,
    tied: bool,
    changes: dict[str, TensorDelta],
    words: str,
) -> None:
    model = make_bench(make_model("qwen3", tie_word_embeddings=tied)).model
    with pytest.raises(InvalidArtifact, match=words):
        model.prepare(changes)
