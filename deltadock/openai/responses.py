"""OpenAI's responses, without state: a request, as one to chat completions, and its answer."""

import json
from collections.abc import Sequence
from typing import Annotated, Any, Final, Literal, Self, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from deltadock.openai.chat import ChatRequest, EmptyList, ReasoningEffort
from deltadock.openai.errors import validation_message
from deltadock.openai.fields import (
    AnswerFields,
    Ignored,
    JsonObject,
    JsonSchema,
    MaxTokens,
    ModelName,
    RequestPart,
    Schema,
    Unsupported,
    Usage,
    field_error,
    reported_as,
)
from deltadock.openai.tools import MAX_TOOLS, FunctionName

STATELESS: Final = (
    "is not supported: responses are not stored. Send the whole conversation in `input`."
)
Value = TypeVar("Value")
Stored = Annotated[Value | None, reported_as(STATELESS)]
"""A field of OpenAI's stored responses that is accepted only if it asks for none."""


class InputText(RequestPart):
    """A part of a message: of the user's or, sent back, of the assistant's."""

    type: Literal["input_text", "output_text", "text"]
    text: str
    annotations: Ignored = None
    logprobs: Ignored = None


Content = Annotated[
    str | list[InputText],
    reported_as("must be a string, or a list of parts of type input_text; others are unsupported."),
]
ItemType = Literal["message", "function_call", "function_call_output"]
NEEDED: Final[dict[ItemType, tuple[str, ...]]] = {
    "message": ("role", "content"),
    "function_call": ("call_id", "name", "arguments"),
    "function_call_output": ("call_id", "output"),
}
"""Fields of an item, by its type."""


class InputItem(RequestPart):
    """A turn of a conversation, a call of a function, or what a called function returned."""

    model_config = ConfigDict(extra="forbid")

    type: ItemType = "message"
    role: Literal["system", "developer", "user", "assistant"] | None = None
    content: Content | None = None
    call_id: str | None = None
    name: str | None = None
    arguments: str | None = None
    output: Content | None = None
    id: Ignored = None
    status: Ignored = None
    phase: Ignored = None
    namespace: Ignored = None

    @model_validator(mode="before")
    @classmethod
    def _is_of_a_known_type(cls, item: Any) -> Any:
        kind = item.get("type", "message") if isinstance(item, dict) else "message"
        if kind == "item_reference":
            raise field_error(STATELESS)
        if kind not in [*NEEDED]:  # it may be a list, which has no hash
            raise field_error(f"is of the type {kind!r:.40}, which is not supported; leave it out.")
        return item

    @model_validator(mode="after")
    def _is_complete(self) -> Self:
        for name in NEEDED[self.type]:
            if getattr(self, name) is None:
                raise field_error("is missing; send it.", field=name)
        return self


def _items(value: Any) -> Any:
    """A text as the user's turn."""
    if isinstance(value, str):
        return [{"role": "user", "content": value}]
    if not isinstance(value, list):
        raise field_error("must be a string, or a list of messages, calls and their results.")
    return value


class ResponseTool(RequestPart):
    """A function that may be called."""

    model_config = ConfigDict(extra="forbid")

    type: Literal["function"]
    name: FunctionName
    description: str | None = None
    parameters: Schema | None = None
    strict: bool | None = None


class NamedResponseTool(RequestPart):
    """The function that must be called."""

    model_config = ConfigDict(extra="forbid")

    type: Literal["function"]
    name: FunctionName


class TextOrObject(RequestPart):
    """Text, or any JSON object."""

    model_config = ConfigDict(extra="forbid")

    type: Literal["text", "json_object"]


class SchemaFormat(JsonSchema):
    """JSON that follows a schema; `strict` is always true."""

    model_config = ConfigDict(extra="forbid")

    type: Literal["json_schema"]


class TextSettings(RequestPart):
    """The form of the answer's text."""

    model_config = ConfigDict(extra="forbid")

    format: (
        Annotated[
            Annotated[TextOrObject | SchemaFormat, Field(discriminator="type")],
            reported_as(
                'must have a `format` {"type": "text"}, {"type": "json_object"}, or '
                '{"type": "json_schema", "name": ..., "schema": {...}}.'
            ),
        ]
        | None
    ) = None
    verbosity: Unsupported[Literal["medium"]] = None


class ReasoningSettings(RequestPart):
    """How much the model thinks; answers have no summaries of it."""

    model_config = ConfigDict(extra="forbid")

    effort: ReasoningEffort | None = None
    summary: Ignored = None
    generate_summary: Ignored = None


