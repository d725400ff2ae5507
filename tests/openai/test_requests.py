"""What OpenAI's client can send is taken, or refused by the field's name with what to do."""

from collections.abc import Mapping
from typing import Any, get_type_hints

import pytest
from openai.types import completion_create_params as completion_params
from openai.types.chat import completion_create_params as chat_params
from pydantic import ValidationError

from deltadock.openai.chat import ChatRequest
from deltadock.openai.completions import CompletionRequest
from deltadock.openai.errors import refusal
from deltadock.openai.fields import SamplingFields

COMPLETION: Mapping[str, Any] = {"model": "m", "prompt": "a"}
CHAT: Mapping[str, Any] = {"model": "m", "messages": [{"role": "user", "content": "a"}]}
LISTS = "send a text, a list of texts, a list of token ids, or a list of such lists."
OFF = "is not supported yet; leave it out."
UNKNOWN = "is not a field that is known here; leave it out."


def nested(depth: int) -> list[Any]:
    """A list in a list in a list."""
    found: list[Any] = [1]
    for _ in range(depth):
        found = [found]
    return found


def refused(kind: type[SamplingFields], body: Any) -> tuple[str, str | None]:
    """Message and param, as a route would answer."""
    with pytest.raises(ValidationError) as caught:
        kind.model_validate(body)
    return refusal([{**error, "loc": ("body", *error["loc"])} for error in caught.value.errors()])


def test_every_parameter_of_openais_client_is_known() -> None:
    told = get_type_hints(chat_params.CompletionCreateParamsBase).keys()
    assert told - ChatRequest.model_fields.keys() == set()
    told = get_type_hints(completion_params.CompletionCreateParamsBase).keys()
    assert told - CompletionRequest.model_fields.keys() == set()


@pytest.mark.parametrize(("kind", "body"), [(CompletionRequest, COMPLETION), (ChatRequest, CHAT)])
def test_null_is_silence(kind: type[SamplingFields], body: Mapping[str, Any]) -> None:
    nulls = dict.fromkeys(kind.model_fields)
    request = kind.model_validate(nulls | dict(body))
    assert request.answers == 1
    assert request == kind.model_validate(body)


@pytest.mark.parametrize(
    "values",
    [
        {"echo": False, "best_of": 1, "suffix": ""},
        {"presence_penalty": 0, "frequency_penalty": 0.0, "logit_bias": {}, "n": 1},
        {"user": "u", "seed": 1, "stream": False, "stream_options": {"include_usage": True}},
    ],
)
def test_values_that_change_nothing_are_taken_by_completions(values: dict[str, Any]) -> None:
    CompletionRequest.model_validate({**COMPLETION, **values})


