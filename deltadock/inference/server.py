"""The node's process: the HTTP server, registration with the api, graceful shutdown.

Run it with `deltadock node`, or `python -m deltadock.inference.server`.
"""

import logging
import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from typing import Annotated, Final

import typer
import uvicorn
from fastapi import FastAPI

from deltadock.body_limit import BodyLimit
from deltadock.description import DescribedApp, Schema
from deltadock.errors import (
    BadRequest,
    DeltadockError,
    InvalidInput,
    TooLarge,
    Unauthorized,
    Unavailable,
)
from deltadock.inference.collector import NodeCollector
from deltadock.inference.http import endpoints
from deltadock.inference.node import InferenceNode
from deltadock.logs import configure_logging
from deltadock.problems import install_error_handlers
from deltadock.request_ids import RequestIds
from deltadock.settings import KEEP_ALIVE_SECONDS, Settings, get_settings
from deltadock.storage.blobs import BlobStore, make_blob_store
from deltadock.tracing import configure_tracing, telemetry
from deltadock.version import __version__

WILDCARD_HOSTS: Final = ("0.0.0.0", "::")


def create_app(settings: Settings | None = None, blobs: BlobStore | None = None) -> FastAPI:
    """The node as an ASGI application; by default with the process's settings."""
    settings = settings or get_settings()
    node = InferenceNode(settings, blobs or make_blob_store(settings))
    node.metrics.register(NodeCollector(node))

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        await node.start()
        yield
        await node.stop()

    app = DescribedApp(
        title="Deltadock inference node",
        version=__version__,
        summary="OpenAI's routes for one base and its deltas, and routes for operators.",
        lifespan=lifespan,
        generate_unique_id_function=lambda route: route.name,
        errors_of=_common_errors,
        telemetry=telemetry(),
    )
    app.state.node = node
    install_error_handlers(app, lambda code: node.metrics.requests.labels(code).inc())
    app.add_middleware(BodyLimit)
    app.add_middleware(RequestIds)
    for router in (endpoints.openai, endpoints.deltas, endpoints.operation, endpoints.health):
        app.include_router(router)
    return app


def _common_errors(_method: str, path: str, operation: Schema) -> Iterator[type[DeltadockError]]:
    """The errors that an operation may answer by what it requires and takes."""
    if path.startswith("/v1/"):
        yield Unauthorized
    if "requestBody" in operation:
        yield from (BadRequest, TooLarge)
    yield from (InvalidInput, DeltadockError, Unavailable)


class NodeServer(uvicorn.Server):
    """Registers the node once its socket listens, and drains it before the socket closes.

    uvicorn's lifespan events come too early and too late for that.
    """

    def __init__(self, app: FastAPI, host: str, port: int, url: str) -> None:
        config = uvicorn.Config(
            app, host=host, port=port, log_config=None, lifespan="on",
            timeout_keep_alive=KEEP_ALIVE_SECONDS,
        )  # fmt: skip
        super().__init__(config)
        self.node: InferenceNode = app.state.node
        self.url = url

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen, then register."""
        await super().startup(sockets)
        if self.started:
            self.node.register(self.url)

    async def on_tick(self, counter: int) -> bool:
        """Whether to stop: when asked to, or when the device is lost."""
        return await super().on_tick(counter) or self.node.device_lost

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Report that the node is stopping, then finish the running requests."""
        await self.node.announce_stop()
        await super().shutdown(sockets)


def serve(
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on.")] = 8100,
) -> None:
    """Run the node that the environment configures, until SIGTERM.

    Exits with status 1 if the device is lost, so that a supervisor starts it again.
    """
    settings = get_settings()
    configure_logging(settings, process="node")
    configure_tracing(settings, "node")
    logging.getLogger("httpx").setLevel(logging.WARNING)  # it logs every heartbeat
    reachable = socket.gethostname() if host in WILDCARD_HOSTS else host
    url = settings.node_url or f"http://{reachable}:{port}"
    server = NodeServer(create_app(settings), host, port, url)
    server.run()
    if server.node.device_lost:
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(serve)
