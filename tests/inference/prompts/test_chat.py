"""Chat templates render like in transformers; hostile ones fail only their own request."""

import json
import signal
import subprocess
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from deltadock.errors import InvalidInput, UnsupportedModel
from deltadock.inference.prompts.chat import (
    PROCESSES,
    ChatFormat,
    Conversation,
    TemplateSandbox,
    chat_format,
)
from deltadock.inference.prompts.tokenizer import Tokenizer, read_tokenizer_files

CHATML = """
{%- if messages[0].role == 'system' %}
    {{- '<|system|>' + messages[0].content | trim + '\\n' }}
    {%- set messages = messages[1:] %}
{%- endif %}
{%- set state = namespace(turns=0) %}
{%- for message in messages %}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('Roles must alternate.') }}
    {%- endif %}
    {%- if message.role == 'assistant' %}
        {%- generation %}{{ bos_token + message.content }}{% endgeneration %}
    {%- else %}
        {{- '<|' + message.role + '|>' + (message | tojson) }}
    {%- endif %}
    {%- set state.turns = state.turns + 1 %}
    {%- if state.turns > 50 %}{% break %}{% endif %}
{%- endfor %}
{%- if tools is none and add_generation_prompt %}
    {{- '<|assistant|>' + eos_token }}
{%- endif %}
"""
TALK = (
    {"role": "system", "content": " Kürze! "},
    {"role": "user", "content": "<b>'17 + 25'</b>?"},
    {"role": "assistant", "content": "42"},
    {"role": "user", "content": "\N{GRINNING FACE}"},
)


@pytest.fixture(scope="module")
def sandbox() -> Iterator[TemplateSandbox]:
    sandbox = TemplateSandbox()
    yield sandbox
    sandbox.close()


def form(template: str | None) -> ChatFormat:
    return ChatFormat(template, {"bos_token": "<s>", "eos_token": "</s>"})


@pytest.mark.parametrize("jinja_file", [True, False])
def test_rendered_prompts_match_transformers(
    sandbox: TemplateSandbox, tokenizer_json: str, tmp_path: Path, jinja_file: bool
) -> None:
    (tmp_path / "tokenizer.json").write_text(tokenizer_json)
    theirs = PreTrainedTokenizerFast(
        tokenizer_file=str(tmp_path / "tokenizer.json"),
        bos_token="<special-0>",
        eos_token="<special-1>",
        chat_template=CHATML,
    )
    theirs.save_pretrained(tmp_path, save_jinja_files=jinja_file)
    assert (tmp_path / "chat_template.jinja").exists() == jinja_file
    ours = Tokenizer(read_tokenizer_files(tmp_path))
    text = sandbox.prompt(ours.chat, Conversation(TALK))
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    assert text == theirs.apply_chat_template(TALK, tokenize=False, add_generation_prompt=True)
    ids = theirs.apply_chat_template(TALK, add_generation_prompt=True, return_dict=False)
    assert ours.encode(text, special_tokens=False) == ids


def test_the_template_file_takes_precedence_and_the_default_is_used() -> None:
    several = [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}]
    config = json.dumps(
        {"chat_template": several, "bos_token": {"content": "<s>", "lstrip": False}}
    )
    found = chat_format({"tokenizer_config.json": config})
    assert found == ChatFormat("d", {"bos_token": "<s>"}, "t")
    both = {"tokenizer_config.json": config, "chat_template.jinja": "file"}
    assert chat_format(both) == ChatFormat("file", {"bos_token": "<s>"})
    assert chat_format({}) == ChatFormat(None, {})


def test_a_conversation_with_tools_may_have_its_own_template(sandbox: TemplateSandbox) -> None:
    several = ChatFormat("plain", {}, "{{ tools[0].name }}")
    assert sandbox.prompt(several, Conversation(TALK)) == "plain"
    assert sandbox.prompt(several, Conversation(TALK, tools=({"name": "f"},))) == "f"
    assert sandbox.prompt(ChatFormat("plain", {}), Conversation(TALK, tools=({},))) == "plain"


def test_a_model_without_a_template_is_refused_with_advice(sandbox: TemplateSandbox) -> None:
    with pytest.raises(UnsupportedModel, match=r"no chat template\. Send a prompt to /v1/comple"):
        sandbox.prompt(form(None), Conversation(TALK))


