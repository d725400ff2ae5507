"""Sampling matches transformers' filters and penalties."""

from collections import Counter

import pytest
import torch
from transformers import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from deltadock.inference.engine.sampler import (
    SamplingParams,
    TokenSampler,
    apply_penalties,
    candidates,
    make_generator,
)
from deltadock.inference.model.added_tokens import Logits

PROMPT, ANSWER = [3, 3, 5, 8], [5, 9, 9, 9, 11]


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
    probabilities, ids = candidates(logits, params)
    actual = torch.zeros(97)
    actual[ids if ids is not None else slice(None)] = probabilities
    torch.testing.assert_close(actual, expected)


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
    actual = apply_penalties(logits, params, PROMPT + ANSWER, len(PROMPT))
    torch.testing.assert_close(actual, expected[0], rtol=0, atol=0)


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
    torch.testing.assert_close(
        apply_penalties(logits, params, PROMPT + answer, len(PROMPT)), expected
    )


@pytest.mark.parametrize("temperature", [0.0, 0.5])
def test_penalties_change_the_sample_but_not_the_log_probability(
    temperature: float,
) -> None:
    logits = torch.tensor([[2.0, 1.0, 0.0], [2.0, 1.0, 0.0]])
    scores = TokenSampler(Logits(logits))
    params = SamplingParams(temperature=temperature, logit_bias={2: 100.0}, logprobs=1)
    biased = scores.sample(0, params, make_generator(params, 0), [0], 1)
    assert biased.id == 2
    assert biased.logprob == pytest.approx(float(logits[0].log_softmax(-1)[2]))
    assert biased.top[0][0] == 0
    plain = SamplingParams(temperature=0)
    assert scores.sample(1, plain, None, [0], 1).id == 0, "a bias affects its own row only"


@pytest.mark.parametrize("temperature", [1e-6, 1e-40])
def test_a_tiny_temperature_is_greedy(temperature: float) -> None:
    params = SamplingParams(temperature=temperature)
    assert make_generator(params, 0) is None
    scores = TokenSampler(Logits(torch.tensor([[1.0, 9.0, 2.0]])))
    assert scores.sample(0, params, None, [0], 1).id == 1


def test_samples_follow_the_distribution() -> None:
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
    scores, params = TokenSampler(Logits(logits[None])), SamplingParams(seed=0)
    generator = make_generator(params, 0)
    drawn = [scores.sample(0, params, generator, [], 0).id for _ in range(4000)]
    shares = torch.bincount(torch.tensor(drawn), minlength=4) / 4000
    torch.testing.assert_close(shares, logits.exp(), atol=0.03, rtol=0)


def test_unseeded_requests_differ() -> None:
    draws = [
        torch.rand(4, generator=make_generator(SamplingParams(), 0)).tolist() for _ in range(2)
    ]
    assert draws[0] != draws[1]


@pytest.mark.parametrize("seed", [0, -1, 2**63 - 1, -(2**63)])
def test_any_64_bit_seed_is_accepted(seed: int) -> None:
    assert isinstance(make_generator(SamplingParams(seed=seed), 3), torch.Generator)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_non_finite_logits_raise(bad: float, temperature: float) -> None:
    logits = torch.zeros(2, 5)
    logits[1, 3] = bad
    params = SamplingParams(temperature=temperature)
    scores = TokenSampler(Logits(logits))
    assert scores.sample(0, params, make_generator(params, 0), [], 0).id in range(5)
    with pytest.raises(FloatingPointError, match="not finite"):
        scores.sample(1, params, make_generator(params, 0), [], 0)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_added_tokens_are_sampled_from_extended_rows_only(temperature: float) -> None:
    known = torch.zeros(4, 5)
    known[3, 0] = float("inf")
    added = torch.tensor([[50.0, 0.0], [0.0, float("nan")]])
    scores = TokenSampler(Logits(known, [([2, 0], torch.cat([known[[2, 0]], added], -1))]))
    params = SamplingParams(temperature=temperature, logprobs=2)
    generator = make_generator(params, 0)
    assert scores.sample(2, params, generator, [], 0).id == 5
    for _ in range(20):
        actual = scores.sample(1, params, generator, [], 0)
        assert actual.id in range(5)
        assert max(token for token, _ in actual.top) < 5
    for broken in (0, 3):
        with pytest.raises(FloatingPointError, match="not finite"):
            scores.sample(broken, params, generator, [], 0)
