"""Calls of tools in the text of answers, by family."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deltadock.inference.prompts.tool_calls import (
    BEFORE,
    ParsedCall,
    ToolForm,
    call_begins,
    parse_calls,
    tool_form,
)

F = ("f", {"a": 1, "b": "é"})
G = ("g", {})


@pytest.mark.parametrize(
    ("form", "text", "content", "calls"),
    [
        (
            "hermes",
            'Let me.\n<tool_call>\n{"name": "f", "arguments": {"a": 1, "b": "é"}}\n</tool_call>\n'
            '<tool_call>{"name": "g", "arguments": {}}</tool_call>',
            "Let me.",
            [F, G],
        ),
        ("hermes", '<tool_call>{"name": "g", "arguments": {}}', "", [G]),
        ("mistral", '[TOOL_CALLS] [{"name": "f", "arguments": {"a": 1, "b": "é"}}]', "", [F]),
        ("mistral", '[TOOL_CALLS]f[ARGS]{"a": 1, "b": "é"}[TOOL_CALLS]g{}', "", [F, G]),
        ("llama3", '{"name": "f", "parameters": {"a": 1, "b": "é"}}', "", [F]),
        ("mistral", '[TOOL_CALLS]f[CALL_ID]a1B2c3D4e[ARGS]{"a": 1, "b": "é"}', "", [F]),
        ("mistral", '[TOOL_CALLS]{"name": "g", "arguments": {}}', "", [G]),
        (
            "mistral",
            '[TOOL_CALLS]f{"a": "[TOOL_CALLS]"}\n[TOOL_CALLS] g {}',
            "",
            [("f", {"a": "[TOOL_CALLS]"}), G],
        ),
        (
            "hermes",
            '<tool_call>{"name": "f", "arguments": {"a": "</tool_call>"}}</tool_call>',
            "",
            [("f", {"a": "</tool_call>"})],
        ),
        (
            "llama3",
            '<|python_tag|>{"name": "g", "parameters": {}}; {"name": "g", "parameters": {}}',
            "",
            [G, G],
        ),
        ("json", '[{"name": "f", "parameters": {"a": 1, "b": "é"}}]', "", [F]),
    ],
)
def test_calls_are_parsed(
    form: ToolForm, text: str, content: str, calls: list[tuple[str, dict[str, object]]]
) -> None:
    found = parse_calls(form, text)
    assert found[0] == content
    assert [(call.name, json.loads(call.arguments)) for call in found[1]] == calls


@pytest.mark.parametrize(
    ("form", "text", "content", "names"),
    [
        (
            "mistral",
            '[TOOL_CALLS][{"name": "f", "arguments": {}}]\nFor example: {"a": 1}',
            'For example: {"a": 1}',
            "f",
        ),
        ("mistral", '[TOOL_CALLS]f[ARGS]{"a": 1}, as in {"x": 2}', ', as in {"x": 2}', "f"),
        ("mistral", "Now [TOOL_CALLS]f{} then [TOOL_CALLS]g{} end.", "Now\nthen\nend.", "fg"),
        ("mistral", "[TOOL_CALLS]f{} [TOOL_CALLS]g", "[TOOL_CALLS]g", "f"),
        (
            "hermes",
            'Now <tool_call>{"name": "f", "arguments": {}}</tool_call> then '
            '<tool_call>{"name": "g", "arguments": {}}\n</tool_call> end.',
            "Now\nthen\nend.",
            "fg",
        ),
    ],
)
def test_text_around_calls_is_kept_and_is_no_call(
    form: ToolForm, text: str, content: str, names: str
) -> None:
    found = parse_calls(form, text)
    assert (found[0], "".join(call.name for call in found[1])) == (content, names)


@pytest.mark.parametrize(
    ("form", "text", "content"),
    [
        ("mistral", "[TOOL_CALLS]f{}", ""),
        ("mistral", "[TOOL_CALLS]f{} then [TOOL", "then"),
        ("mistral", "[TOOL_CALLS]f{} [TOOL_CALLS]g", ""),
        ("mistral", '[TOOL_CALLS][{"name": "f", "arguments": {}}, ', ""),
        ("hermes", '<tool_call>{"name": "f", "arguments": {}}\n</tool_c', ""),
        ("hermes", '<tool_call>{"name": "f", "arguments": {}}</tool_call> then <tool', "then"),
        ("json", '[{"name": "f", "parameters": {}}, ', ""),
        ("llama3", '{"name": "f", "parameters": {}}; ', ""),
        ("llama3", '{"name": "f", "parameters": {}} then', "then"),
    ],
)
def test_what_is_cut_off_after_a_call_is_text_unless_it_begins_another(
    form: ToolForm, text: str, content: str
) -> None:
    assert parse_calls(form, text, cut_off=True) == (content, (ParsedCall("f", "{}"),))


def test_complete_arguments_of_a_call_that_is_cut_off_end_where_they_end() -> None:
    text = '{"name": "f", "arguments": {"a": 1}, "z"'
    assert parse_calls("llama3", text, cut_off=True) == ("", (ParsedCall("f", '{"a": 1}'),))


@pytest.mark.parametrize("repeated", [" ", "[", ",", " ,", "[TOOL_CALLS]", "[TOOL_CALLS]g["])
def test_text_that_repeats_does_not_take_long(repeated: str) -> None:
    """A pattern that tried each way to divide spaces took minutes."""
    text = f"[TOOL_CALLS]f{{}}[TOOL_CALLS]f{repeated * 100_000}"
    assert parse_calls("mistral", text) == (
        text[len("[TOOL_CALLS]f{}") :].rstrip(),
        (ParsedCall("f", "{}"),),
    )


@pytest.mark.parametrize(
    ("form", "text"),
    [
        ("hermes", 'Let me. <tool_call>\n{"name": "f", "arguments": {"a": 1, "b": "é"}}'),
        ("mistral", '[TOOL_CALLS] [{"name": "f", "arguments": {"a": 1, "b": "é"}}]'),
        ("mistral", '[TOOL_CALLS]f[ARGS]{"a": 1, "b": "é"}'),
        ("llama3", '{"name": "f", "parameters": {"a": 1, "b": "é"}}'),
        ("llama3", '<|python_tag|>{"name": "f", "parameters": {"a": 1, "b": "é"}}'),
        ("json", '[{"name": "f", "parameters": {"a": 1, "b": "é"}}]'),
    ],
)
def test_a_call_that_is_cut_off_has_what_there_is_of_its_arguments(
    form: ToolForm, text: str
) -> None:
    begin, end = text.index('{"a"'), text.index("}") + 1
    for length in range(len(text)):
        content, calls = parse_calls(form, text[:length], cut_off=True)
        if length <= begin:
            assert calls == ()
            assert content in {text[:length], "Let me.", ""}
        else:
            assert content == ("Let me." if form == "hermes" else "")
            assert calls == (ParsedCall("f", text[begin : min(length, end)]),)
        again = f"{text}{text}"[: len(text) + length]
        assert parse_calls(form, again, cut_off=True)[1][0] == ParsedCall("f", text[begin:end])


def test_a_broken_call_is_text_even_if_it_is_cut_off() -> None:
    for text in ("<tool_call>{broken", '<tool_call>{"arguments": {}}', f"<tool_call>{'[' * 9999}"):
        assert parse_calls("hermes", text, cut_off=True) == (text, ())
    for text in ('{"result": [1', "{", '{"name": "f"'):
        assert parse_calls("llama3", text, cut_off=True) == (text, ())


@pytest.mark.parametrize("form", BEFORE)
@pytest.mark.parametrize(
    "text",
    [
        "plain text",
        "a < b and {x}",
        "a <",
        "a <tool_call>",
        "a [TOOL",
        "<tool_call>{broken",
        '<tool_call>{"arguments": {}}</tool_call>',
        "[TOOL_CALLS] [1]",
        "[TOOL_CALLS]f",
        '{"name": 1, "parameters": {}}',
        "{",
        "[null]",
    ],
)
def test_what_is_no_call_is_text(form: ToolForm, text: str) -> None:
    assert parse_calls(form, text) == (text, ())


@given(
    form=st.sampled_from(sorted(BEFORE)),
    text=st.text('<tool_cal>[TOOL_CALLS]{}"a1:, ;', max_size=40),
)
def test_a_stream_holds_back_every_call(form: ToolForm, text: str) -> None:
    """Text that was output never turns out to be a part of a call."""
    output = ""
    for length in range(len(text) + 1):
        shown = text[: call_begins(form, text[:length])]
        assert shown.startswith(output)
        output = shown
    for cut_off in (False, True):
        content, calls = parse_calls(form, text, cut_off=cut_off)
        assert content.startswith(output.rstrip())
        assert calls or content in {text, output.rstrip()}


@pytest.mark.parametrize(
    ("template", "form"),
    [
        ("{{ '<tool_call>' }}", "hermes"),
        ("{{ '[TOOL_CALLS]' }}", "mistral"),
        ('{{ \'{"name": "f", "parameters": {}}\' }}', "llama3"),
        ("{{ messages }}", None),
        (None, None),
    ],
)
def test_the_template_names_the_form(template: str | None, form: str | None) -> None:
    assert tool_form(template) == form
