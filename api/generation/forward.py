"""Forwards requests to the inference nodes and streams their answers back."""

import json
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, ExitStack
from typing import Any, Final

import anyio
import httpx
import structlog
from fastapi import Request
from opentelemetry.trace import SpanKind
from starlette.requests import ClientDisconnect
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from deltadock.api.access.caller import get_caller
from deltadock.api.dependencies import Resources
from deltadock.api.fleet import Fleet, NodeView, serves
from deltadock.api.generation.metering import Meter
from deltadock.errors import DeltadockError, InvalidInput, StorageFull, Unauthorized, Unavailable
from deltadock.model_target import TENANT_HEADER, ModelTarget
from deltadock.openai.errors import ErrorBody
from deltadock.openai.fields import GENERATION_HEADER
from deltadock.request_ids import REQUEST_ID
from deltadock.tracing import span, trace_headers
from deltadock.trust import credentials

log = structlog.get_logger(__name__)

COMPLETIONS: Final = "/v1/completions"
CHAT: Final = "/v1/chat/completions"
RESPONSES: Final = "/v1/responses"
EVENT_STREAM: Final = "text/event-stream"
FORWARDED_HEADERS: Final = ("content-type", "retry-after")
BUSY: Final = frozenset({429, 503})
"""Statuses of a node that cannot answer now, though another may."""
MAX_LOST_NODES: Final = 2
"""Nodes that one request may lose: the request itself may be what kills them."""
POLL_SECONDS: Final = 1.0


class Answer:
    """A node's response whose first bytes have arrived."""

    def __init__(self, response: httpx.Response, chunks: AsyncIterator[bytes], first: bytes):
        self._response = response
        self._chunks = chunks
        self._first = first
        self.status = response.status_code
        self.until_closed = ExitStack()
        """Closed with the answer."""

    @classmethod
    async def begin(
        cls, http: httpx.AsyncClient, call: httpx.Request, meter: Meter | None
    ) -> "Answer":
        """Send the request and wait for the first bytes of the response body.

        Raises:
            httpx.HTTPError: the node does not respond, or disconnected before the first bytes.
        """
        response = await http.send(call, stream=True)
        if meter is not None:
            meter.begin(response.headers)
        try:
            chunks = response.aiter_bytes()
            return cls(response, chunks, await anext(chunks, b""))
        except BaseException:
            with anyio.CancelScope(shield=True):
                await response.aclose()
            raise

    @property
    def is_stream(self) -> bool:
        """Whether the body is server-sent events."""
        return str(self._response.headers.get("content-type", "")).startswith(EVENT_STREAM)

    @property
    def headers(self) -> dict[str, str]:
        """The headers that are forwarded to the client."""
        headers = self._response.headers
        return {name: headers[name] for name in FORWARDED_HEADERS if name in headers}

    async def chunks(self) -> AsyncIterator[bytes]:
        """The body; raises httpx.HTTPError if the node disconnects."""
        yield self._first
        async for chunk in self._chunks:
            yield chunk

    async def read(self) -> Any:
        """The complete body, parsed as JSON.

        Raises:
            Unavailable: the node disconnected or did not send JSON.
        """
        try:
            return json.loads(b"".join([chunk async for chunk in self.chunks()]))
        except (httpx.HTTPError, ValueError) as error:
            raise Unavailable("The inference node broke off its answer; try again.") from error
        finally:
            await self.close()

    async def close(self) -> None:
        """Close the connection; the node then cancels the request."""
        with anyio.CancelScope(shield=True):
            await self._response.aclose()
        self.until_closed.close()


class ForwardedResponse(StreamingResponse):
    """Streams the node's answer, errors included; `meter` counts its tokens."""

    def __init__(self, answer: Answer, meter: Meter | None = None) -> None:
        super().__init__(_stream(answer, meter), answer.status, answer.headers)
        self._answer = answer
        self._meter = meter

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self._answer.close()
            if self._meter is not None:
                await self._meter.charge()


async def _stream(answer: Answer, meter: Meter | None) -> AsyncIterator[bytes]:
    chunks = answer.chunks() if meter is None else meter.pass_on(answer.chunks())
    try:
        async for chunk in chunks:
            yield chunk
    except httpx.HTTPError as error:
        log.warning("node_disconnected", error=repr(error))
        if not answer.is_stream:
            raise  # only a broken connection can still signal the error
        body = ErrorBody.of(503, Unavailable.code, "The inference node disconnected.")
        yield f"\n\ndata: {body.model_dump_json()}\n\n".encode()


class NodeLost(Exception):
    """A node disconnected before the first byte of its answer."""


