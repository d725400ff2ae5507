"""OpenAI's chat completions: request, response and stream."""

from typing import Annotated, Any, Final, Literal, Self

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic.config import JsonDict

from deltadock.openai.fields import (
    OFF,
    ONE_GRAMMAR,
    Ignored,
    JsonObject,
    MaxTokens,
    RequestPart,
    SamplingFields,
    Unsupported,
    Usage,
    excluding,
    field_error,
    is_none,
    reported_as,
)
from deltadock.openai.tools import (
    MAX_TOOLS,
    NamedTool,
    Tool,
    ToolCall,
    ToolCallDelta,
    ToolChoice,
    Tools,
)

EmptyList = Annotated[list[Any], Field(max_length=0)]


class TextPart(RequestPart):
    """A part of a message; only text is supported."""

    type: Literal["text"]
    text: str


def _check_parts(content: Any) -> Any:
    if isinstance(content, list) and any(
        isinstance(part, dict) and part.get("type", "text") != "text" for part in content
    ):
        raise field_error(
            "contains a part that is not text, which is not supported yet; send text only."
        )
    return content


Content = Annotated[
    str | list[TextPart],
    reported_as("must be a string, or a list of parts of type text."),
    BeforeValidator(_check_parts),
]


_EMPTY: Final[JsonDict] = {
    "anyOf": [
        {"enum": [None, False, 0, ""]},
        {"type": "array", "maxItems": 0},
        {"type": "object", "maxProperties": 0},
    ]
}


class Message(RequestPart):
    """One turn of a conversation. Text parts are joined by line breaks."""

    model_config = ConfigDict(
        extra="allow",
        json_schema_extra={
            "anyOf": [
                {"properties": {"role": {"const": "assistant"}}},
                {"properties": {"content": {"type": ["string", "array"]}}, "required": ["content"]},
            ],
            "additionalProperties": _EMPTY,
        },
    )

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Content | None = Field(
        default=None, description="Missing or null only in the assistant's turns."
    )
    name: str | None = None
    tool_calls: Annotated[list[ToolCall], Field(max_length=MAX_TOOLS)] | None = None
    tool_call_id: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _forbid_unknown_fields(cls, message: Any) -> Any:
        """Reject fields that no template would receive, unless empty: clients send many as null."""
        for name, value in message.items() if isinstance(message, dict) else ():
            if value and name not in cls.model_fields:
                raise field_error("is not supported yet; leave it out.", field=name)
        return message

    @model_validator(mode="after")
    def _require_content(self) -> Self:
        if self.content is None and self.role != "assistant":
            raise field_error("must be a string, or a list of parts of type text.", field="content")
        return self

    def plain(self) -> dict[str, Any]:
        """The message as chat templates read it."""
        content = self.content or ""
        if not isinstance(content, str):
            content = "\n".join(part.text for part in content)
        fields = {"name": self.name, "tool_call_id": self.tool_call_id}
        calls = [call.plain() for call in self.tool_calls or ()]
        return {
            "role": self.role,
            "content": content,
            **{name: value for name, value in fields.items() if value is not None},
            **({"tool_calls": calls} if calls else {}),
        }


ReasoningEffort = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]


