"""OpenAI's request for completions."""

from typing import Annotated, Any, Final, Literal

from pydantic import BeforeValidator, Field

from deltadock.openai.fields import MaxTokens, SamplingFields, Unsupported, fault

MAX_PROMPTS: Final = 64
FORMS: Final = "send a text, a list of texts, a list of token ids, or a list of such lists."


def _check_prompt(prompt: Any) -> Any:
    """Say what is wrong with a prompt, which four kinds of errors at once would not."""
    if isinstance(prompt, str):
        return prompt
    if not isinstance(prompt, list):
        raise fault(f"is no prompt; {FORMS}")
    if not prompt:
        raise fault("is an empty list; send a text or at least one token id.")
    kinds = {_kind(part) for part in prompt}
    if kinds == {"token"}:
        return prompt
    if kinds not in ({"text"}, {"tokens"}):
        raise fault(f"holds parts of mixed or unknown kinds; {FORMS}")
    if [] in prompt:
        raise fault("holds an empty list; send at least one token id in each.")
    if len(prompt) > MAX_PROMPTS:
        raise fault(f"holds {len(prompt)} prompts; send at most {MAX_PROMPTS} in one request.")
    return prompt


def _kind(part: Any) -> str:
    if isinstance(part, str):
        return "text"
    if isinstance(part, list):
        return "tokens" if all(map(_is_token, part)) else "other"
    return "token" if _is_token(part) else "other"


def _is_token(part: Any) -> bool:
    return isinstance(part, int) and not isinstance(part, bool)


Tokens = Annotated[list[int], Field(min_length=1)]
Prompt = Annotated[
    str | Tokens | Annotated[list[str] | list[Tokens], Field(min_length=1, max_length=MAX_PROMPTS)],
    BeforeValidator(_check_prompt),
]


class CompletionRequest(SamplingFields):
    """A request for /v1/completions; `max_tokens` is 16 unless asked otherwise."""

    prompt: Prompt
    max_tokens: MaxTokens | None = None
    logprobs: Annotated[int, Field(ge=0, le=5)] | None = None
    echo: Unsupported[Literal[False]] = None
    suffix: Unsupported[Literal[""]] = None
    best_of: Unsupported[Literal[1]] = None