async def ask_nodes(
    resources: Resources,
    request: Request,
    target: ModelTarget,
    path: str,
    body: dict[str, Any],
    meter: Meter | None = None,
) -> Answer:
    """Start an answer at the best-ranked node, or at another if that one is busy or lost.

    The caller reads and closes the answer. None of the client's headers are forwarded: only
    `target` selects the weights. If the client disconnects, so does the connection to the node, and
    `meter` charges what that has made.

    Raises:
        InvalidInput: the body contains what JSON cannot represent, such as NaN.
        Unavailable: no node has this base, or the nodes were lost.
        ClientDisconnect: the client disconnected.
    """
    content = _encode(body)
    headers = {
        **target.headers,
        TENANT_HEADER: (await get_caller(request)).tenant_id,
        REQUEST_ID: request.state.request_id,
        "Content-Type": "application/json",
        **credentials(resources.settings.node_secret),
        **({} if meter is None else {GENERATION_HEADER: meter.name}),
    }
    lost = 0
    asked: set[str] = set()
    async with AsyncExitStack() as unused:
        busy: Answer | None = None
        # Ranked again each time: when the last node with the base is lost, another may load it.
        while node := next(
            (n for n in await resources.fleet.candidates(target) if n.id not in asked), None
        ):
            asked.add(node.id)
            call = resources.http.build_request(
                "POST", f"{node.url}{path}", content=content, headers=headers
            )
            try:
                answer = await _ask(resources, request, node, call, meter)
            except NodeLost:
                await resources.fleet.remove(node)
                lost += 1
                if lost == MAX_LOST_NODES:
                    break
                continue
            if answer.status == Unauthorized.status:  # not the client's error
                log.error("node_rejects_secret", node=node.id, url=node.url)
                await answer.close()
                continue
            if answer.status not in BUSY:
                return answer
            if busy is None:
                busy = answer
                unused.push_async_callback(answer.close)
            else:
                await answer.close()
        if busy is not None:  # every node is busy: return the first one's answer
            unused.pop_all()
            return busy
    if lost:
        raise Unavailable("The inference node does not respond; try again shortly.")
    raise await _nobody_serves(resources, target)


async def _nobody_serves(resources: Resources, target: ModelTarget) -> Unavailable:
    try:
        resources.database.check_room()
    except StorageFull as error:  # so that nodes' heartbeats are lost
        return Unavailable(f"No inference node can register. {error.message}")
    draining = [
        node.id for node in await resources.fleet.nodes() if node.draining and serves(node, target)
    ]
    if draining:
        return Unavailable(
            f"No inference node accepts requests for the base {target.shown_base}: {draining[0]} "
            f"is draining. Let it accept requests again with `deltadock resume {draining[0]}`, or "
            "start another with `deltadock node`."
        )
    return Unavailable(
        f"No inference node serves the base {target.shown_base}. Start one with `deltadock node`; "
        "GET /v1/nodes lists the registered nodes."
    )


def _encode(body: dict[str, Any]) -> bytes:
    try:
        return json.dumps(body, ensure_ascii=False, allow_nan=False).encode()
    except ValueError as error:  # Python's parser accepts these
        raise InvalidInput(
            "The body contains NaN, an infinity or half a surrogate pair, which is not JSON."
        ) from error


async def _ask(
    resources: Resources,
    request: Request,
    node: NodeView,
    call: httpx.Request,
    meter: Meter | None,
) -> Answer:
    """Start one node's answer.

    Raises:
        NodeLost: it disconnected, or sent no heartbeats while this waited.
        ClientDisconnect: the client disconnected.
    """
    answer: Answer | None = None
    client_gone = False
    with ExitStack() as counted:
        counted.enter_context(resources.fleet.sending(node))
        async with anyio.create_task_group() as group:

            async def watch_client() -> None:
                nonlocal client_gone
                while (await request.receive())["type"] != "http.disconnect":
                    pass
                client_gone = True
                if meter is not None:
                    secret = credentials(resources.settings.node_secret)
                    await meter.end(resources.http, node.url, secret)
                group.cancel_scope.cancel()

            async def watch_node() -> None:
                # Any request that loses its connection deregisters the node. One that is alive
                # registers again with its next heartbeat, and this request goes on.
                seen = time.monotonic()
                while time.monotonic() - seen < node.lives_seconds / 2:
                    await anyio.sleep(POLL_SECONDS)
                    if await _is_registered(resources.fleet, node):
                        seen = time.monotonic()
                group.cancel_scope.cancel()

            group.start_soon(watch_client)
            group.start_soon(watch_node)
            try:
                with span(
                    f"POST {call.url.path}", SpanKind.CLIENT, attributes={"deltadock.node": node.id}
                ):
                    call.headers.update(trace_headers())
                    answer = await Answer.begin(resources.http, call, meter)
            except httpx.HTTPError as error:
                log.warning("node_disconnected", node=node.id, error=repr(error))
            group.cancel_scope.cancel()
        if client_gone:
            if answer is not None:
                await answer.close()
            raise ClientDisconnect
        if answer is None:
            raise NodeLost
        answer.until_closed = counted.pop_all()
        return answer


async def _is_registered(fleet: Fleet, node: NodeView) -> bool:
    try:
        return await fleet.is_registered(node)
    except DeltadockError:  # if the store is unavailable, assume so
        return True
