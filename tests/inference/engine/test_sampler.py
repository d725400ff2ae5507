"""Sampling matches transformers' filters and penalties."""

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, cast

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from deltadock.inference.engine.sampler import (
    SampledToken,
    SampleRequest,
    SamplingParams,
    adjust,
    make_generator,
    probabilities,
    sample,
)
from deltadock.inference.model.added_tokens import Logits
from deltadock.inference.prompts.grammar import TokenMatcher

PROMPT, ANSWER = [3, 3, 5, 8], [5, 9, 9, 9, 11]


def request(
    params: SamplingParams,
    row: int = 0,
    tokens: Sequence[int] = PROMPT + ANSWER,
    prompt_length: int = len(PROMPT),
    matcher: Any = None,
) -> SampleRequest:
    generator = make_generator(params, 0)
    return SampleRequest(row, params, generator, tokens, prompt_length, matcher)


def token(answer: SampledToken | Exception) -> int:
    assert isinstance(answer, SampledToken)
    return answer.id


@pytest.mark.parametrize("temperature", [0.3, 1.0, 1.7])
@pytest.mark.parametrize("top_k", [0, 1, 7, 500])
@pytest.mark.parametrize("top_p", [1.0, 0.9, 0.2])
@pytest.mark.parametrize("min_p", [0.0, 0.05, 1.0])
def test_filters_match_transformers(
    temperature: float, top_k: int, top_p: float, min_p: float
) -> None:
    logits = torch.randn(97, generator=torch.Generator().manual_seed(0)) * 2
    scores = TemperatureLogitsWarper(temperature)(None, logits[None])
    if top_k:
        scores = TopKLogitsWarper(top_k)(None, scores)
    if top_p < 1:
        scores = TopPLogitsWarper(top_p)(None, scores)
    if min_p:
        scores = MinPLogitsWarper(min_p)(None, scores)
    expected = scores[0].softmax(-1)
    params = SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    torch.testing.assert_close(probabilities(logits[None], [request(params)])[0], expected)


@pytest.mark.parametrize("repetition_penalty", [1.0, 1.3, 0.7])
@pytest.mark.parametrize("logit_bias", [{}, {5: 100.0, 9: -100.0, 20: 0.5}])
def test_bias_and_repetition_penalty_match_transformers(
    repetition_penalty: float, logit_bias: dict[int, float]
) -> None:
    logits = torch.randn(97, generator=torch.Generator().manual_seed(0)) * 2
    expected, tokens = logits[None], torch.tensor([PROMPT + ANSWER])
    if logit_bias:
        biases = [[[token], bias] for token, bias in logit_bias.items()]
        expected = SequenceBiasLogitsProcessor(biases)(tokens, expected)
    expected = RepetitionPenaltyLogitsProcessor(repetition_penalty)(tokens, expected)
    params = SamplingParams(repetition_penalty=repetition_penalty, logit_bias=logit_bias)
    actual = adjust(logits[None], [request(params)])
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


@pytest.mark.parametrize("frequency", [0, 0.5, -2.0])
@pytest.mark.parametrize("presence", [0, 1.5, -0.25])
@pytest.mark.parametrize("answer", [[], ANSWER])
def test_frequency_and_presence_penalties_match_openais_formula(
    frequency: float, presence: float, answer: list[int]
) -> None:
    """mu[j] - c[j] * alpha_frequency - float(c[j] > 0) * alpha_presence, c of the answer alone."""
    logits = torch.randn(97, generator=torch.Generator().manual_seed(0))
    expected = logits.clone()
    for token, count in Counter(answer).items():
        expected[token] += -count * frequency - float(count > 0) * presence
    params = SamplingParams(frequency_penalty=frequency, presence_penalty=presence)
    actual = adjust(logits[None], [request(params, tokens=PROMPT + answer)])
    torch.testing.assert_close(actual[0], expected)


@pytest.mark.parametrize("temperature", [0.0, 0.5])
def test_penalties_change_the_sample_but_not_the_log_probability(temperature: float) -> None:
    logits = torch.tensor([[2.0, 1.0, 0.0], [2.0, 1.0, 0.0]])
    params = SamplingParams(temperature=temperature, logit_bias={2: 100.0}, logprobs=1)
    plain = SamplingParams(temperature=0)
    rows = [request(params, 0, [0], 1), request(plain, 1, [0], 1)]
    biased, unbiased = sample(Logits(logits), rows)
    assert isinstance(biased, SampledToken)
    assert biased.id == 2
    assert biased.logprob == pytest.approx(float(logits[0].log_softmax(-1)[2]))
    assert [alternative for alternative, _ in biased.top] == [0]
    assert unbiased == SampledToken(0), "a bias affects its own row only"


@pytest.mark.parametrize("temperature", [1e-6, 1e-40])
def test_a_tiny_temperature_is_greedy(temperature: float) -> None:
    params = SamplingParams(temperature=temperature)
    assert make_generator(params, 0) is None
    assert sample(Logits(torch.tensor([[1.0, 9.0, 2.0]])), [request(params)]) == [SampledToken(1)]


def test_samples_follow_the_distribution() -> None:
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
    drawn = [request(SamplingParams(seed=seed), seed) for seed in range(4000)]
    tokens = [token(answer) for answer in sample(Logits(logits.expand(4000, 4)), drawn)]
    shares = torch.bincount(torch.tensor(tokens), minlength=4) / 4000
    torch.testing.assert_close(shares, logits.exp(), atol=0.03, rtol=0)


class TopNumbers:
    """A generator that only draws the largest number."""

    def random(self) -> float:
        return 1 - 2**-53


