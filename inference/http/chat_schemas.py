"""OpenAI's shapes of chat completions."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from inference.engine.sampler import SamplingParams
from inference.http.schemas import SamplingFields, Usage
from inference.prompts.chat import Conversation
from inference.prompts.generation_config import SamplingDefaults


class TextPart(BaseModel):
    """A part of a message; only text can be served."""

    type: Literal["text"]
    text: str


class Message(BaseModel):
    """One turn of a conversation. Parts of text are joined by line breaks."""

    model_config = ConfigDict(extra="allow")

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart]
    name: str | None = None

    @model_validator(mode="after")
    def _knows_all_fields(self) -> "Message":
        """Refuse what a template would need and this node does not pass on."""
        asked = [name for name, value in (self.model_extra or {}).items() if value]
        if asked:
            raise ValueError(f"{asked[0]} is not supported in a message; send role and content.")
        return self

    def plain(self) -> dict[str, str]:
        """What a chat template reads."""
        content = self.content
        if not isinstance(content, str):
            content = "\n".join(part.text for part in content)
        named = {} if self.name is None else {"name": self.name}
        return {"role": self.role, "content": content, **named}


class TextFormat(BaseModel):
    """The form of an answer: text."""

    type: Literal["text"] = "text"


class ChatRequest(SamplingFields):
    """A request for /v1/chat/completions; without a limit an answer may fill the context."""

    model_config = ConfigDict(
        json_schema_extra={
            "example": {
                "model": "dlt_4u2ohyvyq6dmrmtscfsdk7jobe",
                "messages": [{"role": "user", "content": "What is 12+30?"}],
                "max_completion_tokens": 8,
                "temperature": 0,
            }
        }
    )

    messages: Annotated[list[Message], Field(min_length=1, max_length=4096)]
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    response_format: TextFormat | None = None
    tools: Annotated[list[Any], Field(max_length=0)] | None = None
    tool_choice: Literal["none", "auto"] | None = None
    functions: Annotated[list[Any], Field(max_length=0)] | None = None
    modalities: Annotated[list[Literal["text"]], Field(min_length=1, max_length=1)] | None = None

    @field_validator("top_logprobs")
    @classmethod
    def _only_with_logprobs(cls, value: int | None, info: Any) -> int | None:
        if value is not None and not info.data.get("logprobs"):
            raise ValueError("top_logprobs needs logprobs: true.")
        return value

    def prompts(self) -> list[Conversation]:
        """The conversation."""
        return [Conversation(tuple(message.plain() for message in self.messages))]

    def sampling(self, defaults: SamplingDefaults, room: int) -> SamplingParams:
        """The engine's form of the settings, for a prompt that leaves `room` tokens."""
        asked = self.max_completion_tokens or self.max_tokens or max(room, 1)
        return self._params(defaults, asked, (self.top_logprobs or 0) if self.logprobs else None)


class TokenLogprob(BaseModel):
    """A token and its log-probability (nats); `bytes` is null where it is no whole text."""

    token: str
    logprob: float
    bytes: list[int] | None


class ContentLogprob(TokenLogprob):
    """A generated token with its likeliest alternatives."""

    top_logprobs: list[TokenLogprob]


class ChatLogprobs(BaseModel):
    """Log-probabilities of the tokens of one choice."""

    content: list[ContentLogprob]


class AnswerMessage(BaseModel):
    """The model's turn."""

    role: Literal["assistant"] = "assistant"
    content: str


class ChatChoice(BaseModel):
    """One answer."""

    index: int
    message: AnswerMessage
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


class AnswerPiece(BaseModel):
    """What a chunk adds to the model's turn."""

    role: Literal["assistant"] | None = None
    content: str = ""


class ChunkChoice(BaseModel):
    """A piece of one answer."""

    index: int
    delta: AnswerPiece
    logprobs: ChatLogprobs | None = None
    finish_reason: str | None = None


class ChatChunk(BaseModel):
    """One chunk of a stream."""

    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    model: str
    choices: list[ChunkChoice]
    usage: Usage | None = None
