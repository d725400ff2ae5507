"""Tool calls in the text of an answer, in the forms of the families that have a known one."""

import json
from collections.abc import Sequence
from typing import Any, Final, Literal, NamedTuple

ToolForm = Literal["hermes", "mistral", "llama3", "json"]
"""How a model writes calls. `json` is the form of required calls, which a grammar enforces."""

HERMES: Final = "<tool_call>"
MISTRAL: Final = "[TOOL_CALLS]"
PYTHON_TAG: Final = "<|python_tag|>"
BEGINNINGS: Final[dict[ToolForm, tuple[str, ...]]] = {
    "hermes": (HERMES,),
    "mistral": (MISTRAL,),
    "llama3": (PYTHON_TAG, "{"),
    "json": ("[", "{"),
}
"""Texts that begin a call; those of one character only at the beginning of an answer."""


class ParsedCall(NamedTuple):
    """A function's name, and its arguments as JSON."""

    name: str
    arguments: str


def tool_form(template: str | None) -> ToolForm | None:
    """The form that a chat template asks for, None if it has none that is known."""
    if template is None:
        return None
    if HERMES in template:
        return "hermes"
    if MISTRAL in template:
        return "mistral"
    if PYTHON_TAG in template or '"parameters"' in template:
        return "llama3"
    return None


def call_begins(form: ToolForm, text: str) -> int:
    """Where a call begins, or may begin at the end of the text; its length if nowhere."""
    places = [len(text)]
    for beginning in BEGINNINGS[form]:
        if len(beginning) == 1:
            places += [0] if not text.strip() or text.lstrip().startswith(beginning) else []
            continue
        found = text.find(beginning)
        if found >= 0:
            places.append(found)
        places += [
            len(text) - length
            for length in range(1, min(len(beginning), len(text) + 1))
            if text.endswith(beginning[:length])
        ]
    return min(places)


def parse_calls(form: ToolForm, text: str) -> tuple[str, Sequence[ParsedCall]]:
    """The text before the calls, and the calls; all of the text if they cannot be parsed."""
    begin = call_begins(form, text)
    if begin == len(text):
        return text, ()
    try:
        calls = PARSERS[form](text[begin:])
    except (ValueError, KeyError, TypeError):
        return text, ()
    return (text[:begin].rstrip(), calls) if calls else (text, ())


def _call(value: Any) -> ParsedCall:
    """A call from `{"name": ..., "arguments" or "parameters": {...}}`.

    Raises:
        KeyError, TypeError, ValueError: it is not one.
    """
    arguments = value["arguments"] if "arguments" in value else value["parameters"]
    if not isinstance(value["name"], str) or not isinstance(arguments, dict | str):
        raise TypeError("not a call")
    text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
    return ParsedCall(value["name"], text)


def _hermes(text: str) -> list[ParsedCall]:
    """A JSON object after each marker."""
    calls = []
    place = text.find(HERMES)
    while place >= 0:
        value, end = _decode(text, place + len(HERMES))
        calls.append(_call(value))
        place = text.find(HERMES, end)
    return calls


def _mistral(text: str) -> list[ParsedCall]:
    """A JSON list after the marker; in newer models a name and arguments after each marker."""
    calls = []
    while text := text.strip():
        if not text.startswith(MISTRAL):
            raise ValueError("not a call")
        begin = next((place for place, letter in enumerate(text) if letter == "{"), len(text))
        name = text[len(MISTRAL) : begin].partition("[")[0].strip()
        value, end = _decode(text, begin if name else len(MISTRAL))
        if name:
            calls.append(ParsedCall(name, text[begin:end]))
        else:
            calls += [_call(one) for one in (value if isinstance(value, list) else [value])]
        text = text[end:]
    return calls


def _decode(text: str, begin: int) -> tuple[Any, int]:
    """The JSON value from `begin` on, after white space, and where it ends.

    Raises:
        ValueError: there is none.
    """
    return json.JSONDecoder().raw_decode(
        text, begin + len(text[begin:]) - len(text[begin:].lstrip())
    )


def _llama3(text: str) -> list[ParsedCall]:
    """JSON objects, separated by semicolons."""
    text = text.strip().removeprefix(PYTHON_TAG).strip()
    calls = []
    while text:
        value, end = _decode(text, 0)
        calls.append(_call(value))
        text = text[end:].lstrip("; \n")
    return calls


def _json(text: str) -> list[ParsedCall]:
    return [_call(value) for value in json.loads(text)]


PARSERS: Final = {"hermes": _hermes, "mistral": _mistral, "llama3": _llama3, "json": _json}
