"""Calls of tools in the text of answers, by family."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deltadock.inference.prompts.tool_calls import FORMS, CallPart, ToolCallParser, tool_form

Calls = list[tuple[str, str]]

F = ("f", {"a": 1, "b": "é"})
G = ("g", {})


def parse(form: str, *pieces: str, cut_off: bool = False) -> tuple[str, Calls]:
    """The text and the calls, name and arguments, of an answer that comes in pieces."""
    parser = ToolCallParser(FORMS[form])
    parts = [part for piece in pieces for part in parser.push(piece)]
    parts += parser.finish(cut_off=cut_off)
    calls: Calls = []
    for part in parts:
        if isinstance(part, CallPart):
            if part.name is not None:
                calls.append((part.name, ""))
            assert part.number == len(calls) - 1
            calls[-1] = (calls[-1][0], calls[-1][1] + part.arguments)
    return "".join(part for part in parts if isinstance(part, str)), calls


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
        # The order of Hermes 2 Pro; keys beside those of a call; arguments that are a string.
        (
            "hermes",
            '<tool_call>\n{"arguments": {"a": 1, "b": "é"}, "name": "f"}\n</tool_call>\n'
            '<tool_call>{"name": "g", "arguments": {}}</tool_call> Wait.',
            "Wait.",
            [F, G],
        ),
        ("mistral", '[TOOL_CALLS] [{"name": "g", "arguments": {}, "id": "a1B2c3D4e"}]', "", [G]),
        ("llama3", '{"type": "function", "name": "g", "parameters": {}}', "", [G]),
        ("llama3", '{"name": "g", "parameters": "{}"}', "", [G]),
        # A bracket is missing.
        (
            "hermes",
            '<tool_call>{"name": "g", "arguments": {}</tool_call> <tool_call>{"name": "g", '
            '"arguments": {}}</tool_call>',
            "",
            [G, G],
        ),
        (
            "granite",
            '<|tool_call|>[{"name": "f", "arguments": {"a": 1, "b": "é"}}, {"name": "g", '
            '"arguments": {}}]',
            "",
            [F, G],
        ),
        ("granite", '<tool_call>[{"name": "g", "arguments": {}}]', "", [G]),
        (
            "phi4",
            '<|tool_call|>[{"name": "f", "arguments": {"a": 1, "b": "é"}}]<|/tool_call|>',
            "",
            [F],
        ),
        (
            "phi4",
            'functools[{"name": "g", "arguments": {}}, {"name": "g", "arguments": {}}]',
            "",
            [G, G],
        ),
        (
            "olmo3",
            'So.<function_calls>f(a=1, b="é")\ng()</function_calls>f(x)',
            "So.\nf(x)",
            [F, G],
        ),
        (
            "functiongemma",
            "<start_function_call>call:f{a:1,b:<escape>é<escape>}<end_function_call>"
            "<start_function_call>call:g{}<end_function_call>",
            "",
            [F, G],
        ),
    ],
)
def test_calls_are_parsed(
    form: str, text: str, content: str, calls: list[tuple[str, dict[str, object]]]
) -> None:
    found = parse(form, text)
    assert found[0] == content
    assert [(name, json.loads(arguments)) for name, arguments in found[1]] == calls


def test_arguments_are_what_the_model_wrote() -> None:
    for written in ('{"a":1,  "b": 2.0}', '{"a": }'):
        text = f'<tool_call>{{"name": "f", "arguments": {written}}}</tool_call>'
        assert parse("hermes", text) == ("", [("f", written)])


@pytest.mark.parametrize(
    ("written", "arguments"),
    [
        ('a="x\\n\\"\\u00e9y\\\\"', {"a": 'x\n"éy\\'}),
        ("a='it\\'s \"q\"', b='\\x41\\d'", {"a": 'it\'s "q"', "b": "A\\d"}),
        ("a = True, b=None, c=false,", None),
        ("a = True, b=None, c=false", {"a": True, "b": None, "c": False}),
        ("a=[1, -2.5e3, {'k': [\"v\", ()]}]", {"a": [1, -2500, {"k": ["v", []]}]}),
        ("a=word", {"a": "word"}),
        ("a='(}<tool_call>'", {"a": "(}<tool_call>"}),
        ('a="two\nlines"', {"a": "two\nlines"}),
    ],
)
def test_arguments_in_python_become_json(written: str, arguments: dict[str, object] | None) -> None:
    text = f"<function_calls>f({written})</function_calls>"
    content, [(name, found)] = parse("olmo3", text)
    assert (content, name) == ("", "f")
    if arguments is None:
        with pytest.raises(ValueError, match="Expecting"):
            json.loads(found)
    else:
        assert json.loads(found) == arguments


@pytest.mark.parametrize(
    ("written", "arguments"),
    [
        ('a:<escape>"\\{}, <b>\n<escape>', {"a": '"\\{}, <b>\n'}),
        ("a:true,b:-1.5,c:null", {"a": True, "b": -1.5, "c": None}),
        ("a:[<escape>x<escape>,1],b:{k:<escape><escape>}", {"a": ["x", 1], "b": {"k": ""}}),
        ("a:San Francisco,b:007", {"a": "San Francisco", "b": "007"}),
    ],
)
def test_arguments_of_functiongemma_become_json(written: str, arguments: object) -> None:
    text = f"<start_function_call>call:f{{{written}}}<end_function_call>"
    content, [(name, found)] = parse("functiongemma", text)
    assert (content, name, json.loads(found)) == ("", "f", arguments)


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
    form: str, text: str, content: str, names: str
) -> None:
    found = parse(form, text)
    assert (found[0], "".join(name for name, _ in found[1])) == (content, names)


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
    form: str, text: str, content: str
) -> None:
    assert parse(form, text, cut_off=True) == (content, [("f", "{}")])


def test_complete_arguments_of_a_call_that_is_cut_off_end_where_they_end() -> None:
    text = '{"name": "f", "arguments": {"a": 1}, "z"'
    assert parse("llama3", text, cut_off=True) == ("", [("f", '{"a": 1}')])


@pytest.mark.parametrize("repeated", [" ", "[", ",", " ,", "[TOOL_CALLS]", "[TOOL_CALLS]g["])
def test_text_that_repeats_does_not_take_long(repeated: str) -> None:
    """A pattern that tried each way to divide spaces took minutes."""
    text = f"[TOOL_CALLS]f{{}}[TOOL_CALLS]f{repeated * 100_000}"
    rest = text[len("[TOOL_CALLS]f{}") :].rstrip()
    assert parse("mistral", text) == (rest, [("f", "{}")])


@pytest.mark.parametrize(
    ("form", "text"),
    [
        ("hermes", 'Let me. <tool_call>\n{"name": "f", "arguments": {"a": 1, "b": "é"}}'),
        ("mistral", '[TOOL_CALLS] [{"name": "f", "arguments": {"a": 1, "b": "é"}}]'),
        ("mistral", '[TOOL_CALLS]f[ARGS]{"a": 1, "b": "é"}'),
        ("llama3", '{"name": "f", "parameters": {"a": 1, "b": "é"}}'),
        ("llama3", '<|python_tag|>{"name": "f", "parameters": {"a": 1, "b": "é"}}'),
        ("json", '[{"name": "f", "parameters": {"a": 1, "b": "é"}}]'),
        ("granite", '<|tool_call|>[{"name": "f", "arguments": {"a": 1, "b": "é"}}]'),
        ("phi4", 'functools[{"name": "f", "arguments": {"a": 1, "b": "é"}}]'),
    ],
)
def test_a_call_that_is_cut_off_has_what_there_is_of_its_arguments(form: str, text: str) -> None:
    begin, end = text.index('{"a"'), text.index("}") + 1
    for length in range(len(text)):
        content, calls = parse(form, text[:length], cut_off=True)
        if length <= begin:
            assert calls in ([], [("f", "")])
            assert content in {text[:length], "Let me.", ""}
        else:
            assert content == ("Let me." if form == "hermes" else "")
            assert calls == [("f", text[begin : min(length, end)])]
        again = f"{text}{text}"[: len(text) + length]
        assert parse(form, again, cut_off=True)[1][0] == ("f", text[begin:end])


@pytest.mark.parametrize(
    ("form", "text", "arguments"),
    [
        ("olmo3", '<function_calls>f(a=1, b="x', '{"a": 1, "b": "x'),
        ("functiongemma", "<start_function_call>call:f{a:<escape>x<esc", '{"a": "x'),
    ],
)
def test_translated_arguments_that_are_cut_off_are_the_beginning_of_json(
    form: str, text: str, arguments: str
) -> None:
    assert parse(form, text, cut_off=True) == ("", [("f", arguments)])


def test_a_broken_call_is_text_even_if_it_is_cut_off() -> None:
    assert parse("hermes", "<tool_call>{broken", cut_off=True) == ("<tool_call>{broken", [])
    for text in ('{"result": [1', "{", '{"name": "f"'):
        assert parse("llama3", text, cut_off=True) == (text, [])


def test_deep_nesting_is_no_error() -> None:
    deep = "<tool_call>" + '{"a":' * 9999
    assert parse("hermes", deep) == (deep, [])
    assert parse("hermes", deep, cut_off=True)[1] == []


@pytest.mark.parametrize("form", FORMS)
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
def test_what_is_no_call_is_text(form: str, text: str) -> None:
    assert parse(form, text) == (text, [])


PIECES = [
    "<tool_call>", "</tool_call>", "[TOOL_CALLS]", "f", "[ARGS]", "{", "}", "[", "]", '"', "'",
    '{"name": "f", "arguments": ', '{"a": 1}', ", ", " ", "<", "x", ";", "<function_calls>", "(a=",
    ")", "</function_calls>", "<start_function_call>call:f", "<end_function_call>", "<escape>", ":",
    "<|tool_call|>", "functools", "\\", "\n",
]  # fmt: skip


@given(
    form=st.sampled_from(sorted(FORMS)),
    text=st.lists(st.sampled_from(PIECES), max_size=12).map("".join),
    cut_off=st.booleans(),
)
def test_a_stream_finds_what_the_whole_answer_has(form: str, text: str, cut_off: bool) -> None:
    whole = parse(form, text, cut_off=cut_off)
    assert parse(form, *text, cut_off=cut_off) == whole
    if not (cut_off or whole[1]):
        assert whole[0] == text


def test_names_and_arguments_come_as_soon_as_they_are_known() -> None:
    parser = ToolCallParser(FORMS["hermes"])
    pieces = ["So <tool", '_call>{"name": "f", "argum', 'ents": {"a": "lo', "ng", '"}}</tool_call>']
    assert [parser.push(piece) for piece in pieces] == [
        ["So"],
        [],
        [CallPart(0, "f", ""), CallPart(0, None, '{"a": "lo')],
        [CallPart(0, None, "ng")],
        [CallPart(0, None, '"}')],
    ]
    assert parser.finish() == []


@pytest.mark.parametrize(
    ("template", "form"),
    [
        ("{{ '<tool_call>' }}", "hermes"),
        ("{{ '[TOOL_CALLS]' }}", "mistral"),
        ('{{ \'{"name": "f", "parameters": {}}\' }}', "llama3"),
        ("<|tool_call|> followed by a JSON list of tools used", "granite"),
        ("{{ '<|tool|>' + message['tools'] + '<|/tool|>' }}", "phi4"),
        ("{{- '<function_calls>' -}}", "olmo3"),
        ("{{- '<start_function_call>call:' + function['name'] + '{' -}}", "functiongemma"),
        ("{{ messages }}", None),
        (None, None),
    ],
)
def test_the_template_names_the_form(template: str | None, form: str | None) -> None:
    assert tool_form(template) == (None if form is None else FORMS[form])
