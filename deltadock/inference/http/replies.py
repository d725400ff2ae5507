"""Builds OpenAI's responses from a generation's events: whole and streamed."""

import codecs
import secrets
import time
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import aclosing
from functools import partial
from typing import Any, ClassVar, Generic, TypeVar, cast

from fastapi.sse import EventSourceResponse, format_sse_event
from pydantic import BaseModel
from starlette.types import Receive, Scope, Send

from deltadock.errors import DeltadockError
from deltadock.inference.engine.sampling import SampledToken
from deltadock.inference.engine.sequence import Event
from deltadock.inference.generation import Generation
from deltadock.inference.prompts.tokenizer import Tokenizer
from deltadock.inference.prompts.tool_calls import (
    FORMS,
    CallPart,
    ToolCallParser,
    ToolForm,
    tool_form,
)
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
from deltadock.openai.errors import ErrorBody
from deltadock.openai.fields import PROMPT_TOKENS_HEADER, SamplingFields, Usage
from deltadock.openai.tools import (
    FunctionCall,
    FunctionCallDelta,
    ToolCall,
    ToolCallDelta,
    new_call_id,
)

RequestBody = TypeVar("RequestBody", bound=SamplingFields)


class Reply(ABC, Generic[RequestBody]):
    """The response to one request, in the format of its route."""

    id_prefix: ClassVar[str]

    def __init__(self, request: RequestBody, generation: Generation) -> None:
        self.request = request
        self.generation = generation
        self.head: dict[str, Any] = {
            "id": f"{self.id_prefix}{secrets.token_hex(12)}",
            "created": int(time.time()),
            "model": request.model,
        }

    @property
    @abstractmethod
    def takes_long(self) -> bool:
        """Whether the complete response of a long answer takes long to build."""

    @abstractmethod
    def _completion(self, answers: Sequence[Event], usage: Usage) -> BaseModel:
        """The complete response, from the answers in order."""

    def _begin(self) -> Iterator[bytes]:
        """Server-sent events before the answer."""
        yield from ()

    @abstractmethod
    def _go_on(self, index: int, event: Event) -> Iterator[bytes]:
        """Server-sent events of an answer's next event."""

    @abstractmethod
    def _end(self, usage: Usage) -> Iterator[bytes]:
        """Server-sent events after all answers."""

    @abstractmethod
    def _break_off(self, error: DeltadockError) -> bytes:
        """The last server-sent event if an answer failed."""

    async def complete(self) -> bytes:
        """Wait for the complete response, as JSON; raises if an answer failed."""
        answers: dict[int, list[Event]] = defaultdict(list)
        async with aclosing(self.generation.events()) as events:
            async for index, event in events:
                answers[index].append(event)

        def build() -> bytes:
            ordered = [_joined(answers[index]) for index in sorted(answers)]
            return self._completion(ordered, self.generation.usage).model_dump_json().encode()

        return await self.generation.in_thread(build) if self.takes_long else build()

    async def stream(self) -> AsyncGenerator[bytes]:
        """Server-sent events; an error is the last event."""
        for data in self._begin():
            yield data
        try:
            async with aclosing(self.generation.events()) as events:
                async for index, event in events:
                    build = partial(self._event, index, event)
                    yield await self.generation.in_thread(build) if event.prompt else build()
        except DeltadockError as error:
            yield self._break_off(error)
            return
        for data in self._end(self.generation.usage):
            yield data

    def _event(self, index: int, event: Event) -> bytes:
        return b"".join(self._go_on(index, event))


def _joined(events: Sequence[Event]) -> Event:
    """An answer's events as one."""
    return Event(
        "".join(event.text for event in events),
        tuple(token for event in events for token in event.tokens),
        events[-1].finish,
        prompt=tuple(token for event in events for token in event.prompt),
    )


class StreamedReply(EventSourceResponse):
    """Sends a reply as server-sent events; the generation ends with it."""

    def __init__(self, reply: Reply[Any]) -> None:
        self._generation = reply.generation
        prompt_tokens = {PROMPT_TOKENS_HEADER: str(reply.generation.prompt_tokens)}
        super().__init__(reply.stream(), headers=prompt_tokens)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events until the client disconnects, which may be before the first one."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._generation.cancel()


def _sse(data: BaseModel) -> bytes:
    return format_sse_event(data_str=data.model_dump_json())


class ChunkedReply(Reply[RequestBody]):
    """A response whose stream consists of chunks of its choices."""

    @abstractmethod
    def _chunks(self, index: int, event: Event) -> Iterator[BaseModel]:
        """The next chunks of the stream, by an answer's event."""

    @abstractmethod
    def _usage_chunk(self, usage: Usage) -> BaseModel:
        """The last chunk of a stream with `include_usage`."""

    def _go_on(self, index: int, event: Event) -> Iterator[bytes]:
        return map(_sse, self._chunks(index, event))

    def _end(self, usage: Usage) -> Iterator[bytes]:
        options = self.request.stream_options
        if options is not None and options.include_usage:
            yield _sse(self._usage_chunk(usage))
        yield format_sse_event(data_str="[DONE]")

    def _break_off(self, error: DeltadockError) -> bytes:
        return _sse(ErrorBody.of_error(error))