def test_the_largest_random_number_draws_a_token_that_may_be_sampled() -> None:
    logits = torch.full((1, 1000), -1.0)
    logits[0, 7:9] = torch.tensor([3.0, 2.0])
    for top_k in (1, 2):
        params = SamplingParams(top_k=top_k)
        drawn = replace(request(params), generator=cast("random.Random", TopNumbers()))
        assert token(sample(Logits(logits), [drawn])[0]) == 6 + top_k


def test_unseeded_requests_differ() -> None:
    generators = [make_generator(SamplingParams(), 0) for _ in range(2)]
    assert len({generator.random() for generator in generators if generator}) == 2


@pytest.mark.parametrize("seed", [0, -1, 2**63 - 1, -(2**63)])
def test_any_64_bit_seed_is_accepted(seed: int) -> None:
    params = SamplingParams(seed=seed)
    generators = [make_generator(params, choice) for choice in (3, 3, 4)]
    first, again, next_choice = [generator.random() for generator in generators if generator]
    assert first == again != next_choice


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_only_rows_that_are_not_finite_fail(bad: float, temperature: float) -> None:
    logits = torch.zeros(2, 5)
    logits[1, 3] = bad
    params = SamplingParams(temperature=temperature, top_p=0.9)
    good, broken = sample(Logits(logits), [request(params, 0), request(params, 1)])
    assert token(good) in range(5)
    assert isinstance(broken, FloatingPointError)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_added_tokens_are_sampled_from_extended_rows_only(temperature: float) -> None:
    known = torch.zeros(4, 5)
    known[3, 0] = float("inf")
    added = torch.tensor([[50.0, 0.0], [0.0, float("nan")]])
    logits = Logits(known, [([2, 0], torch.cat([known[[2, 0]], added], -1))])
    params = SamplingParams(temperature=temperature, logprobs=2)
    order = [3, 1, 2, 0, *[1] * 20]
    answers = sample(logits, [request(params, row) for row in order])
    assert token(answers[2]) == 5
    for answer in (answers[1], *answers[4:]):
        assert isinstance(answer, SampledToken)
        assert answer.id in range(5)
        assert max(token for token, _ in answer.top) < 5
    for broken in (answers[0], answers[3]):
        assert isinstance(broken, FloatingPointError)


VOCABULARY = 70
"""More than two words of a grammar's mask."""


class SomeTokens:
    """Allows the tokens of an answer as a grammar would."""

    def __init__(self, tokens: frozenset[int]) -> None:
        self._tokens = tokens

    def allowed(self) -> np.ndarray:
        words = np.zeros(-(-VOCABULARY // 32), dtype=np.uint32)
        for one in self._tokens:
            words[one // 32] |= np.uint32(1 << one % 32)
        return words.view(np.int32)


token_ids = st.integers(0, VOCABULARY - 1)
settings = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.0, 0.0, 0.4, 1.0, 2.0]),
    top_k=st.sampled_from([0, 1, 5, VOCABULARY]),
    top_p=st.sampled_from([1.0, 0.9, 0.1]),
    min_p=st.sampled_from([0.0, 0.1]),
    repetition_penalty=st.sampled_from([1.0, 1.3]),
    frequency_penalty=st.sampled_from([0.0, 0.5]),
    presence_penalty=st.sampled_from([0.0, -1.0]),
    logit_bias=st.dictionaries(token_ids, st.floats(-5, 5), max_size=3),
    seed=st.integers(0, 2**32),
    logprobs=st.sampled_from([None, 0, 3]),
)
requested = st.tuples(
    settings,
    st.lists(token_ids, min_size=2, max_size=6),
    st.none() | st.frozensets(token_ids, min_size=1, max_size=5),
)


@given(st.lists(requested, min_size=2, max_size=8), st.integers(0, 2**32))
def test_a_row_does_not_depend_on_its_neighbours(
    rows: list[tuple[SamplingParams, list[int], frozenset[int] | None]], seed: int
) -> None:
    logits = 3 * torch.randn(len(rows), VOCABULARY, generator=torch.Generator().manual_seed(seed))
    logits = logits.bfloat16().float()  # with equals, as models have them

    def one(row: int, place: int) -> SampleRequest:
        params, tokens, allowed = rows[row]
        matcher = cast("TokenMatcher", SomeTokens(allowed)) if allowed else None
        return request(params, place, tokens, 1, matcher)

    together = sample(Logits(logits), [one(row, row) for row in range(len(rows))])
    for row, answer in enumerate(together):
        assert [answer] == sample(Logits(logits[row : row + 1]), [one(row, 0)])
        allowed = rows[row][2]
        assert allowed is None or token(answer) in allowed


class Operators(TorchDispatchMode):
    """Counts operators and copies to the host."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = Counter[str]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls[str(func)] += 1
        return func(*args, **kwargs or {})


@pytest.mark.parametrize(
    ("params", "bound"),
    [
        (SamplingParams(temperature=0), 10),
        (SamplingParams(seed=0), 30),
        (
            SamplingParams(
                seed=0, top_k=9, top_p=0.9, min_p=0.1, repetition_penalty=1.1, logprobs=3,
                frequency_penalty=0.1, logit_bias={3: 1.0},
            ),
            95,
        ),
    ],
)  # fmt: skip
def test_operators_do_not_depend_on_the_number_of_rows(params: SamplingParams, bound: int) -> None:
    counts = []
    for rows in (1, 16):
        logits = Logits(torch.randn(rows, VOCABULARY))
        requests = [request(params, row) for row in range(rows)]
        with Operators() as operators:
            sample(logits, requests)
        assert not operators.calls["aten._local_scalar_dense.default"], "values copied one by one"
        counts.append(operators.calls.total())
    assert counts[0] <= counts[1] + 8
    assert max(counts) <= bound, counts