class ChatRequest(SamplingFields):
    """A request to /v1/chat/completions; without a limit an answer may fill the context.

    `add_generation_prompt` (true unless `continue_final_message` is), `continue_final_message` and
    `chat_template_kwargs` go to the chat template, with vLLM's meaning, and `reasoning_effort`
    does: as itself and, by `none` or another, as the switches `enable_thinking` and `thinking`.
    """

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "model": "dlt_k7wq2mzv5c3xj6nhy4tbr2dfsa",
                    "messages": [{"role": "user", "content": "What is 17 + 25?"}],
                    "max_completion_tokens": 8,
                }
            ],
            "allOf": [
                ONE_GRAMMAR,
                excluding({"add_generation_prompt": OFF}, {"continue_final_message": OFF}),
                {
                    "anyOf": [
                        {"properties": {"top_logprobs": {"enum": [None, 0]}}},
                        {"properties": {"logprobs": {"const": True}}, "required": ["logprobs"]},
                    ]
                },
            ],
        }
    )

    messages: Annotated[list[Message], Field(min_length=1, max_length=4096)]
    max_tokens: MaxTokens | None = None
    max_completion_tokens: MaxTokens | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: Annotated[JsonObject, Field(max_length=64)] | None = None
    modalities: Unsupported[Annotated[list[Literal["text"]], Field(min_length=1, max_length=1)]] = (
        None
    )
    tools: Tools | None = None
    tool_choice: ToolChoice | None = None
    functions: Unsupported[EmptyList] = None
    function_call: Unsupported[Literal["none", "auto"]] = None
    verbosity: Unsupported[Literal["medium"]] = None
    reasoning_effort: ReasoningEffort | None = None
    audio: Unsupported[None] = None
    moderation: Unsupported[None] = None
    web_search_options: Unsupported[None] = None
    parallel_tool_calls: bool | None = None
    prediction: Ignored = None

    @field_validator("top_logprobs")
    @classmethod
    def _only_with_logprobs(cls, value: int | None, info: ValidationInfo) -> int | None:
        if value and not info.data.get("logprobs"):
            raise field_error("needs `logprobs`: true; send both or neither.")
        return value

    @field_validator("tool_choice")
    @classmethod
    def _only_known_tools(cls, value: ToolChoice | None, info: ValidationInfo) -> ToolChoice | None:
        names = {tool.function.name for tool in info.data.get("tools") or ()}
        if value == "required" and not names:
            raise field_error("needs `tools`; send at least one.")
        if isinstance(value, NamedTool) and value.function.name not in names:
            raise field_error(f"names {value.function.name!r}, which is not in `tools`.")
        return value

    @property
    def template_variables(self) -> dict[str, Any]:
        """What the request sets of the chat template's variables."""
        effort = self.reasoning_effort
        thinks = effort != "none"
        reasoning: dict[str, Any] = {
            "reasoning_effort": effort, "enable_thinking": thinks, "thinking": thinks,
        }  # fmt: skip
        return (reasoning if effort is not None else {}) | (self.chat_template_kwargs or {})

    @property
    def offered_tools(self) -> list[Tool]:
        """The tools that may be called."""
        return [] if self.tool_choice == "none" else self.tools or []

    @property
    def forced_tools(self) -> list[Tool]:
        """The tools of which one must be called, if one must."""
        if isinstance(self.tool_choice, NamedTool):
            name = self.tool_choice.function.name
            return [tool for tool in self.offered_tools if tool.function.name == name]
        return self.offered_tools if self.tool_choice == "required" else []

    @property
    def at_most_one_call(self) -> bool:
        """Whether an answer may call one tool only."""
        return self.parallel_tool_calls is False or isinstance(self.tool_choice, NamedTool)

    @field_validator("continue_final_message")
    @classmethod
    def _not_with_generation_prompt(cls, value: bool | None, info: ValidationInfo) -> bool | None:
        if value and info.data.get("add_generation_prompt"):
            raise field_error("excludes `add_generation_prompt`; send one of them.")
        return value


class TokenLogprob(BaseModel):
    """A token and its log-probability (nats); the `bytes` of consecutive tokens add up to UTF-8."""

    token: str
    logprob: float
    bytes: list[int]


class ContentLogprob(TokenLogprob):
    """A generated token with its most likely alternatives."""

    top_logprobs: list[TokenLogprob]


class ChatLogprobs(BaseModel):
    """Log-probabilities of the tokens of one choice."""

    content: list[ContentLogprob]


class AssistantMessage(BaseModel):
    """The model's turn: text, calls of tools, or both."""

    role: Literal["assistant"] = "assistant"
    content: str | None
    tool_calls: list[ToolCall] | None = Field(default=None, exclude_if=is_none)


class ChatChoice(BaseModel):
    """One answer."""

    index: int
    message: AssistantMessage
    logprobs: ChatLogprobs | None = None
    finish_reason: str | None


class ChatCompletion(BaseModel):
    """A chat completion."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage


class MessageDelta(BaseModel):
    """What a chunk adds to the model's turn; the role is in the first one only."""

    role: Literal["assistant"] | None = Field(default=None, exclude_if=is_none)
    content: str | None = Field(default=None, exclude_if=is_none)
    tool_calls: list[ToolCallDelta] | None = Field(default=None, exclude_if=is_none)


class ChatChunkChoice(BaseModel):
    """A part of one answer."""

    index: int
    delta: MessageDelta
    logprobs: ChatLogprobs | None = None
    finish_reason: str | None = None


class ChatChunk(BaseModel):
    """One chunk of a stream."""

    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    model: str
    choices: list[ChatChunkChoice]
    usage: Usage | None = None
