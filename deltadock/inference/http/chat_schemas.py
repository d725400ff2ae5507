"""Chat completions as the node reads and answers them."""

from typing import Literal

from pydantic import BaseModel, ConfigDict

from deltadock.inference.engine.sampler import SamplingParams
from deltadock.inference.http.schemas import Usage, sampling_params
from deltadock.inference.prompts.chat import Conversation
from deltadock.inference.prompts.generation_config import SamplingDefaults
from deltadock.openai import chat


class ChatRequest(chat.ChatRequest):
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

    def prompts(self) -> list[Conversation]:
        """The conversation."""
        return [Conversation(tuple(message.plain() for message in self.messages))]

    def sampling(self, defaults: SamplingDefaults, room: int) -> SamplingParams:
        """The engine's form of the settings, for a prompt that leaves `room` tokens."""
        asked = self.max_completion_tokens or self.max_tokens or room
        logprobs = (self.top_logprobs or 0) if self.logprobs else None
        return sampling_params(self, defaults, asked, logprobs)


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
