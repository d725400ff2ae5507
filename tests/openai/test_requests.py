"""OpenAI's parameters are accepted or rejected with a message that names the field."""

from collections.abc import Mapping
from typing import Any, get_type_hints

import pytest
from openai.types import completion_create_params as completion_params
from openai.types.chat import completion_create_params as chat_params
from pydantic import ValidationError

from deltadock.openai.chat import ChatRequest
from deltadock.openai.completions import CompletionRequest
from deltadock.openai.errors import validation_message
from deltadock.openai.fields import SamplingFields

COMPLETION: Mapping[str, Any] = {"model": "m", "prompt": "a"}
CHAT: Mapping[str, Any] = {"model": "m", "messages": [{"role": "user", "content": "a"}]}
LISTS = "send a string, a list of strings, a list of token ids, or a list of such lists."
OFF = "is not supported yet; leave it out."
UNKNOWN = "is not a known field; leave it out."


def nested(depth: int) -> list[Any]:
    """A nested list."""
    result: list[Any] = [1]
    for _ in range(depth):
        result = [result]
    return result


def refused(kind: type[SamplingFields], body: Any) -> tuple[str, str | None]:
    """Message and param of the error response."""
    with pytest.raises(ValidationError) as caught:
        kind.model_validate(body)
    return validation_message(
        [{**error, "loc": ("body", *error["loc"])} for error in caught.value.errors()]
    )


def test_every_parameter_of_openais_client_is_known() -> None:
    parameters = get_type_hints(chat_params.CompletionCreateParamsBase).keys()
    assert parameters - ChatRequest.model_fields.keys() == set()
    parameters = get_type_hints(completion_params.CompletionCreateParamsBase).keys()
    assert parameters - CompletionRequest.model_fields.keys() == set()


@pytest.mark.parametrize(("kind", "body"), [(CompletionRequest, COMPLETION), (ChatRequest, CHAT)])
def test_null_equals_unset(kind: type[SamplingFields], body: Mapping[str, Any]) -> None:
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
def test_disabling_values_are_accepted_by_completions(values: dict[str, Any]) -> None:
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
def test_disabling_values_are_accepted_by_chat(values: dict[str, Any]) -> None:
    ChatRequest.model_validate({**CHAT, **values})


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"best_of": 3}, f"`best_of` {OFF}"),
        ({"suffix": "end"}, f"`suffix` {OFF}"),
        ({"tools": []}, f"`tools` {UNKNOWN}"),
        ({"guided_choice": []}, "`guided_choice`: List should have at least 1 item"),
        ({"guided_choice": ["b"], "guided_regex": "a"}, "`guided_choice` excludes `guided_regex`"),
        ({"guided_json": {"enum": ["a" * 70_000]}}, "`guided_json` is longer than 65536"),
        (
            {"guided_json": {"enum": nested(128)}},
            "`guided_json` is nested more than 128 levels deep",
        ),
        ({"max_tokens": -1}, "`max_tokens`: Input should be greater than or equal to 0."),
        ({"presence_penalty": 2.5}, "`presence_penalty`: Input should be less than or equal to 2."),
        ({"repetition_penalty": 0}, "`repetition_penalty`: Input should be greater than"),
        ({"logit_bias": {"5": 101}}, "`logit_bias` must map at most 300"),
        ({"logit_bias": {"the": 1}}, "`logit_bias` must map at most 300"),
        ({"logit_bias": {str(n): 1 for n in range(301)}}, "`logit_bias` must map at most 300"),
        ({"stop": ["a"] * 17}, "`stop` must be a string, or a list of at most 16 strings."),
        ({"stop": 1}, "`stop` must be a string, or a list of at most 16 strings."),
        ({"min_p": float("nan")}, "`min_p`: "),
        ({"prompt": []}, "`prompt` is an empty list; send a string or at least one token id."),
        (
            {"prompt": [[1], []]},
            "`prompt` contains an empty list; send at least one token id in each",
        ),
        ({"prompt": ["a", [1]]}, f"`prompt` contains items of mixed or unknown types; {LISTS}"),
        ({"prompt": [1, "a"]}, f"`prompt` contains items of mixed or unknown types; {LISTS}"),
        ({"prompt": [True]}, f"`prompt` contains items of mixed or unknown types; {LISTS}"),
        ({"prompt": [[1], [2.5]]}, f"`prompt` contains items of mixed or unknown types; {LISTS}"),
        ({"prompt": nested(900)}, f"`prompt` contains items of mixed or unknown types; {LISTS}"),
        ({"prompt": ["a"] * 65}, "`prompt` contains 65 prompts; send at most 64 in one request."),
        ({"prompt": None}, f"`prompt` is not a prompt; {LISTS}"),
        ({"prompt": {"text": "a"}}, f"`prompt` is not a prompt; {LISTS}"),
        ({"model": ""}, "`model`: "),
    ],
)
def test_completion_errors(values: dict[str, Any], message: str) -> None:
    text, param = refused(CompletionRequest, {**COMPLETION, **values})
    assert text.startswith(message)
    assert param == next(iter(values))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"tools": [{"type": "function"}]}, "`tools` must be a list of at most 128 tools"),
        ({"tools": [{"type": "custom", "custom": {}}]}, "`tools` must be a list of at most 128"),
        (
            {"tools": [{"type": "function", "function": {"name": "f", "strict": "true"}}]},
            "`tools` must be a list of at most 128",
        ),
        ({"tool_choice": "required"}, "`tool_choice` needs `tools`; send at least one."),
        ({"tool_choice": {"type": "function"}}, '`tool_choice` must be "none", "auto"'),
        (
            {"tool_choice": {"type": "function", "function": {"name": "f"}}},
            "`tool_choice` names 'f', which is not in `tools`.",
        ),
        ({"functions": [{"name": "f"}]}, f"`functions` {OFF}"),
        ({"function_call": {"name": "f"}}, f"`function_call` {OFF}"),
        ({"response_format": {"schema": {}}}, "`response_format` must be"),
        ({"response_format": {"type": "xml"}}, "`response_format` must be"),
        ({"response_format": {"type": "json_schema"}}, "`response_format` must be"),
        ({"modalities": ["text", "audio"]}, f"`modalities` {OFF}"),
        ({"audio": {"voice": "v"}}, f"`audio` {OFF}"),
        ({"web_search_options": {}}, f"`web_search_options` {OFF}"),
        ({"reasoning_effort": "huge"}, "`reasoning_effort`: Input should be 'none'"),
        ({"verbosity": "low"}, f"`verbosity` {OFF}"),
        ({"moderation": {"model": "m"}}, f"`moderation` {OFF}"),
        ({"top_logprobs": 2}, "`top_logprobs` needs `logprobs`: true; send both or neither."),
        ({"max_completion_tokens": 0}, "`max_completion_tokens`: Input should be greater than"),
        ({"messages": []}, "`messages`: "),
    ],
)
def test_chat_errors(values: dict[str, Any], message: str) -> None:
    text, param = refused(ChatRequest, {**CHAT, **values})
    assert text.startswith(message)
    assert param == next(iter(values))


