"""What may be drawn is what transformers would allow, in the right proportions."""

import pytest
import torch
from transformers import (
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from inference.engine.sampler import SamplingParams, Scores, candidates, make_generator


@pytest.mark.parametrize("temperature", [0.3, 1.0, 1.7])
@pytest.mark.parametrize("top_k", [0, 1, 7, 500])
@pytest.mark.parametrize("top_p", [1.0, 0.9, 0.2])
@pytest.mark.parametrize("min_p", [0.0, 0.05, 1.0])
def test_the_filters_are_those_of_transformers(
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
    found = torch.zeros(97)
    found[ids if ids is not None else slice(None)] = probabilities
    torch.testing.assert_close(found, expected)


def test_draws_follow_the_distribution() -> None:
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
    scores, params = Scores(logits[None]), SamplingParams(seed=0)
    generator = make_generator(params, 0)
    drawn = [scores.sample(0, params, generator).id for _ in range(4000)]
    shares = torch.bincount(torch.tensor(drawn), minlength=4) / 4000
    torch.testing.assert_close(shares, logits.exp(), atol=0.03, rtol=0)


def test_without_a_seed_two_requests_draw_different_numbers() -> None:
    draws = [
        torch.rand(4, generator=make_generator(SamplingParams(), 0)).tolist() for _ in range(2)
    ]
    assert draws[0] != draws[1]


@pytest.mark.parametrize("seed", [0, -1, 2**63 - 1, -(2**63)])
def test_any_seed_of_64_bits_will_do(seed: int) -> None:
    assert isinstance(make_generator(SamplingParams(seed=seed), 3), torch.Generator)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_broken_logits_are_refused(bad: float, temperature: float) -> None:
    logits = torch.zeros(2, 5)
    logits[1, 3] = bad
    params = SamplingParams(temperature=temperature)
    scores = Scores(logits)
    assert scores.sample(0, params, make_generator(params, 0)).id in range(5)
    with pytest.raises(FloatingPointError, match="not finite"):
        scores.sample(1, params, make_generator(params, 0))