@pytest.mark.parametrize(
    ("template", "named"),
    [
        ("{{ raise_exception('No system role here.') }}", "No system role here"),
        ("{{ messages[0].content.nothing.further }}", "UndefinedError"),
        ("{% for %}", "TemplateSyntaxError"),
        # Escapes into the interpreter.
        ("{{ ''.__class__.__mro__ }}", "SecurityError|UndefinedError"),
        ("{{ raise_exception.__globals__['sys'] }}", "SecurityError|UndefinedError"),
        ("{{ namespace(__init__=1) }}", "SecurityError"),
        ("{{ lipsum.__globals__ }}", "UndefinedError"),
        ("{% set x = messages.append(1) %}", "SecurityError"),
        # Excessive use of CPU and memory.
        ("{% for i in range(9999) %}{{ 'x' * 9999 }}{% endfor %}", "exceeds"),
        ("{{ 'x' | center(1000000000) }}", "MemoryError|more time or memory"),
        ("{% set n = namespace(x='x') %}{% for i in range(50) %}{% set n.x = n.x + n.x %}"
         "{% endfor %}{{ n.x }}", "MemoryError|more time or memory"),
        ("{% set r = range(99999) %}{% for a in r %}{% for b in r %}{% endfor %}{% endfor %}",
         "more time or memory"),
        ("{{ 7 ** (9 ** 9) > 1 }}", "more time or memory"),
    ],
)  # fmt: skip
def test_a_hostile_template_fails_its_own_request(
    sandbox: TemplateSandbox, template: str, named: str
) -> None:
    with pytest.raises(InvalidInput, match=named):
        sandbox.prompt(form(template), Conversation(TALK))
    assert sandbox.prompt(form("{{ messages | length }}{{ bos_token }}"), Conversation(TALK)) == (
        "4<s>"
    )


def process_of(sandbox: TemplateSandbox) -> subprocess.Popen[bytes] | None:
    """The process that rendered last; others start only while it is busy."""
    *others, last = sandbox._idle.queue
    assert [other._process for other in others] == [None] * (PROCESSES - 1)
    return last._process


