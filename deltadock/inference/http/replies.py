"""Builds OpenAI's responses from a generation's events: whole and streamed."""

import secrets
import time
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Any, ClassVar, Generic, TypeVar

from fastapi.sse import format_sse_event
from pydantic import BaseModel

from deltadock.errors import DeltadockError
from deltadock.inference.engine.sampler import SampledToken
from deltadock.inference.engine.sequence import Event
from deltadock.inference.generation import Generation
from deltadock.inference.http.errors import error_body
from deltadock.inference.prompts.tokenizer import REPLACEMENT
from deltadock.openai.chat import (
    AssistantMessage,
    ChatChoice,
    ChatChunk,
    ChatChunkChoice,
    ChatCompletion,
    ChatLogprobs,
    ChatRequest,
    ContentLogprob,
    MessageDelta,
    TokenLogprob,
)
from deltadock.openai.completions import (
    Completion,
    CompletionChoice,
    CompletionLogprobs,
    CompletionRequest,
)
from deltadock.openai.fields import SamplingFields, Usage

RequestBody = TypeVar("RequestBody", bound=SamplingFields)


class Reply(ABC, Generic[RequestBody]):
    """The response to one request, in the format of its route."""

    id_prefix: ClassVar[str]

    def __init__(self, request: RequestBody, generation: Generation) -> None:
        self.request = request
        self.generation = generation
        self.head: dict[str, Any] = {
            "id": f"{self.id_prefix}-{secrets.token_hex(12)}",
            "created": int(time.time()),
            "model": request.model,
        }
        self._generated_tokens = 0

    @abstractmethod
    def _completion(self, answers: Sequence[Event], usage: Usage) -> BaseModel:
        """The complete response, from the answers in order."""

    @abstractmethod
    def _chunk(self, index: int, event: Event) -> BaseModel:
        """The next chunk of an answer."""

    @abstractmethod
    def _usage_chunk(self, usage: Usage) -> BaseModel:
        """The last chunk of a stream with `include_usage`."""

    async def complete(self) -> BaseModel:
        """Wait for the complete response; raises if an answer failed."""
        answers: dict[int, Event] = defaultdict(Event)
        async with aclosing(self.generation.events()) as events:
            async for index, event in events:
                answer = answers[index]
                answers[index] = Event(
                    answer.text + event.text, answer.tokens + event.tokens, event.finish
                )
                self._generated_tokens += len(event.tokens)
        return self._completion([answers[index] for index in sorted(answers)], self._usage())

    async def stream(self) -> AsyncGenerator[bytes]:
        """Server-sent events; an error is the last event."""
        try:
            async with aclosing(self.generation.events()) as events:
                async for index, event in events:
                    self._generated_tokens += len(event.tokens)
                    yield _sse(self._chunk(index, event))
        except DeltadockError as error:
            yield _sse(error_body(error))
            return
        options = self.request.stream_options
        if options is not None and options.include_usage:
            yield _sse(self._usage_chunk(self._usage()))
        yield format_sse_event(data_str="[DONE]")

    def _usage(self) -> Usage:
        prompt, generated = self.generation.prompt_tokens, self._generated_tokens
        return Usage(
            prompt_tokens=prompt, completion_tokens=generated, total_tokens=prompt + generated
        )


def _sse(data: BaseModel) -> bytes:
    return format_sse_event(data_str=data.model_dump_json())


class CompletionReply(Reply[CompletionRequest]):
    """The response of /v1/completions; its chunks have the format of the whole."""

    id_prefix = "cmpl"

    def __init__(self, request: CompletionRequest, generation: Generation) -> None:
        super().__init__(request, generation)
        self._offsets: dict[int, int] = defaultdict(int)

    def _completion(self, answers: Sequence[Event], usage: Usage) -> Completion:
        choices = [self._choice(index, answer) for index, answer in enumerate(answers)]
        return Completion(**self.head, choices=choices, usage=usage)

    def _chunk(self, index: int, event: Event) -> Completion:
        return Completion(**self.head, choices=[self._choice(index, event)])

    def _usage_chunk(self, usage: Usage) -> Completion:
        return Completion(**self.head, choices=[], usage=usage)

    def _choice(self, index: int, event: Event) -> CompletionChoice:
        return CompletionChoice(
            index=index,
            text=event.text,
            logprobs=self._logprobs(index, event.tokens),
            finish_reason=event.finish,
        )

    def _logprobs(self, index: int, tokens: Sequence[SampledToken]) -> CompletionLogprobs | None:
        if self.request.logprobs is None:
            return None
        logprobs = CompletionLogprobs()
        text_of = self.generation.tokenizer.token_text
        for token in tokens:
            text, logprob = text_of(token.id), token.logprob or 0.0
            logprobs.tokens.append(text)
            logprobs.token_logprobs.append(logprob)
            logprobs.top_logprobs.append(
                {text: logprob} | {text_of(top): value for top, value in token.top}
            )
            logprobs.text_offset.append(self._offsets[index])
            self._offsets[index] += len(text)
        return logprobs


class ChatReply(Reply[ChatRequest]):
    """The response of /v1/chat/completions."""

    id_prefix = "chatcmpl"

    def __init__(self, request: ChatRequest, generation: Generation) -> None:
        super().__init__(request, generation)
        self._started: set[int] = set()

    def _completion(self, answers: Sequence[Event], usage: Usage) -> ChatCompletion:
        choices = [
            ChatChoice(
                index=index,
                message=AssistantMessage(content=answer.text),
                logprobs=self._logprobs(answer.tokens),
                finish_reason=answer.finish,
            )
            for index, answer in enumerate(answers)
        ]
        return ChatCompletion(**self.head, choices=choices, usage=usage)

    def _chunk(self, index: int, event: Event) -> ChatChunk:
        choice = ChatChunkChoice(
            index=index,
            # The role is in an answer's first chunk only.
            delta=MessageDelta(
                role=None if index in self._started else "assistant", content=event.text
            ),
            logprobs=self._logprobs(event.tokens),
            finish_reason=event.finish,
        )
        self._started.add(index)
        return ChatChunk(**self.head, choices=[choice])

    def _usage_chunk(self, usage: Usage) -> ChatChunk:
        return ChatChunk(**self.head, choices=[], usage=usage)

    def _logprobs(self, tokens: Sequence[SampledToken]) -> ChatLogprobs | None:
        if not self.request.logprobs:
            return None
        return ChatLogprobs(
            content=[
                ContentLogprob(
                    **self._token(token.id, token.logprob or 0.0),
                    top_logprobs=[TokenLogprob(**self._token(*top)) for top in token.top],
                )
                for token in tokens
            ]
        )

    def _token(self, token: int, logprob: float) -> dict[str, Any]:
        text = self.generation.tokenizer.token_text(token)
        valid = REPLACEMENT not in text
        return {"token": text, "logprob": logprob, "bytes": list(text.encode()) if valid else None}
