"""A node's answer: begun, passed on as it comes, and closed however the client's side ends."""

import json
from collections.abc import AsyncIterator
from contextlib import ExitStack
from typing import Any, Final

import anyio
import httpx
import structlog
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from deltadock.errors import Unavailable
from deltadock.openai.errors import ErrorBody

log = structlog.get_logger(__name__)

EVENT_STREAM: Final = "text/event-stream"
PASSED_HEADERS: Final = ("content-type", "retry-after")


class Answer:
    """A node's answer, of which the first bytes are here."""

    def __init__(self, response: httpx.Response, chunks: AsyncIterator[bytes], first: bytes):
        self._response = response
        self._chunks = chunks
        self._first = first
        self.status = response.status_code
        self.until_closed = ExitStack()
        """What ends with the answer."""

    @classmethod
    async def begin(cls, http: httpx.AsyncClient, call: httpx.Request) -> "Answer":
        """Send the request, and wait for the first bytes of the answer's body.

        Raises:
            httpx.HTTPError: the node does not answer, or broke off before these.
        """
        response = await http.send(call, stream=True)
        try:
            chunks = response.aiter_bytes()
            return cls(response, chunks, await anext(chunks, b""))
        except BaseException:
            with anyio.CancelScope(shield=True):
                await response.aclose()
            raise

    @property
    def is_stream(self) -> bool:
        """Whether it comes as server-sent events."""
        return str(self._response.headers.get("content-type", "")).startswith(EVENT_STREAM)

    @property
    def headers(self) -> dict[str, str]:
        """The headers that a client gets to see."""
        told = self._response.headers
        return {name: told[name] for name in PASSED_HEADERS if name in told}

    async def chunks(self) -> AsyncIterator[bytes]:
        """The body; httpx.HTTPError if the node breaks off."""
        yield self._first
        async for chunk in self._chunks:
            yield chunk

    async def read(self) -> Any:
        """The whole body as JSON.

        Raises:
            Unavailable: the node broke off or does not speak JSON.
        """
        try:
            return json.loads(b"".join([chunk async for chunk in self.chunks()]))
        except (httpx.HTTPError, ValueError) as error:
            raise Unavailable("The inference node broke off its answer; try again.") from error
        finally:
            await self.close()

    async def close(self) -> None:
        """Let the node go; it stops computing what nobody will read."""
        with anyio.CancelScope(shield=True):
            await self._response.aclose()
        self.until_closed.close()


class ForwardedResponse(StreamingResponse):
    """The node's answer as it comes, errors included."""

    def __init__(self, answer: Answer) -> None:
        super().__init__(_passed_on(answer), answer.status, answer.headers)
        self._answer = answer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self._answer.close()


async def _passed_on(answer: Answer) -> AsyncIterator[bytes]:
    try:
        async for chunk in answer.chunks():
            yield chunk
    except httpx.HTTPError as error:
        log.warning("node_broke_off", error=repr(error))
        if not answer.is_stream:
            raise  # a connection that breaks is all that can still tell the client
        body = ErrorBody.of(503, Unavailable.code, "The inference node broke off its answer.")
        yield f"\n\ndata: {body.model_dump_json()}\n\n".encode()