def test_a_template_that_killed_the_sandbox_is_refused_for_a_minute(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sandbox = TemplateSandbox()
    endless = form("{{ 7 ** (9 ** 9) > 2 }}")
    try:
        for _ in range(2):
            with pytest.raises(InvalidInput, match="is refused for a minute"):
                sandbox.prompt(endless, Conversation(TALK))
            assert process_of(sandbox) is None, "the second request starts no process"
        assert sandbox.prompt(form("x"), Conversation(TALK)) == "x"
        monkeypatch.setattr(sandbox, "_paused", OrderedDict({(None, endless.template): 0.0}))
        before = process_of(sandbox)
        with pytest.raises(InvalidInput):
            sandbox.prompt(endless, Conversation(TALK))
        assert before is not None
        assert process_of(sandbox) is None, "the minute has elapsed"
    finally:
        sandbox.close()


SLOW_IF_ASKED = """
{%- set r = range(99999 if hard or tools or messages | length > 1 else 1) %}
{%- for a in r %}{% for b in r %}{% endfor %}{% endfor %}
{{- messages[0].content }}"""


@pytest.mark.parametrize(
    "hard",
    [
        Conversation(TALK[1:2], variables={"hard": True}),
        Conversation(TALK[1:2], tools=({"name": "f"},)),
        Conversation(TALK[1:]),
    ],
)
def test_a_hard_conversation_fails_alone(
    sandbox: TemplateSandbox, hard: Conversation, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All fine-tunes of a base share its template, and clients choose the conversation."""
    monkeypatch.setattr("deltadock.inference.prompts.chat.WALL_SECONDS", 60.0)
    with pytest.raises(InvalidInput, match="allowed for this conversation"):
        sandbox.prompt(form(SLOW_IF_ASKED), hard, "acme")
    for tenant in ("acme", "beta"):
        assert sandbox.prompt(form(SLOW_IF_ASKED), Conversation(TALK[1:2]), tenant)


def test_a_refused_template_is_refused_to_its_tenant_alone(sandbox: TemplateSandbox) -> None:
    """A delta's special tokens reach the template too."""
    shared = "{{ 'ok' if bos_token == '<s>' else bos_token | length ** (9 ** 9) > 2 }}"
    with pytest.raises(InvalidInput, match="is refused for a minute"):
        sandbox.prompt(ChatFormat(shared, {"bos_token": "seven"}), Conversation(TALK), "acme")
    assert sandbox.prompt(form(shared), Conversation(TALK), "beta") == "ok"


def test_reading_a_large_conversation_takes_none_of_its_templates_time(
    sandbox: TemplateSandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three million lists take seconds to read."""
    monkeypatch.setattr("deltadock.inference.prompts.chat.WALL_SECONDS", 60.0)
    nested: list[Any] = []
    for _ in range(80):
        nested = [nested]
    line = json.dumps({"template": "ok", "variables": {"x": [nested] * 40_000}}).encode() + b"\n"
    last = sandbox._idle.queue[-1]
    assert json.loads(last.request(line)) == {"text": "ok"}


def test_a_conversation_of_too_many_values_is_refused(sandbox: TemplateSandbox) -> None:
    many: dict[str, Any] = {"x": [[[]] * 1000] * 1000}
    for hostile in (
        Conversation(TALK, variables=many),
        Conversation(TALK, tools=(many,)),
        Conversation(({"role": "user", "content": ""},) * 100_000),
    ):
        with pytest.raises(InvalidInput, match="more than 200000 JSON values"):
            sandbox.prompt(form("ok"), hostile)


def test_a_killed_sandbox_is_restarted(sandbox: TemplateSandbox) -> None:
    assert sandbox.prompt(form("a"), Conversation(TALK)) == "a"
    process = process_of(sandbox)
    assert process is not None
    process.kill()
    process.wait()
    assert sandbox.prompt(form("b"), Conversation(TALK)) == "b"


def test_a_template_that_sleeps_is_stopped_by_the_clock(
    sandbox: TemplateSandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its CPU time never runs out."""
    assert sandbox.prompt(form("a"), Conversation(TALK)) == "a"
    process = process_of(sandbox)
    assert process is not None
    process.send_signal(signal.SIGSTOP)
    monkeypatch.setattr("deltadock.inference.prompts.chat.WALL_SECONDS", 2.0)
    with pytest.raises(InvalidInput, match="more time or memory"):
        sandbox.prompt(form("b"), Conversation(TALK))
    monkeypatch.setattr("deltadock.inference.prompts.chat.WALL_SECONDS", 60.0)
    assert sandbox.prompt(form("c"), Conversation(TALK)) == "c"


def test_templates_render_at_the_same_time(sandbox: TemplateSandbox) -> None:
    """All but one process are stuck; the last answers."""
    stuck = [sandbox._idle.get() for _ in range(PROCESSES - 1)]
    assert sandbox.prompt(form("a"), Conversation(TALK)) == "a"
    for process in stuck:
        sandbox._idle.put(process)


def test_the_developer_role_is_the_system_role_where_a_template_does_not_know_it(
    sandbox: TemplateSandbox,
) -> None:
    talk = Conversation(({"role": "developer", "content": "a"},))
    old = form("{% for m in messages %}{{ m.role }}{% endfor %}")
    new = form("{% if messages[0].role == 'developer' %}new{% endif %}")
    assert [sandbox.prompt(template, talk) for template in (old, new)] == ["system", "new"]


TURNS = form(
    "{% for m in messages %}<{{ m.role }}>{{ m.content | trim }}<end>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% if thinking %}<think>{% endif %}{% endif %}"
)
ANSWERED = ({"role": "user", "content": "a"}, {"role": "assistant", "content": " b "})


@pytest.mark.parametrize(
    ("settings", "prompt"),
    [
        ({}, "<user>a<end><assistant>b<end><assistant>"),
        ({"variables": {"thinking": True}}, "<user>a<end><assistant>b<end><assistant><think>"),
        ({"add_generation_prompt": False}, "<user>a<end><assistant>b<end>"),
        (
            {"add_generation_prompt": False, "continue_final_message": True},
            "<user>a<end><assistant>b",
        ),
    ],
)  # fmt: skip
def test_template_options_reach_the_template(
    sandbox: TemplateSandbox, settings: dict[str, Any], prompt: str
) -> None:
    assert sandbox.prompt(TURNS, Conversation(ANSWERED, **settings)) == prompt


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"variables": {"messages": []}}, "cannot set 'messages'"),
        ({"continue_final_message": True}, "needs a last message"),
    ],
)
def test_template_options_that_cannot_apply_are_refused(
    sandbox: TemplateSandbox, settings: dict[str, Any], message: str
) -> None:
    empty = Conversation(({"role": "assistant", "content": ""},), **settings)
    with pytest.raises(InvalidInput, match=message):
        sandbox.prompt(TURNS, empty)
