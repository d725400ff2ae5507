"""Forwarding to the inference nodes."""

import json
from contextlib import AsyncExitStack, ExitStack
from typing import Any, Final

import anyio
import httpx
import structlog
from fastapi import Request
from starlette.requests import ClientDisconnect

from deltadock.api.dependencies import Resources
from deltadock.api.fleet import Fleet, NodeView
from deltadock.api.generation.answer import Answer
from deltadock.api.generation.target import Target
from deltadock.api.middleware import REQUEST_ID
from deltadock.errors import DeltadockError, InvalidInput, Unauthorized, Unavailable
from deltadock.trust import credentials

log = structlog.get_logger(__name__)

BASE_HEADER: Final = "Deltadock-Base"
ARTIFACT_HEADER: Final = "Deltadock-Artifact"
COMPLETIONS: Final = "/v1/completions"
CHAT: Final = "/v1/chat/completions"
BUSY: Final = frozenset({429, 503})
"""Answers of a node that cannot now, though another may."""
MAX_LOST: Final = 2
"""Nodes that one request may see breaking off: it may be the one that brings them down."""
WATCH_SECONDS: Final = 1.0


class NodeLost(Exception):
    """A node broke off before the first byte of its answer."""


async def ask_nodes(
    resources: Resources, request: Request, target: Target, path: str, body: dict[str, Any]
) -> Answer:
    """Start an answer at the node that suits best, or at another if that one cannot or dies.

    Its first bytes have arrived; the rest is still to be read and closed. None of the client's
    headers go along: only what the resolver found chooses the weights. If the client goes away
    while a node works, the node is told by closing its connection.

    Raises:
        InvalidInput: the body holds what JSON does not, such as NaN.
        Unavailable: no node is there that could answer, or those that are break off.
        ClientDisconnect: nobody waits for the answer any more.
    """
    content = _encode(body)
    headers = {
        BASE_HEADER: target.base_digest,
        REQUEST_ID: request.state.request_id,
        "Content-Type": "application/json",
        **credentials(resources.settings.node_secret),
    }
    if target.artifact_digest is not None:
        headers[ARTIFACT_HEADER] = target.artifact_digest
    lost = 0
    asked: set[str] = set()
    async with AsyncExitStack() as unused:
        busy: Answer | None = None
        # Ranked anew each time: once the last node with the base is lost, another may adopt it.
        while node := next(
            (n for n in await resources.fleet.candidates(target) if n.id not in asked), None
        ):
            asked.add(node.id)
            call = resources.http.build_request(
                "POST", f"{node.url}{path}", content=content, headers=headers
            )
            try:
                answer = await _ask(resources, request, node, call)
            except NodeLost:
                await resources.fleet.remove(node)
                lost += 1
                if lost == MAX_LOST:
                    break
                continue
            if answer.status == Unauthorized.status:  # no fault of the client's
                log.error("node_refuses_our_secret", node=node.id, url=node.url)
                await answer.close()
                continue
            if answer.status not in BUSY:
                return answer
            if busy is None:
                busy = answer
                unused.push_async_callback(answer.close)
            else:
                await answer.close()
        if busy is not None:  # no other node can, either: this is what the client is told
            unused.pop_all()
            return busy
    if lost:
        raise Unavailable("The inference node does not answer; try again shortly.")
    raise Unavailable(
        "No inference node is there for this base. Start one with `deltadock node`; GET /v1/nodes "
        "lists those that are."
    )


def _encode(body: dict[str, Any]) -> bytes:
    try:
        return json.dumps(body, ensure_ascii=False, allow_nan=False).encode()
    except ValueError as error:  # lenient parsers, like ours, let these in
        raise InvalidInput(
            "The body holds NaN, an infinity or half a surrogate pair, which JSON cannot carry."
        ) from error


async def _ask(
    resources: Resources, request: Request, node: NodeView, call: httpx.Request
) -> Answer:
    """One node's answer, begun.

    Raises:
        NodeLost: it broke off, or fell silent towards the api while we waited.
        ClientDisconnect: the client is gone.
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
                group.cancel_scope.cancel()

            async def watch_node() -> None:
                while await _is_there(resources.fleet, node):
                    await anyio.sleep(WATCH_SECONDS)
                group.cancel_scope.cancel()

            group.start_soon(watch_client)
            group.start_soon(watch_node)
            try:
                answer = await Answer.begin(resources.http, call)
            except httpx.HTTPError as error:
                log.warning("node_broke_off", node=node.id, error=repr(error))
            group.cancel_scope.cancel()
        if answer is not None:
            answer.until_closed = counted.pop_all()
            return answer
    if client_gone:
        raise ClientDisconnect
    raise NodeLost


async def _is_there(fleet: Fleet, node: NodeView) -> bool:
    try:
        return await fleet.is_registered(node)
    except DeltadockError:  # while nobody can tell, the node may well be there
        return True