@pytest.mark.parametrize(
    ("message", "param", "text"),
    [
        ({"role": "user"}, "messages[1].content", "must be a string, or a list of"),
        (
            {"role": "user", "content": None},
            "messages[1].content",
            "must be a string, or a list of",
        ),
        ({"role": "pilot", "content": "x"}, "messages[1].role", ""),
        (
            {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "u"}}]},
            "messages[1].content",
            "contains a part that is not text, which is not supported yet; send text only.",
        ),
        (
            {"role": "user", "content": [{"type": "input_audio", "input_audio": {}}]},
            "messages[1].content",
            "contains a part that is not text, which is not supported yet; send text only.",
        ),
        (
            {"role": "user", "content": [{"type": "text"}]},
            "messages[1].content",
            "must be a string,",
        ),
        (
            {"role": "assistant", "content": None, "tool_calls": [{}]},
            "messages[1].tool_calls[0].id",
            "is missing; send it.",
        ),
        (
            {"role": "assistant", "content": None, "audio": {"id": "a"}},
            "messages[1].audio",
            "is not supported yet; leave it out.",
        ),
        ("x", "messages[1]", ""),
    ],
)
def test_message_errors_name_the_message(message: Any, param: str, text: str) -> None:
    body = {**CHAT, "messages": [*CHAT["messages"], message]}
    answer, where = refused(ChatRequest, body)
    assert where == param
    assert f"`{param}` {text}".rstrip() in answer.replace("`:", "` :")


def test_an_answer_can_be_sent_back_as_a_message() -> None:
    turn = {"role": "assistant", "content": "x", "refusal": None, "tool_calls": None, "audio": None,
            "annotations": [], "function_call": None}  # fmt: skip
    request = ChatRequest.model_validate({**CHAT, "messages": [turn]})
    assert request.messages[0].plain() == {"role": "assistant", "content": "x"}


def test_tool_calls_reach_templates_with_parsed_arguments() -> None:
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
    turns = [
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c", "content": "2"},
    ]
    request = ChatRequest.model_validate({**CHAT, "messages": turns})
    called, result = (message.plain() for message in request.messages)
    assert called["tool_calls"][0]["function"] == {"name": "f", "arguments": {"a": 1}}
    assert result == {"role": "tool", "content": "2", "tool_call_id": "c"}


def test_a_body_that_is_not_an_object() -> None:
    assert refused(ChatRequest, [1])[1] is None
    assert refused(ChatRequest, [1])[0].startswith("The body must be a JSON object, sent as")
    missing = {"type": "missing", "loc": ("body",), "msg": "Field required"}
    assert validation_message([missing]) == ("The body is missing; send it.", None)