def _finish_reason(event: Event, *, calls: bool) -> str | None:
    """OpenAI's: an answer with calls may be cut off too."""
    return "tool_calls" if calls and event.finish == "stop" else event.finish


class DividedAnswers:
    """Divides the answers to a conversation into text and calls of its tools."""

    def __init__(self, request: ChatRequest, tokenizer: Tokenizer) -> None:
        self._at_most_one = request.at_most_one_call
        self._parsers: dict[int, ToolCallParser] = {}
        self._form: ToolForm | None = None
        if request.forced_tools:
            self._form = FORMS["json"]
        elif request.offered_tools:
            self._form = tool_form(tokenizer.chat.template_for(tools=True))

    def parts(self, index: int, event: Event) -> list[str | CallPart]:
        """What an answer's next event adds to its text and calls, in order."""
        if self._form is None:
            return [event.text]
        if index not in self._parsers:
            self._parsers[index] = ToolCallParser(self._form)
        parser = self._parsers[index]
        parts = parser.push(event.text)
        if event.finish is not None:
            parts += parser.finish(cut_off=event.finish == "length")
        if not self._at_most_one:
            return parts
        return [part for part in parts if isinstance(part, str) or not part.number]


class CompletionReply(ChunkedReply[CompletionRequest]):
    """The response of /v1/completions; its chunks have the format of the whole."""

    id_prefix = "cmpl-"

    def __init__(self, request: CompletionRequest, generation: Generation) -> None:
        super().__init__(request, generation)
        self._writers: dict[int, _LogprobsWriter] = {}
        self._echoed: set[int] = set()

    @property
    def takes_long(self) -> bool:
        """As `Reply.takes_long`: log-probabilities do, and prompts that are tokenized again."""
        return self.request.logprobs is not None or bool(self.request.echo)

    def _completion(self, answers: Sequence[Event], usage: Usage) -> Completion:
        choices = [self._choice(index, answer) for index, answer in enumerate(answers)]
        return Completion(**self.head, choices=choices, usage=usage)

    def _chunks(self, index: int, event: Event) -> Iterator[Completion]:
        yield Completion(**self.head, choices=[self._choice(index, event)])

    def _usage_chunk(self, usage: Usage) -> Completion:
        return Completion(**self.head, choices=[], usage=usage)

    def _choice(self, index: int, event: Event) -> CompletionChoice:
        echo = bool(self.request.echo) and index not in self._echoed
        self._echoed.add(index)
        return CompletionChoice(
            index=index,
            text=(self._prompt_text(index) if echo else "") + event.text,
            logprobs=self._logprobs(index, event, echo=echo),
            finish_reason=event.finish,
        )

    def _prompt(self, index: int) -> str | list[int]:
        """The prompt of an answer, as it was sent."""
        sent = self.request.prompt
        if isinstance(sent, str) or isinstance(sent[0], int):
            return sent
        return cast("list[str | list[int]]", sent)[index // self.request.answers]

    def _prompt_text(self, index: int) -> str:
        sent = self._prompt(index)
        return sent if isinstance(sent, str) else self.generation.tokenizer.decode(sent)

    def _logprobs(self, index: int, event: Event, *, echo: bool) -> CompletionLogprobs | None:
        if self.request.logprobs is None:
            return None
        if index not in self._writers:
            self._writers[index] = _LogprobsWriter(
                self.generation.tokenizer, hidden=self.request.skip_special_tokens is not False
            )
        writer, logprobs = self._writers[index], CompletionLogprobs()
        if echo:
            tokens = self.generation.prompts[index // self.request.answers]
            scores = [SampledToken(tokens[0]), *event.prompt]
            writer.add_prompt(logprobs, scores, self._prompt(index))
        writer.add(logprobs, event.tokens)
        return logprobs


class _LogprobsWriter:
    """Appends tokens to the log-probabilities of one completion, with their offsets in its text."""

    def __init__(self, tokenizer: Tokenizer, *, hidden: bool) -> None:
        """`hidden`: whether special tokens are no part of the text."""
        self._tokenizer, self._hidden = tokenizer, hidden
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._offset = 0

    def add_prompt(
        self, logprobs: CompletionLogprobs, tokens: Sequence[SampledToken], sent: str | list[int]
    ) -> None:
        """Append the tokens of a prompt that was sent as text or token ids."""
        if isinstance(sent, list):
            text = self._tokenizer.decode(sent)
            shown = (token for token in sent if not self._tokenizer.is_hidden(token))
            data = b"".join(map(self._tokenizer.token_bytes, shown)).decode(errors="replace")
            # Many tokenizers drop the space before a text's first token.
            self._offset = min(len(text) - len(data), 0)
            self.add(logprobs, tokens)
            self._offset = len(text)
            return
        for token, offset in zip(tokens, self._tokenizer.offsets(sent), strict=True):
            self._append(logprobs, token, offset)
        self._offset = len(sent)

    def add(self, logprobs: CompletionLogprobs, tokens: Sequence[SampledToken]) -> None:
        """Append tokens that follow the text so far."""
        for token in tokens:
            self._append(logprobs, token, self._offset)
            if not (self._hidden and self._tokenizer.is_hidden(token.id)):
                self._offset += len(self._decoder.decode(self._tokenizer.token_bytes(token.id)))

    def _append(self, logprobs: CompletionLogprobs, token: SampledToken, offset: int) -> None:
        logprobs.tokens.append(self._tokenizer.token_text(token.id))
        logprobs.token_logprobs.append(token.logprob)
        logprobs.top_logprobs.append(None if token.logprob is None else self._alternatives(token))
        logprobs.text_offset.append(max(offset, 0))

    def _alternatives(self, token: SampledToken) -> dict[str, float]:
        """Log-probabilities by text; a token whose text another has is named by its id."""
        alternatives: dict[str, float] = {}
        for number, logprob in [(token.id, token.logprob or 0.0), *token.top]:
            if number == token.id and alternatives:
                continue
            text = self._tokenizer.token_text(number)
            alternatives[f"token_id:{number}" if text in alternatives else text] = logprob
        return alternatives


class ChatReply(ChunkedReply[ChatRequest]):
    """The response of /v1/chat/completions."""

    id_prefix = "chatcmpl-"

    def __init__(self, request: ChatRequest, generation: Generation) -> None:
        super().__init__(request, generation)
        self._started = False
        """Whether a stream has begun."""
        self._calling: set[int] = set()
        """Streamed answers that have begun a call."""
        self._answers = DividedAnswers(request, generation.tokenizer)

    @property
    def takes_long(self) -> bool:
        """As `Reply.takes_long`: log-probabilities do."""
        return bool(self.request.logprobs)

    def _completion(self, answers: Sequence[Event], usage: Usage) -> ChatCompletion:
        choices = []
        for index, answer in enumerate(answers):
            text, calls = "", list[ToolCall]()
            for part in self._answers.parts(index, answer):
                if isinstance(part, str):
                    text += part
                elif part.name is not None:
                    function = FunctionCall(name=part.name, arguments=part.arguments)
                    calls.append(ToolCall(id=new_call_id(), function=function))
                else:
                    calls[-1].function.arguments += part.arguments
            message = AssistantMessage(content=text or (None if calls else ""))
            if calls:
                message.tool_calls = calls
            choices.append(
                ChatChoice(
                    index=index,
                    message=message,
                    logprobs=self._logprobs(answer.tokens),
                    finish_reason=_finish_reason(answer, calls=bool(calls)),
                )
            )
        return ChatCompletion(**self.head, choices=choices, usage=usage)

    def _chunks(self, index: int, event: Event) -> Iterator[ChatChunk]:
        if not self._started:
            # OpenAI's client takes the answers in the order of their first chunks.
            self._started = True
            for answer in range(self.request.answers):
                yield self._chunk(answer, MessageDelta(role="assistant", content=""))
        text, calls = "", dict[int, ToolCallDelta]()
        for part in self._answers.parts(index, event):
            if isinstance(part, str):
                text += part
            elif part.name is not None:
                function = FunctionCallDelta(name=part.name, arguments=part.arguments)
                calls[part.number] = ToolCallDelta(
                    index=part.number, id=new_call_id(), type="function", function=function
                )
            elif part.number in calls:
                calls[part.number].function.arguments += part.arguments
            else:
                function = FunctionCallDelta(arguments=part.arguments)
                calls[part.number] = ToolCallDelta(index=part.number, function=function)
        if not calls:
            finish = _finish_reason(event, calls=index in self._calling)
            yield self._chunk(index, MessageDelta(content=text), event.tokens, finish)
            return
        self._calling.add(index)
        delta = MessageDelta(content=text or None, tool_calls=list(calls.values()))
        yield self._chunk(index, delta, event.tokens)
        if event.finish is not None:
            # OpenAI's client sees a call's end by another chunk.
            yield self._chunk(index, MessageDelta(), finish=_finish_reason(event, calls=True))

    def _chunk(
        self,
        index: int,
        delta: MessageDelta,
        tokens: Sequence[SampledToken] = (),
        finish: str | None = None,
    ) -> ChatChunk:
        choice = ChatChunkChoice(
            index=index, delta=delta, logprobs=self._logprobs(tokens), finish_reason=finish
        )
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
        tokenizer = self.generation.tokenizer
        return {
            "token": tokenizer.token_text(token),
            "logprob": logprob,
            "bytes": list(tokenizer.token_bytes(token)),
        }
