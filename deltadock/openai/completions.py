"""OpenAI's completions: request and response."""

from typing import Annotated, Any, Final, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from deltadock.openai.fields import ONE_GRAMMAR, SamplingFields, Unsupported, Usage, field_error

MAX_PROMPTS: Final = 64
PROMPT_TYPES: Final = (
    "send a string, a list of strings, a list of token ids, or a list of such lists."
)


def _check_prompt(prompt: Any) -> Any:
    """Report one error instead of one for each of the four accepted types."""
    if isinstance(prompt, str):
        return prompt
    if not isinstance(prompt, list):
        raise field_error(f"is not a prompt; {PROMPT_TYPES}")
    if not prompt:
        raise field_error("is an empty list; send a string or at least one token id.")
    types = {_type(item) for item in prompt}
    if types == {"token"}:
        return prompt
    if types not in ({"string"}, {"tokens"}):
        raise field_error(f"contains items of mixed or unknown types; {PROMPT_TYPES}")
    if [] in prompt:
        raise field_error("contains an empty list; send at least one token id in each.")
    if len(prompt) > MAX_PROMPTS:
        raise field_error(
            f"contains {len(prompt)} prompts; send at most {MAX_PROMPTS} in one request."
        )
    return prompt


def _type(part: Any) -> str:
    if isinstance(part, str):
        return "string"
    if isinstance(part, list):
        return "tokens" if all(map(_is_token, part)) else "other"
    return "token" if _is_token(part) else "other"


def _is_token(part: Any) -> bool:
    return isinstance(part, int) and not isinstance(part, bool)


Token = Annotated[int, Field(json_schema_extra={"minimum": 0, "exclusiveMaximum": 2**31})]
"""The node, which knows the vocabulary, checks the range."""
Tokens = Annotated[list[Token], Field(min_length=1)]
Many = Field(min_length=1, max_length=MAX_PROMPTS)
Prompt = Annotated[
    str | Tokens | Annotated[list[str], Many] | Annotated[list[Tokens], Many],
    BeforeValidator(_check_prompt),
]


class CompletionRequest(SamplingFields):
    """A request to /v1/completions; `max_tokens` defaults to 16.

    With `echo` the answer begins with the prompt, and with `logprobs` too the prompt's tokens have
    theirs; `max_tokens` 0 generates nothing.
    """

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "model": "dlt_k7wq2mzv5c3xj6nhy4tbr2dfsa",
                    "prompt": "17 + 25 =",
                    "max_tokens": 8,
                }
            ],
            "allOf": [ONE_GRAMMAR],
        }
    )

    prompt: Prompt
    max_tokens: Annotated[int, Field(ge=0, lt=2**31)] | None = None
    logprobs: Annotated[int, Field(ge=0, le=5)] | None = None
    echo: bool | None = None
    suffix: Unsupported[Literal[""]] = None
    best_of: Unsupported[Literal[1]] = None


class CompletionLogprobs(BaseModel):
    """Log-probabilities (nats) of the tokens of one choice; a prompt's first token has none."""

    tokens: list[str] = []
    token_logprobs: list[float | None] = []
    top_logprobs: list[dict[str, float] | None] = []
    text_offset: list[int] = []


class CompletionChoice(BaseModel):
    """One answer, or a part of one in a stream."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None = None
    finish_reason: str | None = None


class Completion(BaseModel):
    """A completion, or one chunk of a stream."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage | None = None
