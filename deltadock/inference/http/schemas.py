"""Completions as the node reads and answers them."""

from typing import Final, Literal, TypeVar

from pydantic import BaseModel, ConfigDict

from deltadock.inference.engine.sampler import SamplingParams
from deltadock.inference.prompts.generation_config import SamplingDefaults
from deltadock.openai import completions
from deltadock.openai.fields import SamplingFields

COMPLETION_TOKENS: Final = 16

Number = TypeVar("Number", int, float)


def sampling_params(
    request: SamplingFields, defaults: SamplingDefaults, max_tokens: int, logprobs: int | None
) -> SamplingParams:
    """The engine's form of a request's settings, the model's own where it is silent."""
    stop = [request.stop] if isinstance(request.stop, str) else request.stop or []
    return SamplingParams(
        max_tokens=max_tokens,
        temperature=_either(request.temperature, defaults.temperature),
        top_p=_either(request.top_p, defaults.top_p),
        top_k=max(_either(request.top_k, defaults.top_k), 0),
        min_p=_either(request.min_p, defaults.min_p),
        repetition_penalty=_either(request.repetition_penalty, defaults.repetition_penalty),
        frequency_penalty=request.frequency_penalty or 0.0,
        presence_penalty=request.presence_penalty or 0.0,
        logit_bias={int(token): bias for token, bias in (request.logit_bias or {}).items()},
        seed=request.seed,
        stop=tuple(text for text in stop if text),
        logprobs=logprobs,
    )


def _either(asked: Number | None, default: Number) -> Number:
    return default if asked is None else asked


class CompletionRequest(completions.CompletionRequest):
    """A request for /v1/completions."""

    model_config = ConfigDict(
        json_schema_extra={
            "example": {
                "model": "dlt_4u2ohyvyq6dmrmtscfsdk7jobe",
                "prompt": "Q: 12+30? A:",
                "max_tokens": 8,
                "temperature": 0,
            }
        }
    )

    def prompts(self) -> list[str | list[int]]:
        """The prompts, also where there is only one."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        parts: list[str | list[int] | int] = [*self.prompt]
        tokens = [part for part in parts if isinstance(part, int)]
        return [tokens] if tokens else [part for part in parts if not isinstance(part, int)]

    def sampling(self, defaults: SamplingDefaults, room: int) -> SamplingParams:
        """The engine's form of the settings; of the `room` tokens, OpenAI's 16 unless asked."""
        asked = self.max_tokens or min(COMPLETION_TOKENS, room)
        return sampling_params(self, defaults, asked, self.logprobs)


class Logprobs(BaseModel):
    """Log-probabilities (nats) of the tokens of one choice."""

    tokens: list[str] = []
    token_logprobs: list[float] = []
    top_logprobs: list[dict[str, float]] = []
    text_offset: list[int] = []


class Choice(BaseModel):
    """One answer, or a piece of one."""

    index: int
    text: str
    logprobs: Logprobs | None = None
    finish_reason: str | None = None


class Usage(BaseModel):
    """Tokens taken in and generated."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class Completion(BaseModel):
    """A completion, or one chunk of a stream."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[Choice]
    usage: Usage | None = None


class Model(BaseModel):
    """One entry of /v1/models."""

    id: str
    object: Literal["model"] = "model"
    created: int = 0
    owned_by: str = "deltadock"


class ModelList(BaseModel):
    """What this node can answer for without loading anything."""

    object: Literal["list"] = "list"
    data: list[Model]