class ResponseStreamOptions(RequestPart):
    """OpenAI's; none changes the stream."""

    include_obfuscation: bool | None = None


class ResponseRequest(AnswerFields):
    """A request to /v1/responses, as far as it needs no state: the same answer as of a chat."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "model": "dlt_k7wq2mzv5c3xj6nhy4tbr2dfsa",
                    "input": "What is 17 + 25?",
                    "max_output_tokens": 8,
                }
            ]
        }
    )

    model: ModelName
    input: Annotated[
        list[InputItem],
        Field(min_length=1, max_length=4096),
        BeforeValidator(_items, json_schema_input_type=str | list[InputItem]),
    ]
    instructions: str | None = None
    max_output_tokens: MaxTokens | None = None
    tools: Annotated[
        Annotated[list[ResponseTool], Field(max_length=MAX_TOOLS)] | None,
        reported_as(
            f"must be a list of at most {MAX_TOOLS} tools such as "
            '{"type": "function", "name": ..., "parameters": {...}}.'
        ),
    ] = None
    tool_choice: Annotated[
        Literal["none", "auto", "required"] | NamedResponseTool | None,
        reported_as('must be "none", "auto", "required", or {"type": "function", "name": ...}.'),
    ] = None
    parallel_tool_calls: bool | None = None
    text: TextSettings | None = None
    reasoning: ReasoningSettings | None = None
    chat_template_kwargs: Annotated[JsonObject, Field(max_length=64)] | None = None
    stream: bool | None = None
    stream_options: ResponseStreamOptions | None = None
    metadata: dict[str, str] | None = None
    include: Annotated[
        list[Literal["reasoning.encrypted_content"]] | None,
        reported_as("must be empty: answers have nothing that can be included."),
    ] = None
    store: Stored[Literal[False]] = None
    previous_response_id: Stored[None] = None
    conversation: Stored[None] = None
    prompt: Stored[None] = None
    background: Unsupported[Literal[False]] = None
    background_options: Unsupported[None] = None
    truncation: Unsupported[Literal["disabled"]] = None
    top_logprobs: Unsupported[Literal[0]] = None
    max_tool_calls: Unsupported[None] = None
    context_management: Unsupported[EmptyList] = None
    response_format: Unsupported[None] = None
    moderation: Unsupported[None] = None
    access_programs: Unsupported[None] = None
    image: Unsupported[None] = None
    user: Ignored = None
    service_tier: Ignored = None
    safety_identifier: Ignored = None
    prompt_cache_key: Ignored = None
    prompt_cache_options: Ignored = None
    prompt_cache_retention: Ignored = None

    @model_validator(mode="after")
    def _is_a_chat(self) -> Self:
        """Refuse what a chat would refuse: of the fields themselves, few have other names."""
        try:
            self.chat()
        except ValidationError as error:
            located = [{**one, "loc": ("body", *one["loc"])} for one in error.errors()]
            message, param = validation_message(located)
            raise field_error(
                message.removeprefix(f"`{param}` "), field=param or "input"
            ) from error
        return self

    def chat(self) -> ChatRequest:
        """The same request to chat completions."""
        body = self.model_dump(
            include={*AnswerFields.model_fields, "model", "stream", "parallel_tool_calls"}
            | {"chat_template_kwargs"},
            exclude_none=True,
        )
        body["messages"] = self._messages()
        if self.max_output_tokens is not None:
            body["max_completion_tokens"] = self.max_output_tokens
        if self.tools:
            body["tools"] = [
                {"type": "function", "function": tool.model_dump(exclude={"type"})}
                for tool in self.tools
            ]
        if isinstance(self.tool_choice, NamedResponseTool):
            named = {"name": self.tool_choice.name}
            body["tool_choice"] = {"type": "function", "function": named}
        elif self.tool_choice is not None:
            body["tool_choice"] = self.tool_choice
        if self.reasoning is not None:
            body["reasoning_effort"] = self.reasoning.effort
        form = None if self.text is None else self.text.format
        if isinstance(form, SchemaFormat):
            schema = form.model_dump(exclude={"type"})
            body["response_format"] = {"type": "json_schema", "json_schema": schema}
        elif form is not None:
            body["response_format"] = {"type": form.type}
        return ChatRequest.model_validate(body)

    def _messages(self) -> list[dict[str, Any]]:
        messages: list[dict[str, Any]] = []
        if self.instructions is not None:
            messages.append({"role": "system", "content": self.instructions})
        for item in self.input:
            if item.type == "message":
                messages.append({"role": item.role, "content": _text(item.content)})
            elif item.type == "function_call_output":
                result = {"role": "tool", "tool_call_id": item.call_id}
                messages.append({**result, "content": _text(item.output)})
            else:  # a call belongs to the assistant's turn that has begun
                if not messages or messages[-1]["role"] != "assistant":
                    messages.append({"role": "assistant", "content": None})
                function = {"name": item.name, "arguments": item.arguments}
                call = {"id": item.call_id, "type": "function", "function": function}
                messages[-1].setdefault("tool_calls", []).append(call)
        return messages


def _text(content: str | Sequence[InputText] | None) -> str:
    parts = content or ""
    return parts if isinstance(parts, str) else "\n".join(part.text for part in parts)


class OutputText(BaseModel):
    """The text of a message."""

    type: Literal["output_text"] = "output_text"
    text: str = ""
    annotations: list[Any] = []
    logprobs: list[Any] = []


Status = Literal["in_progress", "completed", "incomplete"]


class OutputMessage(BaseModel):
    """Text of the model's."""

    id: str
    type: Literal["message"] = "message"
    role: Literal["assistant"] = "assistant"
    status: Status = "in_progress"
    content: list[OutputText] = []


