"""From a generation's events to OpenAI's objects: whole completions and streams."""

import secrets
import time
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Any, ClassVar, Generic, TypeVar

from pydantic import BaseModel

from deltadock.errors import DeltadockError
from deltadock.inference.engine.sampler import SampledToken
from deltadock.inference.engine.sequence import Event
from deltadock.inference.generation import Generation
from deltadock.inference.http.problems import error_body
from deltadock.inference.http.schemas import (
    Choice,
    Completion,
    CompletionRequest,
    Logprobs,
    Usage,
)
from deltadock.openai.fields import SamplingFields

Request = TypeVar("Request", bound=SamplingFields)


class Reply(ABC, Generic[Request]):
    """The answer to one request, in the shape of its route."""

    prefix: ClassVar[str]
    """Of the answer's id."""

    def __init__(self, request: Request, generation: Generation) -> None:
        self.request = request
        self.generation = generation
        self.head: dict[str, Any] = {
            "id": f"{self.prefix}-{secrets.token_hex(12)}",
            "created": int(time.time()),
            "model": request.model,
        }
        self._generated = 0

    @abstractmethod
    def _whole(self, answers: Sequence[Event], usage: Usage) -> BaseModel:
        """The finished answers, by their numbers."""

    @abstractmethod
    def _chunk(self, index: int, event: Event) -> BaseModel:
        """The next piece of an answer."""

    @abstractmethod
    def _usage_chunk(self, usage: Usage) -> BaseModel:
        """The last chunk of a stream whose client counts tokens."""

    async def whole(self) -> BaseModel:
        """The finished answers; raises what any of them failed with."""
        answers: dict[int, Event] = defaultdict(Event)
        async with aclosing(self.generation.events()) as events:
            async for index, event in events:
                told = answers[index]
                answers[index] = Event(
                    told.text + event.text, told.tokens + event.tokens, event.finish
                )
                self._generated += len(event.tokens)
        return self._whole([answers[index] for index in sorted(answers)], self._usage())

    async def stream(self) -> AsyncGenerator[str]:
        """The lines of a server-sent event stream; a failure is its last event."""
        try:
            async with aclosing(self.generation.events()) as events:
                async for index, event in events:
                    self._generated += len(event.tokens)
                    yield _line(self._chunk(index, event).model_dump_json())
        except DeltadockError as error:
            yield _line(error_body(error).model_dump_json())
            return
        options = self.request.stream_options
        if options is not None and options.include_usage:
            yield _line(self._usage_chunk(self._usage()).model_dump_json())
        yield _line("[DONE]")

    def _usage(self) -> Usage:
        prompt, generated = self.generation.prompt_tokens, self._generated
        return Usage(
            prompt_tokens=prompt, completion_tokens=generated, total_tokens=prompt + generated
        )


class CompletionReply(Reply[CompletionRequest]):
    """The answer of /v1/completions; a chunk has the shape of the whole."""

    prefix = "cmpl"

    def __init__(self, request: CompletionRequest, generation: Generation) -> None:
        super().__init__(request, generation)
        self._offsets: dict[int, int] = defaultdict(int)

    def _whole(self, answers: Sequence[Event], usage: Usage) -> Completion:
        choices = [self._choice(index, answer) for index, answer in enumerate(answers)]
        return Completion(**self.head, choices=choices, usage=usage)

    def _chunk(self, index: int, event: Event) -> Completion:
        return Completion(**self.head, choices=[self._choice(index, event)])

    def _usage_chunk(self, usage: Usage) -> Completion:
        return Completion(**self.head, choices=[], usage=usage)

    def _choice(self, index: int, event: Event) -> Choice:
        return Choice(
            index=index,
            text=event.text,
            logprobs=self._logprobs(index, event.tokens),
            finish_reason=event.finish,
        )

    def _logprobs(self, index: int, tokens: Sequence[SampledToken]) -> Logprobs | None:
        if self.request.logprobs is None:
            return None
        told = Logprobs()
        name = self.generation.tokenizer.token_text
        for token in tokens:
            text, logprob = name(token.id), token.logprob or 0.0
            told.tokens.append(text)
            told.token_logprobs.append(logprob)
            told.top_logprobs.append({text: logprob} | {name(i): value for i, value in token.top})
            told.text_offset.append(self._offsets[index])
            self._offsets[index] += len(text)
        return told


def _line(data: str) -> str:
    return f"data: {data}\n\n"
