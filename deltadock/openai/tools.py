"""OpenAI's tools: functions that a chat model may call, and its calls."""

import json
import secrets
import string
from contextlib import suppress
from typing import Annotated, Any, Final, Literal

from pydantic import BaseModel, ConfigDict, Field

from deltadock.openai.fields import RequestPart, Schema, is_none, reported_as

MAX_TOOLS: Final = 128
ID_CHARACTERS: Final = string.ascii_letters + string.digits
FunctionName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]{1,64}$")]


class FunctionDefinition(RequestPart):
    """A function: its name, and a JSON schema of its arguments."""

    model_config = ConfigDict(extra="forbid")

    name: FunctionName
    description: str | None = None
    parameters: Schema | None = None
    strict: bool | None = None


class Tool(RequestPart):
    """A tool; only functions are supported."""

    model_config = ConfigDict(extra="forbid")

    type: Literal["function"]
    function: FunctionDefinition


class NamedFunction(RequestPart):
    """The name of a function."""

    model_config = ConfigDict(extra="forbid")

    name: FunctionName


class NamedTool(RequestPart):
    """The function that must be called."""

    model_config = ConfigDict(extra="forbid")

    type: Literal["function"]
    function: NamedFunction


Tools = Annotated[
    Annotated[list[Tool], Field(max_length=MAX_TOOLS)],
    reported_as(
        f"must be a list of at most {MAX_TOOLS} tools such as "
        '{"type": "function", "function": {"name": ..., "parameters": {...}}}.'
    ),
]
ToolChoice = Annotated[
    Literal["none", "auto", "required"] | NamedTool,
    reported_as(
        'must be "none", "auto", "required", or {"type": "function", "function": {"name": ...}}.'
    ),
]


class FunctionCall(RequestPart):
    """A call of a function; `arguments` is JSON."""

    name: str
    arguments: str


class ToolCall(RequestPart):
    """A call in the assistant's turn."""

    id: str
    type: Literal["function"] = "function"
    function: FunctionCall

    def plain(self) -> dict[str, Any]:
        """The call as chat templates read it, with parsed arguments."""
        arguments: Any = self.function.arguments
        with suppress(ValueError):  # a template gets what the client sent
            arguments = json.loads(arguments or "{}")
        function = {"name": self.function.name, "arguments": arguments}
        return {"id": self.id, "type": self.type, "function": function}


def new_call_id() -> str:
    """An id for a call: nine letters and digits, since Mistral's templates take no others."""
    return "".join(secrets.choice(ID_CHARACTERS) for _ in range(9))


class FunctionCallDelta(BaseModel):
    """What a chunk adds to a call: its function's name in the first one only."""

    name: str | None = Field(default=None, exclude_if=is_none)
    arguments: str


class ToolCallDelta(BaseModel):
    """A part of a call in one chunk of a stream."""

    index: int
    id: str | None = Field(default=None, exclude_if=is_none)
    type: Literal["function"] | None = Field(default=None, exclude_if=is_none)
    function: FunctionCallDelta
