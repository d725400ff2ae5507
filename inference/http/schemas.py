"""OpenAI's shapes of completions and errors."""

from typing import Annotated, Final, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field

from deltadock.errors import DeltadockError
from inference.engine.sampler import SamplingParams
from inference.prompts.generation_config import SamplingDefaults

COMPLETION_TOKENS: Final = 16

Tokens = Annotated[list[int], Field(min_length=1)]
Number = TypeVar("Number", int, float)


class StreamOptions(BaseModel):
    """What a stream holds besides text."""

    include_usage: bool = False


class SamplingFields(BaseModel):
    """What both routes take. `top_k` and `min_p` go beyond OpenAI's.

    Where a request is silent, the model's own generation config decides. OpenAI's other parameters
    are accepted with the value that turns them off, and nothing else.
    """

    model: str
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    n: Annotated[int, Field(ge=1, le=16)] = 1
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: str | Annotated[list[str], Field(max_length=16)] | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    user: str | None = None
    presence_penalty: Literal[0] | None = None
    frequency_penalty: Literal[0] | None = None
    logit_bias: Annotated[dict[str, float], Field(max_length=0)] | None = None

    def _params(
        self, defaults: SamplingDefaults, max_tokens: int, logprobs: int | None
    ) -> SamplingParams:
        stop = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return SamplingParams(
            max_tokens=max_tokens,
            temperature=_either(self.temperature, defaults.temperature),
            top_p=_either(self.top_p, defaults.top_p),
            top_k=max(_either(self.top_k, defaults.top_k), 0),
            min_p=_either(self.min_p, defaults.min_p),
            seed=self.seed,
            stop=tuple(text for text in stop if text),
            logprobs=logprobs,
        )


def _either(asked: Number | None, default: Number) -> Number:
    return default if asked is None else asked


class CompletionRequest(SamplingFields):
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

    prompt: str | Tokens | Annotated[list[str] | list[Tokens], Field(min_length=1, max_length=64)]
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: Annotated[int, Field(ge=0, le=5)] | None = None
    echo: Literal[False] | None = None
    suffix: Literal[""] | None = None
    best_of: Literal[1] | None = None

    def prompts(self) -> list[str | list[int]]:
        """The prompts, also where there is only one."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        parts: list[str | list[int] | int] = [*self.prompt]
        tokens = [part for part in parts if isinstance(part, int)]
        return [tokens] if tokens else [part for part in parts if not isinstance(part, int)]

    def sampling(self, defaults: SamplingDefaults, room: int) -> SamplingParams:
        """The engine's form of the settings; of the `room` tokens, OpenAI's 16 unless asked."""
        asked = min(COMPLETION_TOKENS, room) if self.max_tokens is None else self.max_tokens
        return self._params(defaults, asked, self.logprobs)


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


class ErrorDetail(BaseModel):
    """An error as OpenAI's clients read it; `code` is Deltadock's stable code."""

    message: str
    type: str
    param: str | None = None
    code: str


class ErrorBody(BaseModel):
    """The body of every error."""

    error: ErrorDetail

    @classmethod
    def of(cls, error: DeltadockError, param: str | None = None) -> "ErrorBody":
        """The body that tells `error`."""
        kind = "server_error" if error.status >= 500 else "invalid_request_error"
        return cls(
            error=ErrorDetail(message=error.message, type=kind, param=param, code=error.code)
        )