@pytest.mark.parametrize(
    "values",
    [
        {"tools": [], "functions": [], "tool_choice": "none", "function_call": "none"},
        {"tool_choice": "auto", "function_call": "auto", "parallel_tool_calls": True},
        {"response_format": {"type": "text"}, "modalities": ["text"], "verbosity": "medium"},
        {"store": True, "metadata": {"a": "b"}, "service_tier": "flex", "user": "u"},
        {"prompt_cache_key": "k", "prompt_cache_retention": "24h", "safety_identifier": "s"},
        {"stream_options": {"include_obfuscation": False}},
        {"prediction": {"type": "content", "content": "b"}},
        {"top_logprobs": 0},
    ],
)
def test_values_that_change_nothing_are_taken_by_chat(values: dict[str, Any]) -> None:
    ChatRequest.model_validate({**CHAT, **values})


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"echo": True}, f"`echo` {OFF}"),
        ({"best_of": 3}, f"`best_of` {OFF}"),
        ({"suffix": "end"}, f"`suffix` {OFF}"),
        ({"tools": []}, f"`tools` {UNKNOWN}"),
        ({"guided_choice": ["a"]}, f"`guided_choice` {UNKNOWN}"),
        ({"max_tokens": 0}, "`max_tokens`: Input should be greater than or equal to 1."),
        ({"presence_penalty": 2.5}, "`presence_penalty`: Input should be less than or equal to 2."),
        ({"repetition_penalty": 0}, "`repetition_penalty`: Input should be greater than"),
        ({"logit_bias": {"5": 101}}, "`logit_bias` must map at most 300"),
        ({"logit_bias": {"the": 1}}, "`logit_bias` must map at most 300"),
        ({"logit_bias": {str(n): 1 for n in range(301)}}, "`logit_bias` must map at most 300"),
        ({"stop": ["a"] * 17}, "`stop` must be a text, or at most 16 of them."),
        ({"stop": 1}, "`stop` must be a text, or at most 16 of them."),
        ({"min_p": float("nan")}, "`min_p`: "),
        ({"prompt": []}, "`prompt` is an empty list; send a text or at least one token id."),
        ({"prompt": [[1], []]}, "`prompt` holds an empty list; send at least one token id in each"),
        ({"prompt": ["a", [1]]}, f"`prompt` holds parts of mixed or unknown kinds; {LISTS}"),
        ({"prompt": [1, "a"]}, f"`prompt` holds parts of mixed or unknown kinds; {LISTS}"),
        ({"prompt": [True]}, f"`prompt` holds parts of mixed or unknown kinds; {LISTS}"),
        ({"prompt": [[1], [2.5]]}, f"`prompt` holds parts of mixed or unknown kinds; {LISTS}"),
        ({"prompt": nested(900)}, f"`prompt` holds parts of mixed or unknown kinds; {LISTS}"),
        ({"prompt": ["a"] * 65}, "`prompt` holds 65 prompts; send at most 64 in one request."),
        ({"prompt": None}, f"`prompt` is no prompt; {LISTS}"),
        ({"prompt": {"text": "a"}}, f"`prompt` is no prompt; {LISTS}"),
        ({"model": ""}, "`model`: "),
    ],
)
def test_completions_say_what_to_do(values: dict[str, Any], message: str) -> None:
    told, param = refused(CompletionRequest, {**COMPLETION, **values})
    assert told.startswith(message)
    assert param == next(iter(values))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"tools": [{"type": "function"}]}, f"`tools` {OFF}"),
        ({"tool_choice": "required"}, f"`tool_choice` {OFF}"),
        ({"tool_choice": {"type": "function"}}, f"`tool_choice` {OFF}"),
        ({"functions": [{"name": "f"}]}, f"`functions` {OFF}"),
        ({"function_call": {"name": "f"}}, f"`function_call` {OFF}"),
        ({"response_format": {"type": "json_object"}}, f"`response_format` {OFF}"),
        ({"response_format": {"schema": {}}}, f"`response_format` {OFF}"),
        ({"response_format": {"type": "text", "strict": True}}, f"`response_format` {OFF}"),
        ({"modalities": ["text", "audio"]}, f"`modalities` {OFF}"),
        ({"audio": {"voice": "v"}}, f"`audio` {OFF}"),
        ({"web_search_options": {}}, f"`web_search_options` {OFF}"),
        ({"reasoning_effort": "high"}, f"`reasoning_effort` {OFF}"),
        ({"verbosity": "low"}, f"`verbosity` {OFF}"),
        ({"moderation": {"model": "m"}}, f"`moderation` {OFF}"),
        ({"top_logprobs": 2}, "`top_logprobs` needs `logprobs`: true; send both or neither."),
        ({"max_completion_tokens": 0}, "`max_completion_tokens`: Input should be greater than"),
        ({"messages": []}, "`messages`: "),
    ],
)
def test_chat_says_what_to_do(values: dict[str, Any], message: str) -> None:
    told, param = refused(ChatRequest, {**CHAT, **values})
    assert told.startswith(message)
    assert param == next(iter(values))


@pytest.mark.parametrize(
    ("message", "param", "told"),
    [
        ({"role": "user"}, "messages[1].content", "is missing; send it."),
        ({"role": "user", "content": None}, "messages[1].content", "must be a text, or a list of"),
        ({"role": "pilot", "content": "x"}, "messages[1].role", ""),
        (
            {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "u"}}]},
            "messages[1].content",
            "holds a part that is not text, which is not supported yet; send text alone.",
        ),
        (
            {"role": "user", "content": [{"type": "input_audio", "input_audio": {}}]},
            "messages[1].content",
            "holds a part that is not text, which is not supported yet; send text alone.",
        ),
        ({"role": "user", "content": [{"type": "text"}]}, "messages[1].content", "must be a text,"),
        (
            {"role": "assistant", "content": "x", "tool_calls": [{}]},
            "messages[1].tool_calls",
            "is not supported yet; send `role` and `content` alone.",
        ),
        (
            {"role": "assistant", "content": None, "tool_calls": [{}]},
            "messages[1].tool_calls",
            "is not supported yet; send `role` and `content` alone.",
        ),
        ("x", "messages[1]", ""),
    ],
)
def test_a_message_that_cannot_be_read_is_pointed_at(message: Any, param: str, told: str) -> None:
    body = {**CHAT, "messages": [*CHAT["messages"], message]}
    answer, where = refused(ChatRequest, body)
    assert where == param
    assert f"`{param}` {told}".rstrip() in answer.replace("`:", "` :")


def test_a_clients_own_answer_can_be_sent_back() -> None:
    turn = {"role": "assistant", "content": "x", "refusal": None, "tool_calls": None, "audio": None,
            "annotations": [], "function_call": None}  # fmt: skip
    request = ChatRequest.model_validate({**CHAT, "messages": [turn]})
    assert request.messages[0].plain() == {"role": "assistant", "content": "x"}


def test_a_body_that_is_no_object() -> None:
    assert refused(ChatRequest, [1])[1] is None
    assert refused(ChatRequest, [1])[0].startswith("The body must be a JSON object, sent as")
    missing = {"type": "missing", "loc": ("body",), "msg": "Field required"}
    assert refusal([missing]) == ("The body is missing; send it.", None)
