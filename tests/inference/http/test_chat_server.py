"""/v1/chat/completions on a running node: templates, tokens and generation configs."""

import json
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from deltadock.artifacts.folder import scan_folder
from deltadock.inference.prompts.tokenizer import BYTE_CHARACTERS
from tests.inference.support import RunningNode, Site, start, write_delta
from tests.waiting import wait_until

TEMPLATE = (
    "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
TALK: Any = [
    {"role": "system", "content": "Answer."},
    {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
]
BYTES = sorted(BYTE_CHARACTERS)
"""The tests' tokens by id."""
PROMPT = "[system] Answer.\n[user] a\nb\n[assistant]"

Carry = Callable[..., str]


@pytest.fixture(scope="module")
def node(site: Site, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningNode]:
    with start(site, tmp_path_factory.mktemp("home")) as running:
        yield running


@pytest.fixture(scope="module")
def carry(site: Site, tmp_path_factory: pytest.TempPathFactory) -> Carry:
    """`carry(name=text)`: a delta with its own text files."""
    digest = scan_folder(site.home / "base-0").weights_digest

    def write(**files: str | None) -> str:
        path = tmp_path_factory.mktemp("delta") / "delta"
        named = {name.replace("__", "."): text for name, text in files.items()}
        write_delta(path, site.models[None], digest, 1, **named)
        return site.blobs.put_file(path)

    return write


@pytest.fixture(scope="module")
def chatty(carry: Carry) -> str:
    return carry(chat_template__jinja=TEMPLATE)


def test_chat_equals_the_completion_of_its_rendered_prompt(
    site: Site, node: RunningNode, chatty: str
) -> None:
    params: Any = {"model": "m", "temperature": 0, "max_tokens": 12}
    with node.client(site.base, chatty) as client:
        chat = client.chat.completions.create(messages=TALK, **params)
        plain = client.completions.create(prompt=PROMPT, **params)
    assert chat.object == "chat.completion"
    [choice] = chat.choices
    assert (choice.message.role, choice.message.content) == ("assistant", plain.choices[0].text)
    assert choice.finish_reason == plain.choices[0].finish_reason == "length"
    assert chat.usage == plain.usage


def test_a_stream_equals_the_whole_answer(site: Site, node: RunningNode, chatty: str) -> None:
    params: Any = {
        "model": "m", "messages": TALK, "max_completion_tokens": 20, "seed": 5, "n": 2,
        "stop": ["e"], "logprobs": True, "top_logprobs": 2,
    }  # fmt: skip
    with node.client(site.base, chatty) as client:
        whole = client.chat.completions.create(**params)
        texts, ends, first = ["", ""], {}, {}
        tokens: list[list[Any]] = [[], []]
        usage = None
        for chunk in client.chat.completions.create(
            **params, stream=True, stream_options={"include_usage": True}
        ):
            assert chunk.object == "chat.completion.chunk"
            usage = chunk.usage or usage
            for choice in chunk.choices:
                texts[choice.index] += choice.delta.content or ""
                first.setdefault(choice.index, choice.delta.role)
                ends[choice.index] = choice.finish_reason
                tokens[choice.index] += choice.logprobs.content
    assert first == {0: "assistant", 1: "assistant"}
    assert texts == [choice.message.content for choice in whole.choices]
    assert [ends[0], ends[1]] == [choice.finish_reason for choice in whole.choices]
    for streamed, choice in zip(tokens, whole.choices, strict=True):
        assert [token.token for token in streamed] == [t.token for t in choice.logprobs.content]
        # Cached keys of the prompt: a product's last bits depend on its number of rows.
        expected = [pytest.approx(token.logprob, abs=1e-4) for token in choice.logprobs.content]
        assert [token.logprob for token in streamed] == expected
    assert usage == whole.usage
    assert texts[0] != texts[1]
    first_token = tokens[0][0]
    assert len(first_token.top_logprobs) == 2
    assert first_token.top_logprobs[0].logprob >= first_token.logprob
    whole_bytes = b"".join(bytes(token.bytes) for token in tokens[0])
    assert whole_bytes.decode(errors="replace").startswith(texts[0])


def test_each_model_uses_its_own_template(
    site: Site, node: RunningNode, chatty: str, carry: Carry
) -> None:
    curt = carry(chat_template__jinja="{{ messages[-1].content }}")
    config = carry(tokenizer_config__json=json.dumps({"chat_template": "{{ messages[0].role }}"}))
    lengths = {}
    for artifact in (chatty, curt, config):
        with node.client(site.base, artifact) as client:
            answer = client.chat.completions.create(model="m", messages=TALK, max_tokens=1)
            lengths[artifact] = answer.usage.prompt_tokens
    assert lengths == {chatty: len(PROMPT), curt: len("a\nb"), config: len("system")}
    for without in (None, site.artifacts[0]):
        with (
            node.client(site.base, without) as client,
            pytest.raises(openai.BadRequestError, match="no chat template") as caught,
        ):
            client.chat.completions.create(model="m", messages=TALK)
        assert caught.value.code == "no_chat_template"


def test_unset_parameters_come_from_the_generation_config(
    site: Site, node: RunningNode, carry: Carry
) -> None:
    greedy = carry(
        chat_template__jinja=TEMPLATE, generation_config__json=json.dumps({"do_sample": False})
    )
    with node.client(site.base, greedy) as client:
        silent, again = (
            client.chat.completions.create(model="m", messages=TALK, max_tokens=24)
            for _ in range(2)
        )
        asked = client.chat.completions.create(
            model="m", messages=TALK, max_tokens=24, temperature=1.5, seed=1
        )
    answers = [answer.choices[0].message.content for answer in (silent, again, asked)]
    assert answers[0] == answers[1] != answers[2]


def test_the_generation_configs_repetition_penalty_can_be_overridden(
    site: Site, node: RunningNode, carry: Carry
) -> None:
    greedy: dict[str, Any] = {"do_sample": False}
    published = greedy | {"repetition_penalty": 5.0}
    plain, penalised = (
        carry(chat_template__jinja=TEMPLATE, generation_config__json=json.dumps(config))
        for config in (greedy, published)
    )

    def ask(artifact: str, **params: Any) -> str | None:
        with node.client(site.base, artifact) as client:
            answer = client.chat.completions.create(
                model="m", messages=TALK, max_tokens=24, extra_body=params
            )
        return answer.choices[0].message.content

    assert ask(penalised) == ask(plain, repetition_penalty=5.0)
    assert ask(penalised, repetition_penalty=1.0) == ask(plain) != ask(penalised)


def test_without_a_limit_an_answer_may_fill_the_context(
    site: Site, node: RunningNode, chatty: str
) -> None:
    with node.client(site.base, chatty) as client:
        answer = client.chat.completions.create(model="m", messages=TALK, seed=3)
        ended = answer.choices[0].finish_reason == "stop"
        assert ended or answer.usage.total_tokens == node.node.base.engine.context_tokens
        with pytest.raises(openai.BadRequestError, match="context"):
            client.chat.completions.create(
                model="m", messages=[{"role": "user", "content": "x" * 500}]
            )


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": "\\ud800"}]}, None),
        ({"tools": [{}]}, "tools"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"logit_bias": {"264": 1}}, "logit_bias"),
    ],
)
def test_bad_requests_name_the_field_in_error(
    site: Site, node: RunningNode, chatty: str, body: dict[str, Any], param: str | None
) -> None:
    request_body = {"model": "m", "messages": [{"role": "user", "content": "a"}], **body}
    response = httpx.post(
        f"{node.url}/v1/chat/completions",
        content=json.dumps(request_body).replace("\\\\", "\\"),
        headers={
            "Deltadock-Base": site.base,
            "Deltadock-Artifact": chatty,
            "Content-Type": "application/json",
        },
    )
    assert response.status_code == 400
    error = response.json()["error"]
    assert (error["code"], error["type"]) == ("invalid_input", "invalid_request_error")
    assert error["param"] == param


