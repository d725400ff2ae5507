"""/v1/responses on a running node, through the openai package."""

from collections.abc import Iterator
from typing import Any, Literal

import openai
import pytest
from pydantic import BaseModel

from deltadock.artifacts.folder import scan_folder
from deltadock.errors import GrammarTooComplex
from deltadock.inference.engine.sequence import Event
from deltadock.openai.tools import ID_CHARACTERS
from tests.inference.support import RunningNode, Site, start, write_delta

TEMPLATE = (
    "{% if tools %}<tool_call>{% endif %}{% for m in messages %}[{{ m.role }}] {{ m.content }}"
    "{% for c in m.tool_calls or [] %}{{ c.id }}{{ c.function.arguments.city }}{% endfor %};"
    "{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
)
WEATHER: Any = {
    "type": "function",
    "name": "weather",
    "description": "Of a city.",
    "parameters": {
        "type": "object",
        "properties": {"city": {"enum": ["a", "b"]}},
        "required": ["city"],
        "additionalProperties": False,
    },
    "strict": True,
}
CALL = '<tool_call>{"name": "weather", "arguments": {"city": "a"}}</tool_call>'
ASK: dict[str, Any] = {"model": "m", "temperature": 0, "max_output_tokens": 12}


@pytest.fixture(scope="module")
def node(site: Site, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningNode]:
    with start(site, tmp_path_factory.mktemp("home")) as running:
        yield running


