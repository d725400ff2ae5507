"""Tool calls in the text of an answer, in the forms of the families that have a known one."""

import json
import re
from collections.abc import Callable
from typing import Final, NamedTuple

from pydantic_core import from_json

from deltadock.inference.prompts.tool_arguments import (
    Arguments,
    GemmaArguments,
    JsonArguments,
    PythonArguments,
)

NAME_PARTS: Final = r'"(?:name|arguments|parameters)"'
STRING: Final = r'"(?:[^"\\]++|\\.)*+"'
OBJECT: Final = (
    rf'\{{(?:\s*+(?!{NAME_PARTS})"\w*+"\s*+:\s*+{STRING}\s*+,)*+'
    rf'\s*+"name"\s*+:\s*+(?P<quoted>{STRING})\s*+,\s*+"(?:arguments|parameters)"\s*+:\s*+(?=\{{)'
)
"""A call as an object of JSON, up to its arguments."""
END_TAGS: Final = (
    "</tool_call>", "<|/tool_call|>", "</function_calls>", "<end_function_call>",
)  # fmt: skip
AFTER: Final = re.compile(rf"(?:[\s\];]|{'|'.join(map(re.escape, END_TAGS))})*+")
"""What ends a call, or the calls."""
MAX_HEAD: Final = 4096
"""Characters before a call's arguments."""


class ToolForm(NamedTuple):
    """How a family writes calls."""

    markers: tuple[str, ...]
    """Texts that begin nothing but calls."""
    head: re.Pattern[str]
    """A call from its marker, or the call before it, up to the first bracket of its arguments."""
    arguments: Callable[[], Arguments] = JsonArguments
    starts: str = ""
    """Characters that begin a call at the beginning of an answer."""
    goes_on: re.Pattern[str] = re.compile(r",\s*\{")
    """What begins another call after one, without a marker."""
    written: tuple[str, str, str] | None = None
    """What stands before, between and after calls in JSON, for templates that write none."""


def _head(pattern: str) -> re.Pattern[str]:
    return re.compile(rf"\s*+(?:{pattern})", re.DOTALL)


FORMS: Final = {
    "hermes": ToolForm(
        ("<tool_call>",),
        _head(rf"(?:<tool_call>\s*+\[?+|,)\s*+{OBJECT}"),
        written=("<tool_call>\n", "\n</tool_call>\n<tool_call>\n", "\n</tool_call>"),
    ),
    # A list of calls; in newer models a name, an id and arguments after each marker.
    "mistral": ToolForm(
        ("[TOOL_CALLS]",),
        _head(
            rf"(?:\[TOOL_CALLS\]\s*+\[?+|,)\s*+{OBJECT}|\[TOOL_CALLS\]\s*+(?P<name>[^\s\[{{]++)\s*+"
            r"(?:\[CALL_ID\][^\[{]*+)?+(?:\[ARGS\])?+\s*+(?=\{)"
        ),
    ),
    "llama3": ToolForm(
        ("<|python_tag|>",),
        _head(rf"(?:<\|python_tag\|>|[\s;])*+{OBJECT}"),
        starts="{",
        goes_on=re.compile(r"\{"),
    ),
    "granite": ToolForm(
        ("<|tool_call|>", "<tool_call>"),
        _head(rf"(?:(?:<\|tool_call\|>|<tool_call>)\s*+\[?+|,)\s*+{OBJECT}"),
        written=("<|tool_call|>[", ", ", "]"),
    ),
    "phi4": ToolForm(
        ("<|tool_call|>", "functools["),
        _head(rf"(?:<\|tool_call\|>\s*+\[?+|functools\[|,)\s*+{OBJECT}"),
        written=("<|tool_call|>[", ", ", "]<|/tool_call|>"),
    ),
    "olmo3": ToolForm(
        ("<function_calls>",),
        _head(r"(?:<function_calls>)?+[\s,]*+(?P<name>[\w.-]++)\s*+(?=\()"),
        PythonArguments,
        goes_on=re.compile(r"[\w.-]|,\s*[\w.-]"),
    ),
    "functiongemma": ToolForm(
        ("<start_function_call>",),
        _head(r"<start_function_call>\s*+call:(?P<name>[^\s{]++)\s*+(?=\{)"),
        GemmaArguments,
        goes_on=re.compile(r"(?!)"),
    ),
    # Of required calls, which a grammar enforces.
    "json": ToolForm((), _head(rf"[\s\[,]*+{OBJECT}"), starts="[{"),
}


def tool_form(template: str | None) -> ToolForm | None:
    """The form that a chat template asks for, None if it has none that is known."""
    if template is None:
        return None
    for text, name in (
        ("<start_function_call>", "functiongemma"),
        ("<function_calls>", "olmo3"),
        ("[TOOL_CALLS]", "mistral"),
        ("<|tool|>", "phi4"),
        ("<|tool_call|>", "granite"),
        ("<tool_call>", "hermes"),
        ("<|python_tag|>", "llama3"),
        ('"parameters"', "llama3"),
    ):
        if text in template:
            return FORMS[name]
    return None


class CallPart(NamedTuple):
    """What a text adds to a call.

    Attributes:
        number: the call's in the answer, from 0 on.
        name: the function's, where the call begins.
        arguments: more of its arguments as JSON.
    """

    number: int
    name: str | None
    arguments: str