def test_disabled_parameters_are_accepted(site: Site, node: RunningNode, chatty: str) -> None:
    params: Any = {"model": "m", "messages": TALK, "max_tokens": 4, "temperature": 0}
    spelt: Any = {
        "tools": [], "tool_choice": "none", "response_format": {"type": "text"}, "n": 1,
        "modalities": ["text"], "presence_penalty": 0, "frequency_penalty": 0, "logit_bias": {},
        "store": False, "metadata": {"a": "b"}, "user": "u", "service_tier": "auto", "seed": 1,
        "parallel_tool_calls": True, "stream_options": None, "stop": None, "top_p": 1,
    }  # fmt: skip
    with node.client(site.base, chatty) as client:
        answers = [client.chat.completions.create(**(params | more)) for more in ({}, spelt)]
        with pytest.raises(openai.BadRequestError, match="`tools` must be a list") as caught:
            client.chat.completions.create(**params, tools=[{"type": "custom", "custom": {}}])
    assert answers[0].choices == answers[1].choices
    assert caught.value.param == "tools"


def test_a_template_that_never_ends_fails_its_own_request(
    site: Site, node: RunningNode, carry: Carry, chatty: str, tmp_path: Path
) -> None:
    endless = carry(
        chat_template__jinja="{% set r = range(99999) %}{% for a in r %}{% for b in r %}"
        "{% endfor %}{% endfor %}"
    )
    with (
        node.client(site.base, endless) as client,
        pytest.raises(openai.BadRequestError, match="more time or memory"),
    ):
        client.chat.completions.create(model="m", messages=TALK)
    with node.client(site.base, chatty) as client:
        assert client.chat.completions.create(model="m", messages=TALK, max_tokens=1).choices


