"""OpenAI's request for chat completions."""

from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationInfo,
    field_validator,
    model_validator,
)

from deltadock.openai.fields import Ignored, MaxTokens, SamplingFields, Unsupported, fault, told

Nothing = Annotated[list[Any], Field(max_length=0)]


class TextPart(BaseModel):
    """A part of a message; only text can be served."""

    type: Literal["text"]
    text: str


def _check_parts(content: Any) -> Any:
    if isinstance(content, list) and any(
        isinstance(part, dict) and part.get("type", "text") != "text" for part in content
    ):
        raise fault("holds a part that is not text, which is not supported yet; send text alone.")
    return content


Content = Annotated[
    str | list[TextPart],
    told("must be a text, or a list of parts of the type text."),
    BeforeValidator(_check_parts),
]


class Message(BaseModel):
    """One turn of a conversation. Parts of text are joined by line breaks."""

    model_config = ConfigDict(extra="allow")

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Content
    name: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _knows_all_fields(cls, message: Any) -> Any:
        """Refuse what a template would need and no node passes on; clients send much as null."""
        for name, value in message.items() if isinstance(message, dict) else ():
            if value and name not in cls.model_fields:
                raise fault("is not supported yet; send `role` and `content` alone.", field=name)
        return message

    def plain(self) -> dict[str, str]:
        """What a chat template reads."""
        content = self.content
        if not isinstance(content, str):
            content = "\n".join(part.text for part in content)
        named = {} if self.name is None else {"name": self.name}
        return {"role": self.role, "content": content, **named}


class TextFormat(BaseModel):
    """The form of an answer: text."""

    model_config = ConfigDict(extra="forbid")

    type: Literal["text"]


class ChatRequest(SamplingFields):
    """A request for /v1/chat/completions; without a limit an answer may fill the context."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=4096)]
    max_tokens: MaxTokens | None = None
    max_completion_tokens: MaxTokens | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    response_format: Unsupported[TextFormat] = None
    modalities: Unsupported[Annotated[list[Literal["text"]], Field(min_length=1, max_length=1)]] = (
        None
    )
    tools: Unsupported[Nothing] = None
    tool_choice: Unsupported[Literal["none", "auto"]] = None
    functions: Unsupported[Nothing] = None
    function_call: Unsupported[Literal["none", "auto"]] = None
    verbosity: Unsupported[Literal["medium"]] = None
    reasoning_effort: Unsupported[None] = None
    audio: Unsupported[None] = None
    moderation: Unsupported[None] = None
    web_search_options: Unsupported[None] = None
    parallel_tool_calls: Ignored = None
    prediction: Ignored = None

    @field_validator("top_logprobs")
    @classmethod
    def _only_with_logprobs(cls, value: int | None, info: ValidationInfo) -> int | None:
        if value and not info.data.get("logprobs"):
            raise fault("needs `logprobs`: true; send both or neither.")
        return value
