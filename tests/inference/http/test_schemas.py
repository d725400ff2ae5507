"""What a request asks for as the engine takes it."""

from typing import Any

import pytest

from deltadock.inference.engine.sampler import SamplingParams
from deltadock.inference.http.chat_schemas import ChatRequest
from deltadock.inference.http.schemas import CompletionRequest
from deltadock.inference.prompts.generation_config import SamplingDefaults

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


@ROUTES
def test_a_silent_request_is_sampled_as_published(make: Any) -> None:
    assert make().sampling(PUBLISHED, 16) == SamplingParams(
        max_tokens=16, temperature=0.6, top_p=0.9, top_k=20, min_p=0.1, repetition_penalty=1.05
    )


@ROUTES
def test_what_is_asked_for_comes_first(make: Any) -> None:
    assert make(**ASKED).sampling(PUBLISHED, 100) == SamplingParams(
        max_tokens=9,
        temperature=0.0,
        repetition_penalty=1.0,
        frequency_penalty=0.5,
        presence_penalty=-0.5,
        logit_bias={7: 3.0, 12: -100.0},
        seed=5,
        stop=("a",),
    )


def test_a_completion_without_a_limit_has_openais_or_what_room_there_is() -> None:
    silent = CompletionRequest(model="m", prompt="a")
    assert [silent.sampling(PUBLISHED, room).max_tokens for room in (1, 15, 500)] == [1, 15, 16]