def test_a_slow_template_delays_only_its_own_delta(
    site: Site, node: RunningNode, chatty: str, carry: Carry, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More of its requests wait than there are encoding threads."""
    slow = carry(chat_template__jinja="slow" + TEMPLATE)
    ask: dict[str, Any] = {"model": "m", "messages": TALK, "max_tokens": 1}
    go_on, prompt = threading.Event(), node.node._templates.prompt

    def render(form: Any, *arguments: Any) -> str:
        if form.template.startswith("slow"):
            assert go_on.wait(60)
        return prompt(form, *arguments)

    monkeypatch.setattr(node.node._templates, "prompt", render)
    with (
        ThreadPoolExecutor(12) as threads,
        node.client(site.base, slow) as flood,
        node.client(site.base, chatty) as client,
    ):
        waiting = [threads.submit(lambda: flood.chat.completions.create(**ask)) for _ in range(12)]
        wait_until(lambda: node.node.admitted == 12)
        assert client.chat.completions.create(**ask).choices
        assert not any(request.done() for request in waiting)
        go_on.set()
        assert all(request.result(60).choices for request in waiting)


def test_chunks_omit_unset_fields(site: Site, node: RunningNode, chatty: str) -> None:
    """Strict clients reject `role: null`."""
    headers = {"Deltadock-Base": site.base, "Deltadock-Artifact": chatty}
    messages = [*TALK, {"role": "assistant", "content": None}, {"role": "user", "content": "a"}]
    body = {"model": "m", "messages": messages, "max_tokens": 3, "stream": True}
    answer = httpx.post(f"{node.url}/v1/chat/completions", json=body, headers=headers, timeout=60)
    lines = [line.removeprefix("data: ") for line in answer.text.splitlines() if line]
    deltas = [json.loads(line)["choices"][0]["delta"] for line in lines[:-1]]
    assert lines[-1] == "[DONE]"
    assert deltas[0]["role"] == "assistant"
    assert all(delta.keys() == {"content"} for delta in deltas[1:])


def test_only_the_assistant_may_be_silent(site: Site, node: RunningNode, chatty: str) -> None:
    with (
        node.client(site.base, chatty) as client,
        pytest.raises(openai.BadRequestError, match="must be a string") as refused,
    ):
        client.chat.completions.create(model="m", messages=[{"role": "user", "content": None}])
    assert refused.value.param == "messages[0].content"


WEATHER: Any = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {
            "type": "object",
            "properties": {"city": {"enum": ["a", "b"]}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}
CALL = '<tool_call>{"name": "weather", "arguments": {"city": "a"}}</tool_call>'
TOOLS = "{% if tools %}<tool_call>{% endif %}{{ messages[-1].content }}"


@pytest.fixture(scope="module")
def hermes(carry: Carry) -> str:
    return carry(chat_template__jinja=TOOLS)


def ask_for_tools(client: openai.OpenAI, *, stream: bool, **more: Any) -> tuple[Any, str, Any]:
    """An answer's text, finish reason and calls, of a stream or a whole answer."""
    ask = {"model": "m", "messages": TALK, "tools": [WEATHER], "max_tokens": 80, "seed": 2, **more}
    if not stream:
        [choice] = client.chat.completions.create(**ask).choices
        message = choice.message
        calls = [call.function for call in message.tool_calls or ()]
        return message.content, choice.finish_reason, [(c.name, c.arguments) for c in calls]
    text, finish, calls = "", "", []
    for chunk in client.chat.completions.create(**ask, stream=True):
        [choice] = chunk.choices
        text += choice.delta.content or ""
        finish = choice.finish_reason or finish
        for call in choice.delta.tool_calls or ():
            if call.id is not None:
                calls.append((call.function.name, ""))
            assert call.index == len(calls) - 1
            name, arguments = calls[-1]
            calls[-1] = (name, arguments + call.function.arguments)
    return text or None, finish, calls


@pytest.mark.parametrize("stream", [False, True])
def test_calls_of_tools_are_parsed(
    site: Site, node: RunningNode, hermes: str, chatty: str, stream: bool
) -> None:
    def ask(artifact: str, text: str, **more: Any) -> tuple[Any, str, Any]:
        with node.client(site.base, artifact) as client:
            body = {"guided_choice": [text]}
            return ask_for_tools(client, stream=stream, extra_body=body, **more)

    call = ("weather", '{"city": "a"}')
    assert ask(hermes, CALL) == (None, "tool_calls", [call])
    assert ask(hermes, f"I see. {CALL}") == ("I see.", "tool_calls", [call])
    assert ask(hermes, "a < b")[::2] == ("a < b", [])
    # A template of no known form, and tools that must not be called: all of it is text.
    assert ask(chatty, CALL)[::2] == (CALL, [])
    assert ask(hermes, CALL, tool_choice="none")[::2] == (CALL, [])


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    "choice", ["required", {"type": "function", "function": {"name": "weather"}}]
)
def test_a_tool_that_must_be_called_is_called(
    site: Site, node: RunningNode, hermes: str, stream: bool, choice: Any
) -> None:
    with node.client(site.base, hermes) as client:
        text, finish, calls = ask_for_tools(client, stream=stream, tool_choice=choice)
    assert (text, finish) == (None, "tool_calls")
    assert {name for name, _ in calls} == {"weather"}
    assert all(json.loads(arguments)["city"] in {"a", "b"} for _, arguments in calls)