@pytest.fixture(scope="module")
def client(
    site: Site, node: RunningNode, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[openai.OpenAI]:
    path = tmp_path_factory.mktemp("delta") / "delta"
    digest = scan_folder(site.home / "base-0").weights_digest
    write_delta(path, site.models[None], digest, 1, **{"chat_template.jinja": TEMPLATE})
    with node.client(site.base, site.blobs.put_file(path)) as client:
        yield client


def test_a_response_has_the_answer_of_the_chat(client: openai.OpenAI) -> None:
    response = client.responses.create(input="a", instructions="Be.", **ASK)
    chat = client.chat.completions.create(
        model="m", temperature=0, max_tokens=12,
        messages=[{"role": "system", "content": "Be."}, {"role": "user", "content": "a"}],
    )  # fmt: skip
    assert response.output_text == chat.choices[0].message.content
    usage = response.usage
    counts = (usage.input_tokens, usage.output_tokens, usage.total_tokens)
    told = chat.usage
    assert counts == (told.prompt_tokens, told.completion_tokens, told.total_tokens)
    assert (response.status, response.incomplete_details.reason) == (
        "incomplete", "max_output_tokens",
    )  # fmt: skip
    assert (response.object, response.model, response.instructions) == ("response", "m", "Be.")
    assert response.id.startswith("resp_")


def test_a_stream_adds_up_to_the_response(client: openai.OpenAI) -> None:
    whole = client.responses.create(input="a", **ASK)
    events = list(client.responses.create(input="a", **ASK, stream=True))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    kinds = [event.type.removeprefix("response.") for event in events]
    deltas = kinds.count("output_text.delta")
    assert deltas > 1
    assert kinds == [
        "created", "in_progress", "output_item.added", "content_part.added",
        *["output_text.delta"] * deltas,
        "output_text.done", "content_part.done", "output_item.done", "incomplete",
    ]  # fmt: skip
    text = "".join(event.delta for event in events if event.type == "response.output_text.delta")
    assert text == whole.output_text == events[-1].response.output_text
    assert events[-1].response.usage == whole.usage


class Answer(BaseModel):
    """What structured output is parsed into."""

    name: Literal["x", "y"]
    ok: bool


def test_structured_output_is_parsed(client: openai.OpenAI) -> None:
    ask = ASK | {"max_output_tokens": 100}
    response = client.responses.parse(input="a", text_format=Answer, **ask)
    assert response.output_parsed.name in {"x", "y"}
    with client.responses.stream(input="a", text_format=Answer, **ask) as stream:
        kinds = [event.type for event in stream]
        assert stream.get_final_response().output_parsed == response.output_parsed
    assert kinds[-1] == "response.completed"


def test_calls_and_their_results_are_sent_back(client: openai.OpenAI) -> None:
    ask = ASK | {"max_output_tokens": 80, "tools": [WEATHER], "parallel_tool_calls": False}
    response = client.responses.create(
        input="a", tool_choice={"type": "function", "name": "weather"}, **ask
    )
    [call] = response.output
    assert (call.type, call.name, call.status) == ("function_call", "weather", "completed")
    assert set(call.call_id) <= set(ID_CHARACTERS)
    city = "a" if call.arguments == '{"city": "a"}' else "b"
    result = {"type": "function_call_output", "call_id": call.call_id, "output": "Sun."}
    again = client.responses.create(
        input=[{"role": "user", "content": "a"}, *response.output, result], **ASK
    )
    rendered = f"[user] a;[assistant] {call.call_id}{city};[tool] Sun.;[assistant]"
    assert again.usage.input_tokens == len(rendered)


def test_text_and_calls_are_items_of_a_stream(client: openai.OpenAI) -> None:
    ask: Any = {
        "model": "m", "input": "a", "tools": [WEATHER],
        "extra_body": {"guided_choice": [f"So: {CALL} End."]},
    }  # fmt: skip
    with client.responses.stream(**ask) as stream:
        events = list(stream)
        response = stream.get_final_response()
    kinds = [(item.type, item.status) for item in response.output]
    assert kinds == [(kind, "completed") for kind in ("message", "function_call", "message")]
    texts = [item.content[0].text for item in response.output if item.type == "message"]
    assert texts == ["So:", "End."]
    assert response.output[1].parsed_arguments == {"city": "a"}
    done = [event for event in events if event.type == "response.function_call_arguments.done"]
    assert [event.arguments for event in done] == ['{"city": "a"}']


def test_what_ends_a_stream_is_its_last_event(
    client: openai.OpenAI, node: RunningNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    from deltadock.inference.generation import Generation

    async def events(self: Generation) -> Any:
        yield 0, Event("x")
        raise GrammarTooComplex("Too much.")

    monkeypatch.setattr(Generation, "events", events)
    *_, last = client.responses.create(input="a", **ASK, stream=True)
    assert last.type == "response.failed"
    assert (last.response.status, last.response.error.code) == ("failed", "grammar_too_complex")


@pytest.mark.parametrize(
    ("values", "param", "message"),
    [
        ({"store": True}, "store", "`store` is not supported: responses are not stored."),
        ({"previous_response_id": "resp_1"}, "previous_response_id", "whole conversation in `inp"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input[0]", "are not stored"),
        ({"input": [{"type": "reasoning", "id": "x"}]}, "input[0]", "is of the type 'reasoning'"),
        ({"input": [{"type": ["x"]}]}, "input[0]", "is of the type"),
        ({"input": []}, "input", "at least 1"),
        ({"input": {"role": "user"}}, "input", "`input` must be a string, or a list of messages"),
        ({"input": [{"role": "user"}]}, "input[0].content", "is missing; send it."),
        (
            {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]},
            "input[0].content",
            "parts of type input_text; others are unsupported",
        ),
        ({"tools": [{"type": "web_search"}]}, "tools", "must be a list of at most 128 tools"),
        ({"tool_choice": "required"}, "tool_choice", "`tool_choice` needs `tools`; send at least"),
        ({"text": {"format": {"type": "xml"}}}, "text", "`text` must have a `format` {"),
        ({"background": True}, "background", "is not supported yet; leave it out."),
        ({"include": ["message.output_text.logprobs"]}, "include", "must be empty"),
        ({"extra_body": {"response_format": {"type": "text"}}}, "response_format", "not supported"),
        ({"extra_body": {"messages": []}}, "messages", "is not a known field; leave it out."),
    ],
)
def test_what_needs_state_or_is_not_there_is_refused(
    client: openai.OpenAI, values: dict[str, Any], param: str, message: str
) -> None:
    with pytest.raises(openai.BadRequestError, match="400") as refused:
        client.responses.create(**(ASK | {"input": "a"} | values))
    assert refused.value.param == param
    assert message in refused.value.message


def test_what_changes_no_answer_is_accepted(client: openai.OpenAI) -> None:
    more: Any = {
        "store": False, "metadata": {"a": "b"}, "user": "u", "truncation": "disabled",
        "reasoning": {"effort": "low", "summary": "auto"}, "text": {"verbosity": "medium"},
        "include": ["reasoning.encrypted_content"], "service_tier": "auto", "top_logprobs": 0,
        "prompt_cache_key": "k", "tool_choice": "auto", "tools": [], "background": False,
    }  # fmt: skip
    plain, spelt = (client.responses.create(input="a", **ASK, **m) for m in ({}, more))
    assert spelt.output_text == plain.output_text
    assert (spelt.metadata, spelt.reasoning.effort, spelt.store) == ({"a": "b"}, "low", False)
