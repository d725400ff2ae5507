"""From a generation's events to OpenAI's objects: whole completions and streams."""

import secrets
import time
from collections import defaultdict
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing

from deltadock.errors import DeltadockError
from inference.generation import Generation
from inference.sampler import SampledToken
from inference.schemas import Choice, Completion, CompletionRequest, ErrorBody, Logprobs, Usage
from inference.sequence import Event


class Reply:
    """The answer to one request."""

    def __init__(self, request: CompletionRequest, generation: Generation) -> None:
        self._request = request
        self._generation = generation
        self._id = f"cmpl-{secrets.token_hex(12)}"
        self._created = int(time.time())
        self._generated = 0
        self._offsets: dict[int, int] = defaultdict(int)

    async def whole(self) -> Completion:
        """The finished completion; raises what any of its choices failed with."""
        choices: dict[int, Choice] = {}
        async with aclosing(self._generation.events()) as events:
            async for index, event in events:
                choice = self._choice(index, event)
                choices[index] = _join(choices[index], choice) if index in choices else choice
        return self._completion([choices[index] for index in sorted(choices)], self._usage())

    async def stream(self) -> AsyncGenerator[str]:
        """The lines of a server-sent event stream; a failure is its last event."""
        try:
            async with aclosing(self._generation.events()) as events:
                async for index, event in events:
                    yield _line(self._completion([self._choice(index, event)]).model_dump_json())
        except DeltadockError as error:
            yield _line(ErrorBody.of(error).model_dump_json())
            return
        options = self._request.stream_options
        if options is not None and options.include_usage:
            yield _line(self._completion([], self._usage()).model_dump_json())
        yield _line("[DONE]")

    def _completion(self, choices: list[Choice], usage: Usage | None = None) -> Completion:
        return Completion(
            id=self._id,
            created=self._created,
            model=self._request.model,
            choices=choices,
            usage=usage,
        )

    def _choice(self, index: int, event: Event) -> Choice:
        self._generated += len(event.tokens)
        return Choice(
            index=index,
            text=event.text,
            logprobs=self._logprobs(index, event.tokens),
            finish_reason=event.finish,
        )

    def _logprobs(self, index: int, tokens: Sequence[SampledToken]) -> Logprobs | None:
        if self._request.logprobs is None:
            return None
        told = Logprobs()
        name = self._generation.tokenizer.token_text
        for token in tokens:
            text, logprob = name(token.id), token.logprob or 0.0
            told.tokens.append(text)
            told.token_logprobs.append(logprob)
            told.top_logprobs.append({text: logprob} | {name(i): value for i, value in token.top})
            told.text_offset.append(self._offsets[index])
            self._offsets[index] += len(text)
        return told

    def _usage(self) -> Usage:
        prompt, generated = self._generation.prompt_tokens, self._generated
        return Usage(
            prompt_tokens=prompt, completion_tokens=generated, total_tokens=prompt + generated
        )


def _join(first: Choice, then: Choice) -> Choice:
    if first.logprobs is not None and then.logprobs is not None:
        for name in Logprobs.model_fields:
            getattr(first.logprobs, name).extend(getattr(then.logprobs, name))
    first.text += then.text
    first.finish_reason = then.finish_reason
    return first


def _line(data: str) -> str:
    return f"data: {data}\n\n"