NAMED: Any = {"type": "function", "function": {"name": "weather"}}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("tool_choice", ["auto", "required", NAMED])
@pytest.mark.parametrize("parallel", [True, False])
def test_an_answer_has_one_call_where_it_may_have_no_more(
    site: Site, node: RunningNode, hermes: str, stream: bool, tool_choice: Any, parallel: bool
) -> None:
    """Each answer would go on with another call: it is made to, or a bias makes it."""
    more: dict[str, Any] = {"logit_bias": {str(BYTES.index(",")): 100}}
    if tool_choice == "auto":
        several = '<tool_call>{"name":"f","arguments":{}}' * 2
        more = {"extra_body": {"guided_choice": [several]}}
    with node.client(site.base, hermes) as client:
        text, finish, calls = ask_for_tools(
            client, stream=stream, max_tokens=105, tool_choice=tool_choice,
            parallel_tool_calls=parallel, **more,
        )  # fmt: skip
    several_allowed = parallel and tool_choice != NAMED
    assert (text, len(calls)) == (None, 1 + several_allowed)
    endless = tool_choice == "required" and several_allowed
    assert finish == ("length" if endless else "tool_calls")


@pytest.mark.parametrize("stream", [False, True])
def test_a_call_that_is_cut_off_is_no_text(
    site: Site, node: RunningNode, hermes: str, stream: bool
) -> None:
    body = {"guided_choice": [CALL]}
    for forced in (False, True):
        more: dict[str, Any] = {"tool_choice": NAMED} if forced else {"extra_body": body}
        whole = '[{"name": "weather", "parameters": {"city": "a"}}]' if forced else CALL
        begin = whole.index('{"city"')
        with node.client(site.base, hermes) as client:
            cut = [
                ask_for_tools(client, stream=stream, max_tokens=length, **more)
                for length in (begin - 3, begin + 4)
            ]
        assert cut[0] == ("" if not stream else None, "length", [])
        assert cut[1] == (None, "length", [("weather", '{"ci')])


