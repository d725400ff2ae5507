"""The node's process: its HTTP face, its registration with the api, its orderly end.

Run it with `deltadock node`, or `python -m deltadock.inference.server`.
"""

import argparse
import logging
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Final

import uvicorn
from fastapi import FastAPI

from deltadock.inference.http import endpoints, operators
from deltadock.inference.http.collector import NodeCollector
from deltadock.inference.http.problems import install_error_handlers
from deltadock.inference.node import Node
from deltadock.logs import configure_logging
from deltadock.settings import Settings, get_settings
from deltadock.storage.blobs import BlobStore, make_blob_store
from deltadock.version import __version__

EVERY_ADDRESS: Final = ("0.0.0.0", "::")


def create_app(settings: Settings | None = None, blobs: BlobStore | None = None) -> FastAPI:
    """The node as an ASGI application; by default with the process's settings and their blobs."""
    settings = settings or get_settings()
    node = Node(settings, blobs or make_blob_store(settings))
    node.metrics.watch(NodeCollector(node))

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        await node.start()
        yield
        await node.stop()

    app = FastAPI(title="Deltadock inference node", version=__version__, lifespan=lifespan)
    app.state.node = node
    install_error_handlers(app, node.metrics)
    for router in (endpoints.openai, operators.router, endpoints.health):
        app.include_router(router)
    return app


class NodeServer(uvicorn.Server):
    """Serves a node: registers it once it listens, and drains it before it stops."""

    def __init__(self, app: FastAPI, host: str, port: int, url: str) -> None:
        super().__init__(uvicorn.Config(app, host=host, port=port, log_config=None, lifespan="on"))
        self.node: Node = app.state.node
        self.url = url

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen; only then may anybody be sent here."""
        await super().startup(sockets)
        if self.started:
            self.node.register(self.url)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Say that nobody is to come any more, and finish what runs."""
        await self.node.drain()
        await super().shutdown(sockets)


def serve(settings: Settings, host: str, port: int) -> None:
    """Run a node until SIGTERM; running requests are finished first."""
    configure_logging(settings, process="node")
    logging.getLogger("httpx").setLevel(logging.WARNING)  # every heartbeat
    reached = socket.gethostname() if host in EVERY_ADDRESS else host
    url = settings.node_url or f"http://{reached}:{port}"
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
