"""Schemas and choices as grammars: what an answer may be, and what is refused by name."""

import json
from typing import Any

import pytest

from deltadock.errors import InvalidInput
from deltadock.inference.prompts.grammar import GrammarSpec
from deltadock.inference.request import grammar_of
from deltadock.openai.chat import ChatRequest
from deltadock.openai.completions import CompletionRequest
from tests.inference.grammars import Grammars

NODE = {
    "type": "object",
    "properties": {"x": {"type": "integer"}, "next": {"$ref": "#/$defs/Node"}},
    "required": ["x"],
}
NESTED = {
    "type": "object",
    "properties": {"node": {"$ref": "#/$defs/Node"}},
    "required": ["node"],
    "$defs": {"Node": NODE},
}


def schema(content: Any) -> GrammarSpec:
    return GrammarSpec("json_schema", json.dumps(content), "response_format")


@pytest.mark.parametrize(
    ("content", "good", "bad"),
    [
        ({"type": "integer", "multipleOf": 5}, "10", "7"),
        ({"type": "string", "format": "password", "minLength": 3}, '"abc"', '"ab"'),
        ({"type": "string", "format": "email", "maxLength": 5}, '"a@b.c"', '"ab@cd.ef"'),
        ({"type": "object", "properties": {"format": {"type": "integer"}}}, '{"format":1}', "1"),
        ({"type": "object", "properties": {"not": {"const": 1}}}, '{"not":1}', '{"not":2}'),
        ({"type": "object", "propertyNames": {"pattern": "^a$"},
          "additionalProperties": {"type": "integer"}}, '{"a":1}', '{"b":1}'),
        ({"allOf": [{"$ref": "#/$defs/Node"}], "default": None, "$defs": {"Node": NODE}},
         '{"x":1}', "{}"),
        (NESTED, '{"node":{"x":1,"next":{"x":2}}}', '{"node":{"x":1,"next":{}}}'),
    ],
)  # fmt: skip
def test_what_is_enforced(grammars: Grammars, content: Any, good: str, bad: str) -> None:
    assert grammars.allows(schema(content), good)
    assert not grammars.allows(schema(content), bad)


@pytest.mark.parametrize(
    ("part", "named"),
    [
        ({"not": {"type": "string"}}, "'not'"),
        ({"type": "array", "items": {"type": "integer"}, "uniqueItems": True}, "'uniqueItems'"),
        ({"allOf": [{"type": "integer"}, {"minimum": 3}]}, "'allOf' with several"),
        ({"$ref": "#/$defs/Node", "required": ["next"]}, "'required' beside '\\$ref'"),
        ({"type": "string", "pattern": "^a+$", "minLength": 3}, "'minLength' beside 'pattern'"),
        ({"type": "string", "pattern": "^(?=a).*$"}, "looks ahead"),
        ({"type": "number", "multipleOf": 0.01}, "'multipleOf'"),
        ({"minimum": 5}, "'minimum' without 'type'"),
        ({"type": "object", "required": ["a"]}, "required 'a'"),
        ({"$ref": "https://example.org/schema"}, "another document"),
    ],
)
def test_what_is_not_enforced_is_refused(
    grammars: Grammars, part: dict[str, Any], named: str
) -> None:
    for content in (part, {"type": "object", "properties": {"a": {"anyOf": [part]}}}):
        with pytest.raises(InvalidInput, match=f"`response_format` cannot be used: .*{named}"):
            grammars.compile(schema(content))


def test_nesting_without_end_is_refused(grammars: Grammars) -> None:
    deep = '{"items":' * 9000 + "{}" + "}" * 9000
    with pytest.raises(InvalidInput, match="deep"):
        grammars.compile(GrammarSpec("json_schema", deep, "guided_json"))


@pytest.mark.parametrize("choice", ["\N{GRINNING FACE}", "é", 'q"\\', "a\nb", "\x7f"])
def test_choices_of_any_characters(grammars: Grammars, choice: str) -> None:
    request = CompletionRequest(model="m", prompt="a", guided_choice=["no", choice])
    assert grammars.allows(grammar_of(request), choice)


def test_a_forced_tool_may_have_definitions(grammars: Grammars) -> None:
    tools = [
        {"type": "function", "function": {"name": name, "parameters": parameters}}
        for name, parameters in (("other", {"type": "object", "properties": {}}), ("f", NESTED))
    ]
    request = ChatRequest.model_validate(
        {"model": "m", "messages": [{"role": "user", "content": "a"}], "tools": tools,
         "tool_choice": "required"}
    )  # fmt: skip
    call = '[{"name": "f", "parameters": {"node": {"x": 1, "next": {"x": 2}}}}]'
    assert grammars.allows(grammar_of(request), call)
    assert not grammars.allows(grammar_of(request), call.replace('"x": 2', ""))
