"""From a generation's events to OpenAI's chat completions: whole and streamed."""

from collections.abc import Sequence
from typing import Any

from deltadock.inference.engine.sampler import SampledToken
from deltadock.inference.engine.sequence import Event
from deltadock.inference.generation import Generation
from deltadock.inference.http.chat_schemas import (
    AnswerMessage,
    AnswerPiece,
    ChatChoice,
    ChatChunk,
    ChatCompletion,
    ChatLogprobs,
    ChatRequest,
    ChunkChoice,
    ContentLogprob,
    TokenLogprob,
)
from deltadock.inference.http.replies import Reply
from deltadock.inference.http.schemas import Usage
from deltadock.inference.prompts.tokenizer import REPLACEMENT


class ChatReply(Reply[ChatRequest]):
    """The answer of /v1/chat/completions."""

    prefix = "chatcmpl"

    def __init__(self, request: ChatRequest, generation: Generation) -> None:
        super().__init__(request, generation)
        self._begun: set[int] = set()

    def _whole(self, answers: Sequence[Event], usage: Usage) -> ChatCompletion:
        choices = [
            ChatChoice(
                index=index,
                message=AnswerMessage(content=answer.text),
                logprobs=self._logprobs(answer.tokens),
                finish_reason=answer.finish,
            )
            for index, answer in enumerate(answers)
        ]
        return ChatCompletion(**self.head, choices=choices, usage=usage)

    def _chunk(self, index: int, event: Event) -> ChatChunk:
        choice = ChunkChoice(
            index=index,
            # An answer's first piece says whose it is.
            delta=AnswerPiece(
                role=None if index in self._begun else "assistant", content=event.text
            ),
            logprobs=self._logprobs(event.tokens),
            finish_reason=event.finish,
        )
        self._begun.add(index)
        return ChatChunk(**self.head, choices=[choice])

    def _usage_chunk(self, usage: Usage) -> ChatChunk:
        return ChatChunk(**self.head, choices=[], usage=usage)

    def _logprobs(self, tokens: Sequence[SampledToken]) -> ChatLogprobs | None:
        if not self.request.logprobs:
            return None
        return ChatLogprobs(
            content=[
                ContentLogprob(
                    **self._named(token.id, token.logprob or 0.0),
                    top_logprobs=[TokenLogprob(**self._named(*likely)) for likely in token.top],
                )
                for token in tokens
            ]
        )

    def _named(self, token: int, logprob: float) -> dict[str, Any]:
        text = self.generation.tokenizer.token_text(token)
        whole = REPLACEMENT not in text
        return {"token": text, "logprob": logprob, "bytes": list(text.encode()) if whole else None}
