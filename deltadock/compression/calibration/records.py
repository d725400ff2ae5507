"""The lines of a .jsonl calibration text, one JSON object each.

Plain Python, for the api and the client.
"""

import json
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Final

from deltadock.errors import InvalidCalibration

RECORD_FIELDS: Final = "`text`, `messages`, `prompt` and `completion`, or `prompt`"
TWO_HELD_OUT: Final = "one to calibrate, one to choose between outcomes, one to report"
LEAST_DOCUMENTS: Final = 3

Turns = str | list[dict[str, Any]]
"""Plain text, or messages with `role` and `content`."""


class RecordReader:
    """Parses a file line by line, in the memory of one.

    Attributes:
        kind: of its lines; empty before the first.
    """

    def __init__(self) -> None:
        self.kind = ""
        self._number = 0
        self._seen: set[int] = set()

    def read(self, line: str) -> "Record | None":
        """Parse the next line; None: it is blank.

        Raises:
            InvalidCalibration: it is invalid, or of another kind than those before it.
        """
        self._number += 1
        if not line.strip():
            return None
        record = Record.of(self._number, line)
        self.kind = self.kind or record.kind
        if record.kind != self.kind:
            raise InvalidCalibration(
                f"Line {record.number} of the calibration file has {record.kind}, but the lines "
                f"before it {self.kind}. Give each kind a file of its own."
            )
        if len(self._seen) < LEAST_DOCUMENTS:
            self._seen.add(hash(repr((record.prompt, record.completion, record.tools))))
        return record

    def finish(self) -> None:
        """Check that there were lines, and enough different ones.

        Raises:
            InvalidCalibration: there were not.
        """
        if not self.kind:
            raise InvalidCalibration("The calibration file has no lines.")
        check_documents(self.kind, len(self._seen))


def check_documents(kind: str, count: int) -> None:
    """Check that of `count` different lines of a kind enough are left to hold some out.

    Raises:
        InvalidCalibration: they are too few.
    """
    if kind != "text" and count < LEAST_DOCUMENTS:
        plural = "prompts" if kind == "prompt" else kind
        raise InvalidCalibration(f"At least three different {plural} are needed: {TWO_HELD_OUT}.")


@dataclass(frozen=True, slots=True)
class Record:
    """One line: the prompt, and the model's completion."""

    number: int
    kind: str
    prompt: Turns
    completion: Turns = ""
    tools: list[dict[str, Any]] | None = None
    """The functions that may be called in the conversation."""

    @classmethod
    def of(cls, number: int, line: str) -> "Record":
        """Parse a line.

        Raises:
            InvalidCalibration: it has none of the fields of `RECORD_FIELDS`, or of other types.
        """
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise InvalidCalibration(
                f"Line {number} of the calibration file is not a JSON object."
            ) from error
        if isinstance(record, dict):
            tools = record.get("tools") or None
            if not (tools is None or _are_objects(tools)):
                raise InvalidCalibration(
                    f"`tools` in line {number} of the calibration file is not a list of objects."
                )
            match record:
                case {"text": str(text)}:
                    return cls(number, "text", _utf8(text, number))
                case {"messages": messages} if _is_turns(messages):
                    return cls(number, "conversations", _plain(messages, number), tools=tools)
                case {"prompt": str(prompt), "completion": str(completion)}:
                    return cls(number, "conversations", prompt, completion)
                case {"prompt": prompt, "completion": completion} if _is_turns(
                    prompt
                ) and _is_turns(completion):
                    turns = _plain([*prompt, *completion], number)
                    return cls(number, "conversations", turns, tools=tools)
                case {"prompt": str(prompt)} if "completion" not in record:
                    return cls(number, "prompt", prompt)
                case {"prompt": prompt} if "completion" not in record and _is_turns(prompt):
                    return cls(number, "prompt", _plain(prompt, number), tools=tools)
        raise InvalidCalibration(
            f"Line {number} of the calibration file is not an object with {RECORD_FIELDS}."
        )

    @property
    def characters(self) -> int:
        """Approximate length of the rendered line."""
        return sum(
            len(part) if isinstance(part, str) else sum(len(str(turn)) for turn in part)
            for part in (self.prompt, self.completion, self.tools or ())
        )

    def render(self, tokenizer: Any) -> str:
        """Render the line as text, messages through the chat template.

        Raises:
            InvalidCalibration: there is no template, or it refuses the messages.
        """
        if isinstance(self.prompt, str):
            end = "" if self.kind == "prompt" else tokenizer.eos_token or ""
            return _utf8(f"{self.prompt}{self.completion}{end}", self.number)
        if not tokenizer.chat_template:
            raise InvalidCalibration(
                f"Line {self.number} of the calibration file holds messages, but the fine-tune's "
                "tokenizer has no chat template. Write them out as `prompt` and `completion`."
            )
        turns = self.prompt
        try:
            if "developer" not in tokenizer.get_chat_template(tools=self.tools):
                # OpenAI's newer name for the system role, as on nodes.
                turns = [
                    turn | {"role": turn["role"].replace("developer", "system")} for turn in turns
                ]
            text = tokenizer.apply_chat_template(
                turns,
                tools=self.tools,
                tokenize=False,
                add_generation_prompt=self.kind == "prompt",
            )
        except Exception as error:
            # A template is code of the fine-tune, run in transformers' sandbox.
            raise InvalidCalibration(
                f"The fine-tune's chat template refuses line {self.number} of the calibration "
                f"file: {error}"
            ) from error
        return _utf8(str(text), self.number)


def _are_objects(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(item, dict) for item in value)


def _is_turns(value: object) -> bool:
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(turn, dict) and isinstance(turn.get("role"), str) for turn in value)
    )


def _plain(turns: list[dict[str, Any]], number: int) -> list[dict[str, Any]]:
    """Messages as nodes give them to chat templates (`openai.chat.Message.plain`).

    Other roles and fields than a node's are left as they are: the template may know them.

    Raises:
        InvalidCalibration: a content is no text, or missing in a turn that is not the model's.
    """
    plain = []
    for turn in turns:
        fields = {name: value for name, value in turn.items() if value is not None}
        content = fields.get("content", "" if turn["role"] == "assistant" else None)
        if isinstance(content, list) and all(map(_is_text_part, content)):
            content = "\n".join(part["text"] for part in content)
        if not isinstance(content, str):
            raise InvalidCalibration(
                f"Line {number} of the calibration file has a message of the role {turn['role']!r} "
                "whose `content` is neither a string nor a list of parts of type text."
            )
        calls = fields.pop("tool_calls", [])
        if not _are_objects(calls):
            raise InvalidCalibration(
                f"Line {number} of the calibration file has `tool_calls` that are not a list of "
                "objects."
            )
        more = {"tool_calls": [_plain_call(call) for call in calls]} if calls else {}
        plain.append({**fields, "content": content, **more})
    return plain


def _is_text_part(part: object) -> bool:
    return (
        isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)
    )


def _plain_call(call: dict[str, Any]) -> dict[str, Any]:
    """A call with parsed arguments, which OpenAI writes as a string of JSON."""
    function = call.get("function")
    if not isinstance(function, dict) or not isinstance(function.get("arguments"), str):
        return call
    arguments: Any = function["arguments"]
    with suppress(ValueError):  # a template gets what the file has
        arguments = json.loads(arguments or "{}")
    return call | {"function": function | {"arguments": arguments}}


def _utf8(text: str, number: int) -> str:
    """Return `text` if it is valid UTF-8: JSON may contain half a surrogate pair."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InvalidCalibration(
            f"Line {number} of the calibration file holds half a surrogate pair, which is no text."
        ) from error
    return text