class ToolCallParser:
    """Divides an answer that comes in pieces into text and calls.

    Text that may begin a call is held back until it is known, and so is whitespace, which is
    dropped beside calls; line breaks divide the texts around them.
    """

    def __init__(self, form: ToolForm) -> None:
        self._form = form
        self._held = ""
        """What is not known to be text or a part of a call."""
        self._read = self._read_text
        """Takes the next part of what is held; whether it took any."""
        self._found: list[str | CallPart] = []
        self._arguments: Arguments = JsonArguments()
        self._calls = 0
        self._is_object = self._is_closed = False
        """Whether the last call is an object of JSON, and whether markup has ended it."""
        self._has_text = self._is_divided = False
        """Whether there is text, and whether a call follows it."""

    def push(self, text: str) -> list[str | CallPart]:
        """The texts and parts of calls that the next text makes known, in their order."""
        self._held += text
        while self._read():
            pass
        found, self._found = self._found, []
        return found

    def finish(self, *, cut_off: bool = False) -> list[str | CallPart]:
        """What is left of an answer that was `cut_off` or has ended.

        A beginning of a call is text, unless the answer was cut off there.
        """
        found = self.push("")
        while self._read == self._read_head and self._take_whole():
            found += self.push("")
        if self._read not in (self._read_arguments, self._read_end) and not (
            cut_off and self._may_be_call()
        ):
            self._add_text(self._held.rstrip() if self._calls else self._held)
        self._held = ""
        return found + self._found

    def _add_text(self, text: str) -> None:
        if text:
            self._found.append("\n" + text if self._is_divided and self._has_text else text)
            self._has_text, self._is_divided = True, False

    def _begin_call(self, name: str, arguments: str, rest: str) -> None:
        self._found.append(CallPart(self._calls, name, arguments))
        self._calls += 1
        self._is_divided, self._is_closed = True, False
        self._held = rest

    def _read_text(self) -> bool:
        held = self._held
        places = [place for marker in self._form.markers if (place := held.find(marker)) >= 0]
        starts = not (self._calls or self._has_text) and held.lstrip()[:1] in self._form.starts
        if held.strip() and starts:
            places.append(0)
        if places:
            self._read = self._read_head
        end = min(places, default=len(held) - self._partial_marker())
        text = held[:end].rstrip()
        self._add_text(text)
        self._held = held[len(text) :]
        return bool(places)

    def _partial_marker(self) -> int:
        """Characters at the end of what is held that may begin a marker."""
        held = self._held
        return max(
            (
                length
                for marker in self._form.markers
                for length in range(1, min(len(marker), len(held) + 1))
                if held.endswith(marker[:length])
            ),
            default=0,
        )

    def _read_head(self) -> bool:
        found = self._form.head.match(self._held, 0, MAX_HEAD)
        if found is None:
            return False
        named = found.groupdict()
        quoted = named.get("quoted")
        try:
            name = named["name"] if quoted is None else json.loads(quoted)
        except ValueError:
            return False
        self._begin_call(name, "", self._held[found.end() :])
        self._is_object = quoted is not None
        self._arguments, self._read = self._form.arguments(), self._read_arguments
        return True

    def _read_arguments(self) -> bool:
        json_text, rest = self._arguments.push(self._held)
        if json_text:
            self._found.append(CallPart(self._calls - 1, None, json_text))
        self._held = rest or ""
        if rest is not None:
            self._arguments = JsonArguments(depth=1)
            self._read = self._read_end if self._is_object else self._read_after
        return rest is not None

    def _read_end(self) -> bool:
        """The rest of the object whose arguments have ended."""
        _, rest = self._arguments.push(self._held)
        self._held = rest or ""
        if rest is not None:
            self._read = self._read_after
        return rest is not None

    def _read_after(self) -> bool:
        ended = AFTER.match(self._held)
        assert ended is not None
        self._held = held = self._held[ended.end() :]
        self._is_closed |= "<" in ended[0]
        if held.rstrip() in ("", ",") or any(tag.startswith(held) for tag in END_TAGS):
            return False
        goes_on = not self._is_closed and self._form.goes_on.match(held)
        self._read = self._read_head if goes_on else self._read_text
        return True

    def _take_whole(self) -> bool:
        """Take a call that is complete, but not as `head` describes it."""
        markers = "|".join(map(re.escape, self._form.markers)) or "(?!)"
        begin = re.match(rf"(?:{markers}|[\s\[,])*+", self._held)
        assert begin is not None
        try:
            call, end = json.JSONDecoder().raw_decode(self._held, begin.end())
            arguments = call["arguments"] if "arguments" in call else call["parameters"]
            if not isinstance(call["name"], str) or not isinstance(arguments, dict | str):
                return False
        except (ValueError, KeyError, TypeError, RecursionError):
            return False
        if not isinstance(arguments, str):
            arguments = json.dumps(arguments, ensure_ascii=False)
        self._begin_call(call["name"], arguments, self._held[end:])
        self._read = self._read_after
        return True

    def _may_be_call(self) -> bool:
        """Whether what is held may begin a call that is cut off."""
        held = self._held.lstrip()
        marker = next(filter(held.startswith, self._form.markers), None)
        if marker is None and not self._calls and self._form.markers:
            return False
        begun = held.removeprefix(marker or "").lstrip("[, \n\r\t")
        try:
            from_json(begun if begun.startswith("{") else "{}", allow_partial=True)
        except ValueError:
            return False
        return True
