"""Forwarding to the inference node."""

import json
from collections.abc import AsyncIterator
from typing import Any, Final

import anyio
import httpx
import structlog
from fastapi import Request
from starlette.requests import ClientDisconnect
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from api.generation.resolver import Target
from api.middleware import REQUEST_ID
from api.problems import openai_body
from deltadock.errors import InvalidInput, Unavailable

log = structlog.get_logger(__name__)

BASE_HEADER: Final = "Deltadock-Base"
ARTIFACT_HEADER: Final = "Deltadock-Artifact"
COMPLETIONS: Final = "/v1/completions"
EVENT_STREAM: Final = "text/event-stream"
PASSED_HEADERS: Final = ("content-type", "retry-after")


async def ask_node(
    node: httpx.AsyncClient, request: Request, target: Target, body: dict[str, Any]
) -> httpx.Response:
    """Start a completion; the answer's head has arrived, its body is still to be read and closed.

    None of the client's headers go along: only what the resolver found chooses the weights.
    If the client goes away while the node works, the node is told by closing its connection.

    Raises:
        InvalidInput: the body holds what JSON does not, such as NaN.
        Unavailable: the node does not answer.
        ClientDisconnect: nobody waits for the answer any more.
    """
    headers = {BASE_HEADER: target.base_digest, REQUEST_ID: request.state.request_id}
    if target.artifact_digest is not None:
        headers[ARTIFACT_HEADER] = target.artifact_digest
    try:
        call = node.build_request("POST", COMPLETIONS, json=body, headers=headers)
    except ValueError as error:  # lenient parsers, like ours, let these in
        raise InvalidInput(
            "The body holds NaN, an infinity or half a surrogate pair, which JSON cannot carry."
        ) from error
    answer: httpx.Response | None = None
    failure: httpx.HTTPError | None = None
    async with anyio.create_task_group() as group:

        async def watch_client() -> None:
            while (await request.receive())["type"] != "http.disconnect":
                pass
            group.cancel_scope.cancel()

        group.start_soon(watch_client)
        try:
            answer = await node.send(call, stream=True)
        except httpx.HTTPError as error:
            failure = error
        group.cancel_scope.cancel()
    if failure is not None:
        log.warning("node_unavailable", error=repr(failure))
        raise Unavailable("The inference node does not answer; try again shortly.") from failure
    if answer is None:
        raise ClientDisconnect
    return answer


async def read_answer(answer: httpx.Response) -> Any:
    """The whole body as JSON.

    Raises:
        Unavailable: the node broke off or does not speak JSON.
    """
    try:
        return json.loads(await answer.aread())
    except (httpx.HTTPError, ValueError) as error:
        raise Unavailable("The inference node broke off its answer; try again.") from error
    finally:
        await answer.aclose()


class ForwardedResponse(StreamingResponse):
    """The node's answer as it comes, errors included; closed however the client's side ends."""

    def __init__(self, answer: httpx.Response) -> None:
        super().__init__(
            _chunks(answer),
            answer.status_code,
            {name: answer.headers[name] for name in PASSED_HEADERS if name in answer.headers},
        )
        self._answer = answer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            with anyio.CancelScope(shield=True):
                await self._answer.aclose()


async def _chunks(answer: httpx.Response) -> AsyncIterator[bytes]:
    try:
        async for chunk in answer.aiter_raw():
            yield chunk
    except httpx.HTTPError as error:
        log.warning("node_broke_off", error=repr(error))
        if not answer.headers.get("content-type", "").startswith(EVENT_STREAM):
            raise  # a connection that breaks is all that can still tell the client
        body = openai_body(503, Unavailable.code, "The inference node broke off its answer.")
        yield f"\n\ndata: {json.dumps(body)}\n\n".encode()
