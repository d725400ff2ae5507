"""Sampling parameters of a request, with the model's defaults."""

from dataclasses import fields
from typing import Any

import pytest

from deltadock.errors import ContextExceeded
from deltadock.inference.engine.sampling import SamplingParams
from deltadock.inference.prompts.chat import TemplateSandbox
from deltadock.inference.prompts.tokenizer import SamplingDefaults, Tokenizer
from deltadock.inference.request import encode, requested_sampling, sampling_params
from deltadock.openai.chat import ChatRequest
from deltadock.openai.completions import CompletionRequest
from deltadock.openai.fields import AnswerFields

PUBLISHED = SamplingDefaults(
    temperature=0.6, top_p=0.9, top_k=20, min_p=0.1, repetition_penalty=1.05
)
ASKED: dict[str, Any] = {
    "temperature": 0, "top_p": 1, "top_k": -1, "min_p": 0, "repetition_penalty": 1,
    "frequency_penalty": 0.5, "presence_penalty": -0.5, "logit_bias": {"7": 3, "12": -100},
    "seed": 5, "stop": "a", "max_tokens": 9,
}  # fmt: skip
ROUTES = pytest.mark.parametrize(
    "make",
    [
        lambda **how: CompletionRequest(model="m", prompt="a", **how),
        lambda **how: ChatRequest(model="m", messages=[{"role": "user", "content": "a"}], **how),
    ],
)


def test_requests_have_every_parameter_of_the_sampler() -> None:
    parameters = {one.name for one in fields(SamplingParams)}
    by_route = {"max_tokens", "logprobs", "prompt_logprobs"}
    assert parameters - by_route <= AnswerFields.model_fields.keys()


@ROUTES
def test_unset_parameters_are_the_models_defaults(make: Any) -> None:
    assert requested_sampling(make(), PUBLISHED, 16) == SamplingParams(
        max_tokens=16, temperature=0.6, top_p=0.9, top_k=20, min_p=0.1, repetition_penalty=1.05
    )


@ROUTES
def test_request_parameters_override_defaults(make: Any) -> None:
    assert requested_sampling(make(**ASKED), PUBLISHED, 100) == SamplingParams(
        max_tokens=9,
        temperature=0.0,
        repetition_penalty=1.0,
        frequency_penalty=0.5,
        presence_penalty=-0.5,
        logit_bias={7: 3.0, 12: -100.0},
        seed=5,
        stop=("a",),
    )


def test_a_completions_default_limit_is_16_tokens_or_the_room_left() -> None:
    silent = CompletionRequest(model="m", prompt="a")
    assert [requested_sampling(silent, PUBLISHED, room).max_tokens for room in (1, 15, 500)] == [
        1,
        15,
        16,
    ]


@ROUTES
def test_an_answer_ends_with_the_context(make: Any) -> None:
    assert requested_sampling(make(max_tokens=10_000), PUBLISHED, 7).max_tokens == 7


def test_the_longest_prompt_cuts_no_other_answer() -> None:
    prompts = [[1] * 90, [1] * 10]
    request = CompletionRequest(model="m", prompt=prompts, max_tokens=50)
    samplings = sampling_params(request, PUBLISHED, prompts, 100, 264)
    assert [sampling.max_tokens for sampling in samplings] == [10, 50]


def test_a_text_whose_length_exceeds_the_context_is_refused_unencoded(tokenizer: Tokenizer) -> None:
    """The longest token is `<special-0>`, of eleven characters."""
    templates = TemplateSandbox()
    longest = "<special-0>" * 9
    [tokens] = encode([longest], tokenizer, templates, 10, 264, None)
    assert tokens == [256] * 9
    with pytest.raises(ContextExceeded, match="has at least 10 tokens; together"):
        encode([longest + "a"], tokenizer, templates, 10, 264, None)
