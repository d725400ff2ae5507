"""Builds OpenAI's answers of /v1/responses from a generation's events: whole and streamed."""

import secrets
from collections.abc import Iterator, Sequence
from typing import Any

from fastapi.sse import format_sse_event
from pydantic import BaseModel

from deltadock.errors import DeltadockError
from deltadock.inference.engine.sequence import Event
from deltadock.inference.generation import Generation
from deltadock.inference.http.replies import DividedAnswers, Reply
from deltadock.openai.chat import ChatRequest
from deltadock.openai.fields import Usage
from deltadock.openai.responses import (
    IncompleteDetails,
    OutputCall,
    OutputMessage,
    OutputText,
    ResponseError,
    ResponseObject,
    ResponseRequest,
    ResponseUsage,
    event_of,
)
from deltadock.openai.tools import new_call_id

Fields = tuple[str, dict[str, Any]]
"""An event's type, without `response.`, and its fields."""


class ResponseReply(Reply[ChatRequest]):
    """The response of /v1/responses: the answer of a chat as a list of texts and calls."""

    id_prefix = "resp_"
    takes_long = False

    def __init__(self, request: ResponseRequest, generation: Generation) -> None:
        super().__init__(request.chat(), generation)
        self._answers = DividedAnswers(self.request, generation.tokenizer)
        created_at = self.head.pop("created")
        self._response = ResponseObject.begun(request, created_at=created_at, **self.head)
        self._item: OutputMessage | OutputCall | None = None
        """The last of the output, until it has ended."""
        self._sent = 0
        """Events of a stream."""

    def _completion(self, answers: Sequence[Event], usage: Usage) -> BaseModel:
        for _ in self._events(answers[0]):
            pass
        return self._finished(usage)

    def _begin(self) -> Iterator[bytes]:
        yield self._sse("created", {"response": self._response})
        yield self._sse("in_progress", {"response": self._response})

    def _go_on(self, index: int, event: Event) -> Iterator[bytes]:
        for kind, fields in self._events(event):
            yield self._sse(kind, fields)

    def _end(self, usage: Usage) -> Iterator[bytes]:
        response = self._finished(usage)
        yield self._sse(response.status, {"response": response})

    def _break_off(self, error: DeltadockError) -> bytes:
        self._response.status = "failed"
        self._response.error = ResponseError(code=error.code, message=error.message)
        return self._sse("failed", {"response": self._response})

    def _finished(self, usage: Usage) -> ResponseObject:
        response = self._response
        response.usage = ResponseUsage.of(usage)
        if response.status == "in_progress":
            response.status = "completed"
        return response

    def _sse(self, kind: str, fields: dict[str, Any]) -> bytes:
        kind = f"response.{kind}"
        data = event_of(kind, self._sent, fields)
        self._sent += 1
        return format_sse_event(data_str=data, event=kind)

    def _events(self, event: Event) -> Iterator[Fields]:
        """Append to the output what the answer's next event has."""
        for part in self._answers.parts(0, event):
            if isinstance(part, str):
                yield from self._add_text(part)
            else:
                yield from self._add_to_call(part.name, part.arguments)
        if event.finish == "length":
            self._response.status = "incomplete"
            self._response.incomplete_details = IncompleteDetails()
        if event.finish is not None:
            yield from self._end_item()

    def _place(self) -> dict[str, Any]:
        assert self._item is not None
        return {"item_id": self._item.id, "output_index": len(self._response.output) - 1}

    def _begin_item(self, item: OutputMessage | OutputCall) -> Iterator[Fields]:
        yield from self._end_item()
        self._item = item
        self._response.output.append(item)
        yield "output_item.added", {"output_index": self._place()["output_index"], "item": item}

    def _add_text(self, text: str) -> Iterator[Fields]:
        item = self._item
        if not isinstance(item, OutputMessage):
            text = text.removeprefix("\n") if self._response.output else text
            if not text:
                return
            item = OutputMessage(id=f"msg_{secrets.token_hex(12)}")
            yield from self._begin_item(item)
            item.content.append(OutputText())
            part = {"content_index": 0, "part": item.content[0]}
            yield "content_part.added", self._place() | part
        if text:
            item.content[0].text += text
            delta = {"content_index": 0, "delta": text, "logprobs": []}
            yield "output_text.delta", self._place() | delta

    def _add_to_call(self, name: str | None, arguments: str) -> Iterator[Fields]:
        if name is not None:
            call = OutputCall(id=f"fc_{secrets.token_hex(12)}", call_id=new_call_id(), name=name)
            yield from self._begin_item(call)
        assert isinstance(self._item, OutputCall)
        if arguments:
            self._item.arguments += arguments
            yield "function_call_arguments.delta", self._place() | {"delta": arguments}

    def _end_item(self) -> Iterator[Fields]:
        item = self._item
        if item is None:
            return
        is_cut_off = self._response.status == "incomplete"
        item.status = "incomplete" if is_cut_off else "completed"
        if isinstance(item, OutputMessage):
            [part] = item.content
            place = self._place() | {"content_index": 0}
            yield "output_text.done", place | {"text": part.text, "logprobs": []}
            yield "content_part.done", place | {"part": part}
        else:
            done = {"name": item.name, "arguments": item.arguments}
            yield "function_call_arguments.done", self._place() | done
        yield "output_item.done", {"output_index": self._place()["output_index"], "item": item}
        self._item = None