def test_the_openai_packages_stream_takes_several_answers_in_any_order(
    site: Site, node: RunningNode, chatty: str
) -> None:
    """The first answer begins with half a character, and so with no text."""
    ask: dict[str, Any] = {
        "model": "m", "messages": TALK, "n": 2, "seed": 1, "max_tokens": 8, "temperature": 2,
        "extra_body": {"guided_regex": "(é|a)+"},
    }  # fmt: skip
    with node.client(site.base, chatty) as client:
        for seed in range(8):
            ask["seed"] = seed
            whole = client.chat.completions.create(**ask).choices
            if whole[0].message.content.startswith("é") > whole[1].message.content.startswith("é"):
                break
        with (
            client.chat.completions.stream(**ask) as stream,
            suppress(openai.LengthFinishReasonError),
        ):
            for _ in stream:
                pass
        streamed = stream._state.current_completion_snapshot.choices
    assert [c.message.content for c in streamed] == [c.message.content for c in whole]


def test_the_openai_packages_stream_has_the_calls_of_the_whole_answer(
    site: Site, node: RunningNode, hermes: str
) -> None:
    ask: dict[str, Any] = {
        "model": "m", "messages": TALK, "tools": [WEATHER], "tool_choice": NAMED, "seed": 1,
    }  # fmt: skip
    with node.client(site.base, hermes) as client:
        [whole] = client.chat.completions.create(**ask).choices
        with client.chat.completions.stream(**ask) as stream:
            kinds = [event.type for event in stream]
            [streamed] = stream.get_final_completion().choices
        with (
            client.chat.completions.stream(**ask, max_tokens=40) as stream,
            pytest.raises(openai.LengthFinishReasonError),
        ):
            stream.get_final_completion()
    [expected] = whole.message.tool_calls
    [call] = streamed.message.tool_calls
    assert "tool_calls.function.arguments.done" in kinds
    assert call.function.arguments == expected.function.arguments
    assert (call.function.name, streamed.finish_reason) == ("weather", "tool_calls")


def test_a_streamed_call_comes_as_it_is_generated(
    site: Site, node: RunningNode, hermes: str
) -> None:
    ask: dict[str, Any] = {
        "model": "m", "messages": TALK, "tools": [WEATHER], "seed": 1, "max_tokens": 80,
        "extra_body": {"guided_choice": [CALL]},
    }  # fmt: skip
    with node.client(site.base, hermes) as client:
        chunks = list(client.chat.completions.create(**ask, stream=True))
    found = [call for c in chunks for call in c.choices[0].delta.tool_calls or ()]
    first, *others = found
    assert (first.function.name, first.type, len(first.id)) == ("weather", "function", 9)
    assert first.id.isalnum()
    assert {(call.id, call.type, call.function.name) for call in others} == {(None, None, None)}
    arguments = '{"city": "a"}'
    assert "".join(call.function.arguments for call in found) == arguments
    # A token of these models is a character.
    assert len([call for call in found if call.function.arguments]) == len(arguments)
    assert chunks[-1].choices[0].finish_reason == "tool_calls"


def test_the_effort_of_reasoning_reaches_the_template(
    site: Site, node: RunningNode, carry: Carry
) -> None:
    template = "{{ reasoning_effort }}|{{ enable_thinking }}|{{ thinking }}|"
    asked: Any = {"model": "m", "messages": TALK, "max_tokens": 1}
    kwargs = {"chat_template_kwargs": {"thinking": "x"}}
    with node.client(site.base, carry(chat_template__jinja=template)) as client:
        lengths = [
            client.chat.completions.create(**asked, **more).usage.prompt_tokens
            for more in (
                {}, {"reasoning_effort": "high"}, {"reasoning_effort": "none"},
                {"reasoning_effort": "none", "extra_body": kwargs},
            )
        ]  # fmt: skip
    rendered = ("|||", "high|True|True|", "none|False|False|", "none|False|x|")
    assert lengths == [*map(len, rendered)]


def test_tools_and_results_reach_the_template(site: Site, node: RunningNode, carry: Carry) -> None:
    template = (
        "{% for t in tools %}{{ t.function.name }}{% endfor %}"
        "{% for m in messages %}{{ m.role }}"
        "{% for c in m.tool_calls or [] %}{{ c.function.arguments.city }}{% endfor %}{% endfor %}"
    )
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": '{"city": "a"}'}}
    messages: Any = [
        *TALK,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c", "content": "1"},
    ]
    with node.client(site.base, carry(chat_template__jinja=template)) as client:
        answer = client.chat.completions.create(
            model="m", messages=messages, tools=[WEATHER], max_tokens=1
        )
    assert answer.usage.prompt_tokens == len("weathersystemuserassistantatool")
