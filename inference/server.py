"""The node's HTTP face: OpenAI's completions for one base and its deltas.

Run it with `python -m inference.server`, or `uvicorn --factory inference.server:create_app`.
"""

import argparse
import asyncio
import logging
import re
import socket
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from typing import Annotated, Any, Final, TypeVar

import uvicorn
from fastapi import FastAPI, Header, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, StreamingResponse
from prometheus_client import CONTENT_TYPE_LATEST
from pydantic import BaseModel

from deltadock import __version__
from deltadock.errors import Cancelled, DeltadockError, InvalidInput, Unavailable
from deltadock.logs import configure_logging
from deltadock.settings import Settings, get_settings
from inference.chat_replies import ChatReply
from inference.chat_schemas import ChatCompletion, ChatRequest
from inference.node import Node, Target
from inference.replies import CompletionReply, Reply
from inference.schemas import Completion, CompletionRequest, ErrorBody, Model, ModelList
from storage.blobs import BlobStore, make_blob_store

DIGEST: Final = re.compile(r"[0-9a-f]{64}")
RETRY_AFTER_SECONDS: Final = 1

BaseHeader = Annotated[str | None, Header(alias="Deltadock-Base")]
ArtifactHeader = Annotated[str | None, Header(alias="Deltadock-Artifact")]
Result = TypeVar("Result")


def create_app(settings: Settings | None = None, blobs: BlobStore | None = None) -> FastAPI:
    """The node as an ASGI application; by default with the process's settings and their blobs."""
    settings = settings or get_settings()
    node = Node(settings, blobs or make_blob_store(settings))

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        await node.start()
        yield
        await node.stop()

    app = FastAPI(title="Deltadock inference node", version=__version__, lifespan=lifespan)
    app.state.node = node
    app.add_exception_handler(DeltadockError, _on_error)
    app.add_exception_handler(RequestValidationError, _on_invalid)
    _add_routes(app, node)
    return app


def _add_routes(app: FastAPI, node: Node) -> None:
    errors: dict[int | str, dict[str, Any]] = {
        status: {"model": ErrorBody} for status in (404, 409, 422, 429, 500, 503)
    }

    async def answer(request: Request, reply: Reply[Any]) -> Response | BaseModel:
        if reply.request.stream:
            return StreamingResponse(reply.stream(), media_type="text/event-stream")
        return await _while_connected(request, reply.whole())

    @app.post("/v1/completions", response_model=Completion, responses=errors)
    async def complete(
        body: CompletionRequest, request: Request, base: BaseHeader = None,
        artifact: ArtifactHeader = None,
    ) -> Response | BaseModel:  # fmt: skip
        """Continue a prompt with the base or one of its deltas.

        The headers name the weights by digest; without them `model` is the base's name.
        """
        target = _target(base, artifact) or node.target(body.model)
        generation = await _while_connected(request, node.generate(target, body))
        return await answer(request, CompletionReply(body, generation))

    @app.post("/v1/chat/completions", response_model=ChatCompletion, responses=errors)
    async def chat(
        body: ChatRequest, request: Request, base: BaseHeader = None,
        artifact: ArtifactHeader = None,
    ) -> Response | BaseModel:  # fmt: skip
        """Answer a conversation, in the way that the delta's own chat template puts it."""
        target = _target(base, artifact) or node.target(body.model)
        generation = await _while_connected(request, node.generate(target, body))
        return await answer(request, ChatReply(body, generation))

    @app.get("/v1/models")
    async def models() -> ModelList:
        """The base and the deltas in memory, by what `model` may name them here."""
        if node.base is None:
            return ModelList(data=[])
        names = [node.base.name, *node.base.deltas.digests]
        return ModelList(data=[Model(id=name) for name in names])

    @app.get("/healthz")
    async def healthy() -> dict[str, str]:
        """The process is alive."""
        return {"status": "ok"}

    @app.get("/readyz", responses={503: {"model": ErrorBody}})
    async def ready() -> dict[str, str | None]:
        """Requests can be taken."""
        if not node.ready:
            raise Unavailable("The engine has stopped; restart the node.")
        return {"status": "ok", "base": node.base.digest if node.base is not None else None}

    @app.get("/metrics", response_class=Response)
    async def metrics() -> Response:
        """Prometheus metrics."""
        return Response(node.render_metrics(), media_type=CONTENT_TYPE_LATEST)


def _target(base: str | None, artifact: str | None) -> Target | None:
    """The weights that the headers name, or None without headers."""
    if base is None and artifact is None:
        return None
    if base is None or not all(DIGEST.fullmatch(digest) for digest in (base, artifact or base)):
        raise InvalidInput(
            "Deltadock-Base, and Deltadock-Artifact for a delta, must be SHA-256 digests in "
            "lower-case hex."
        )
    return Target(base, artifact)


async def _while_connected(request: Request, work: Coroutine[Any, Any, Result]) -> Result:
    """The result of `work`, which is cancelled when the client goes away."""

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    working = asyncio.create_task(work)
    watching = asyncio.create_task(gone())
    try:
        await asyncio.wait({working, watching}, return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise Cancelled("The client went away.")
    finally:
        watching.cancel()
        working.cancel()


def _on_error(_: Request, error: Exception) -> JSONResponse:
    if not isinstance(error, DeltadockError):
        raise error
    return _error_response(error)


def _on_invalid(_: Request, error: Exception) -> JSONResponse:
    if not isinstance(error, RequestValidationError):
        raise error
    # Of the forms that a field may have, the one that was followed furthest was meant.
    fault = max(error.errors(), key=lambda fault: len(fault["loc"]))
    where = ".".join(str(part) for part in fault["loc"][1:])
    return _error_response(InvalidInput(f"{where}: {fault['msg']}"), where)


def _error_response(error: DeltadockError, param: str | None = None) -> JSONResponse:
    seconds = error.details.get("retry_after", RETRY_AFTER_SECONDS)
    headers = {"Retry-After": str(seconds)} if error.retryable else None
    body = ErrorBody.of(error, param).model_dump()
    return JSONResponse(body, status_code=error.status, headers=headers)


class NodeServer(uvicorn.Server):
    """Serves a node: registers it once it listens, and drains it before it stops."""

    def __init__(self, app: FastAPI, host: str, port: int, url: str) -> None:
        super().__init__(uvicorn.Config(app, host=host, port=port, log_config=None, lifespan="on"))
        self.node: Node = app.state.node
        self._url = url

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen; only then may anybody be sent here."""
        await super().startup(sockets)
        if self.started:
            self.node.register(self._url)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Say that nobody is to come any more, and finish what runs."""
        await self.node.drain()
        await super().shutdown(sockets)


def serve(settings: Settings, host: str, port: int) -> None:
    """Run a node until SIGTERM; running requests are finished first."""
    configure_logging(settings, process="node")
    logging.getLogger("httpx").setLevel(logging.WARNING)  # every heartbeat
    own = socket.gethostname() if host in {"0.0.0.0", "::"} else host
    url = settings.node_url or f"http://{own}:{port}"
    NodeServer(create_app(settings), host, port, url).run()


def main() -> None:
    """Run the node that the environment describes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8100)
    options = parser.parse_args()
    serve(get_settings(), options.host, options.port)


if __name__ == "__main__":
    main()