class OutputCall(BaseModel):
    """A call of a function; `arguments` is JSON, or the beginning of it if cut off."""

    id: str
    type: Literal["function_call"] = "function_call"
    status: Status = "in_progress"
    call_id: str
    name: str
    arguments: str = ""


class IncompleteDetails(BaseModel):
    """Why an answer is incomplete."""

    reason: Literal["max_output_tokens"] = "max_output_tokens"


class InputTokensDetails(BaseModel):
    """Of the prompt's tokens."""

    cached_tokens: int = 0
    cache_write_tokens: int = 0


class OutputTokensDetails(BaseModel):
    """Of the answer's tokens."""

    reasoning_tokens: int = 0


class ResponseUsage(BaseModel):
    """Prompt and generated tokens; the details are always 0."""

    input_tokens: int
    input_tokens_details: InputTokensDetails = InputTokensDetails()
    output_tokens: int
    output_tokens_details: OutputTokensDetails = OutputTokensDetails()
    total_tokens: int

    @classmethod
    def of(cls, usage: Usage) -> Self:
        """The same counts under this route's names."""
        return cls(
            input_tokens=usage.prompt_tokens,
            output_tokens=usage.completion_tokens,
            total_tokens=usage.total_tokens,
        )


class ResponseError(BaseModel):
    """What broke a stream off."""

    code: str
    message: str


class ResponseObject(BaseModel):
    """An answer, and the settings of its request."""

    id: str
    object: Literal["response"] = "response"
    created_at: int
    status: Status | Literal["failed"] = "in_progress"
    error: ResponseError | None = None
    incomplete_details: IncompleteDetails | None = None
    instructions: str | None
    max_output_tokens: int | None
    metadata: dict[str, str]
    model: str
    output: list[OutputMessage | OutputCall] = []
    parallel_tool_calls: bool
    previous_response_id: None = None
    reasoning: ReasoningSettings
    store: Literal[False] = False
    temperature: float | None
    text: TextSettings
    tool_choice: str | NamedResponseTool
    tools: list[ResponseTool]
    top_p: float | None
    truncation: Literal["disabled"] = "disabled"
    usage: ResponseUsage | None = None

    @classmethod
    def begun(cls, request: ResponseRequest, **head: Any) -> Self:
        """The response of a request before its answer."""
        return cls(
            **head,
            instructions=request.instructions,
            max_output_tokens=request.max_output_tokens,
            metadata=request.metadata or {},
            parallel_tool_calls=request.parallel_tool_calls is not False,
            reasoning=request.reasoning or ReasoningSettings(),
            temperature=request.temperature,
            text=request.text or TextSettings(format=TextOrObject(type="text")),
            tool_choice=request.tool_choice or "auto",
            tools=request.tools or [],
            top_p=request.top_p,
        )


def event_of(kind: str, number: int, fields: dict[str, Any]) -> str:
    """One event's JSON; its fields may be models."""
    plain = {
        name: value.model_dump() if isinstance(value, BaseModel) else value
        for name, value in fields.items()
    }
    return json.dumps({"type": kind, "sequence_number": number, **plain}, ensure_ascii=False)
