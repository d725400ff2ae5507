"""Tool calls in the text of an answer, in the forms of the families that have a known one."""

import json
import re
from collections.abc import Sequence
from typing import Final, Literal, NamedTuple

from pydantic_core import from_json

ToolForm = Literal["hermes", "mistral", "llama3", "json"]
"""How a model writes calls. `json` is the form of required calls, which a grammar enforces."""

HERMES: Final = "<tool_call>"
HERMES_END: Final = "</tool_call>"
MISTRAL: Final = "[TOOL_CALLS]"
PYTHON_TAG: Final = "<|python_tag|>"
BEGINNINGS: Final[dict[ToolForm, tuple[str, ...]]] = {
    "hermes": (HERMES,),
    "mistral": (MISTRAL,),
    "llama3": (PYTHON_TAG, "{"),
    "json": ("[", "{"),
}
"""Texts that begin a call; those of one character only at the beginning of an answer."""
MARKERS: Final = (HERMES, MISTRAL, PYTHON_TAG)
"""Texts that begin nothing but a call."""
BEFORE: Final[dict[ToolForm, re.Pattern[str]]] = {
    "hermes": re.compile(rf"(?P<prose>.*?){HERMES}\s*", re.DOTALL),
    # A list of calls; in newer models a name, an id and arguments after each marker.
    "mistral": re.compile(
        r"\s*+,\s*+(?=\{|\Z)|(?P<prose>.*?)\[TOOL_CALLS\]\s*+(?P<name>[^\s\[{]*+)\s*+"
        r"(?:\[CALL_ID\][^\[{]*+)?+(?:\[ARGS\]|\[)?+\s*+(?=\{)",
        re.DOTALL,
    ),
    "llama3": re.compile(rf"(?:\s|;|{re.escape(PYTHON_TAG)})*"),
    "json": re.compile(r"[\s\[\],]*"),
}
"""What stands before the JSON of a call."""
AFTER: Final = re.compile(rf"(?:\s|\]|;|{HERMES_END})*")
"""What ends a call, or the calls."""
BEGUN: Final = re.compile(
    r'\{\s*"name"\s*:\s*("(?:[^"\\]|\\.)*")\s*,\s*"(?:arguments|parameters)"\s*:\s*(\{.*)',
    re.DOTALL,
)
"""A call that is cut off in its arguments."""


class ParsedCall(NamedTuple):
    """A function's name, and its arguments as JSON, or the beginning of it."""

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


def parse_calls(
    form: ToolForm, text: str, *, cut_off: bool = False
) -> tuple[str, Sequence[ParsedCall]]:
    """The text around the calls, and the calls; all of the text if they cannot be parsed.

    Of a text that is `cut_off` the last call has the arguments that there are, which need not be
    complete JSON, and is left out if there are none yet.
    """
    begin = end = call_begins(form, text)
    prose = [text[:begin].rstrip()]
    calls: list[ParsedCall] = []
    try:
        while (found := BEFORE[form].match(text, end)) and found.end() < len(text):
            parts = found.groupdict("")
            call, end = _read(parts.get("name", ""), text, found.end(), cut_off=cut_off)
            if after := AFTER.match(text, end):
                end = after.end()
            prose.append(parts.get("prose", "").rstrip())
            calls += [] if call is None else [call]
    except (ValueError, KeyError, TypeError, RecursionError):
        if not (cut_off and calls):
            return text, ()
        found = None
    if not calls:
        certain = form == "json" or text.startswith(MARKERS, begin)
        return (prose[0] if cut_off and certain else text), ()
    # A beginning that nothing follows is no prose.
    rest = found.groupdict("").get("prose", "") if found else text[end:]
    if cut_off:
        rest = "" if HERMES_END.startswith(rest) else rest[: call_begins(form, rest)]
    return "\n".join(filter(None, [*prose, rest.rstrip()])), tuple(calls)


def _read(name: str, text: str, begin: int, *, cut_off: bool) -> tuple[ParsedCall | None, int]:
    """The call whose JSON begins there, and where it ends; None if cut off before its arguments.

    The JSON is the arguments if the `name` is known, else it contains both.

    Raises:
        KeyError, TypeError, ValueError, RecursionError: it is none.
    """
    try:
        value, end = json.JSONDecoder().raw_decode(text, begin)
    except ValueError:
        if not cut_off:
            raise
        from_json(text[begin:], allow_partial=True)  # raises if it is not cut off, but broken
        if name:
            return ParsedCall(name, text[begin:]), len(text)
        begun = BEGUN.match(text, begin)
        if begun is None:
            return None, len(text)
        try:
            end = json.JSONDecoder().raw_decode(text, begun.start(2))[1]
        except ValueError:  # they are cut off too
            end = len(text)
        return ParsedCall(json.loads(begun[1]), text[begun.start(2) : end]), len(text)
    if name:
        return ParsedCall(name, text[begin:end]), end
    arguments = value["arguments"] if "arguments" in value else value["parameters"]
    if not isinstance(value["name"], str) or not isinstance(arguments, dict | str):
        raise TypeError("not a call")
    if not isinstance(arguments, str):
        arguments = json.dumps(arguments, ensure_ascii=False)
    return ParsedCall(value["name"], arguments), end
