"""Cancelled transfers of `AsyncClient` end: no thread goes on, and nothing more is sent."""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import anyio
import anyio.to_thread
import httpx
import pytest

from deltadock.client.asynchronous import AsyncClient
from deltadock.client.blocking import Client, ignore
from deltadock.client.stopping import Stop
from deltadock.client.uploads import Uploader
from deltadock.errors import Cancelled
from tests.client.support import Service, write_finetune

SECONDS = 20.0
"""Far less than the client waits for an answer."""


class SilentServer(ThreadingHTTPServer):
    """An api that takes uploads, but never answers one of the requests.

    Attributes:
        asked: the requests that came.
        reached, ended: that request came; the client has ended its connection.
    """

    def __init__(self, silent: str) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.silent = silent
        self.asked: list[str] = []
        self.reached, self.ended = threading.Event(), threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    """Answers every request as an upload that lacks its files."""

    server: SilentServer

    def respond(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        asked = f"{self.command} {self.path}"
        self.server.asked.append(asked)
        if asked.startswith(self.server.silent):
            self.server.reached.set()
            if not self.connection.recv(1):
                self.server.ended.set()
            return
        lacking = {"stored": False, "parts": None}
        files = json.loads(body)["files"] if self.command == "POST" else []
        answer: dict[str, Any] = {"id": "upl_1", "state": "open", "data": []}
        content = json.dumps(answer | {"files": [file | lacking for file in files]}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    do_GET = do_POST = do_PUT = respond  # noqa: N815 (http.server calls them)

    def log_message(self, *_: object) -> None:
        """Print nothing."""


@contextmanager
def silent_server(silent: str) -> Iterator[SilentServer]:
    with SilentServer(silent) as server:
        running = threading.Thread(target=server.serve_forever)
        running.start()
        try:
            yield server
        finally:
            server.shutdown()
            running.join()


@contextmanager
def no_thread_left() -> Iterator[None]:
    """Fails if what runs within it leaves a thread that would keep a program from ending."""
    before = set(threading.enumerate())
    yield
    for thread in set(threading.enumerate()) - before:
        if not thread.daemon:
            thread.join(SECONDS)
            assert not thread.is_alive(), thread.name


async def wait(event: threading.Event) -> None:
    assert await anyio.to_thread.run_sync(event.wait, SECONDS)


@pytest.mark.parametrize(
    ("method", "silent"),
    [
        ("download", "GET /v1/deltas/"),
        ("upload_calibration", "GET /v1/uploads"),
        ("upload_calibration", "POST /v1/uploads"),
        ("upload_calibration", "PUT /v1/uploads/upl_1/files/"),
    ],
)
def test_a_cancelled_transfer_waits_for_no_answer(method: str, silent: str, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("hello " * 100)
    arguments = ["maths/skills", text] if method == "download" else [text]

    async def cancel(server: SilentServer) -> None:
        async with AsyncClient(server.url, "ddk_x") as client:
            async with anyio.create_task_group() as group:
                group.start_soon(getattr(client, method), *arguments)
                await wait(server.reached)
                group.cancel_scope.cancel()
            await wait(server.ended)  # though the client is open

    with silent_server(silent) as server:
        with no_thread_left():
            anyio.run(cancel, server)
        assert server.asked[-1].startswith(silent)


def test_closing_the_client_ends_its_transfers(tmp_path: Path) -> None:
    async def close(server: SilentServer) -> None:
        client = AsyncClient(server.url, "ddk_x")

        async def download() -> None:
            with pytest.raises(Cancelled):
                await client.download("maths/skills", tmp_path / "skills.delta")

        async with anyio.create_task_group() as group:
            group.start_soon(download)
            await wait(server.reached)
            await client.close()
        with pytest.raises(Cancelled, match="closed"):
            await client.download("maths/skills", tmp_path / "skills.delta")

    with silent_server("GET /v1/deltas/") as server, no_thread_left():
        anyio.run(close, server)


def test_a_cancelled_push_creates_nothing_and_can_be_continued(
    service: Service, client: Client, tmp_path: Path
) -> None:
    finetune = write_finetune(tmp_path / "finetuned", seed=77)
    sent, go_on = threading.Event(), threading.Event()

    def pause(*_: object) -> None:
        sent.set()
        assert go_on.wait(SECONDS)

    def pushed() -> list[str]:
        return [delta.name for delta in client.deltas() if delta.name == "maths/abandoned"]

    async def cancel(asynchronous: AsyncClient) -> None:
        async with anyio.create_task_group() as group:
            group.start_soon(
                lambda: asynchronous.push(
                    finetune, "maths/abandoned", "tiny", method="bitdelta", progress=pause
                )
            )
            await wait(sent)
            group.cancel_scope.cancel()
        go_on.set()

    async def push_again() -> None:
        async with AsyncClient(service.url, service.key) as asynchronous:
            await asynchronous.push(finetune, "maths/abandoned", "tiny", method="bitdelta")

    async def push() -> None:
        async with AsyncClient(service.url, service.key) as asynchronous:
            await cancel(asynchronous)

    with no_thread_left():
        anyio.run(push)
    assert pushed() == []
    anyio.run(push_again)
    assert pushed() == ["maths/abandoned"]


def test_hashing_ends_with_the_upload(tmp_path: Path) -> None:
    def request(*asked: object, **_: object) -> Any:
        raise AssertionError(asked)

    (tmp_path / "model.safetensors").write_bytes(b"x")
    stop = Stop()
    stop.set()
    with pytest.raises(Cancelled):
        Uploader(request, request, tmp_path, ignore, stop).upload(
            "checkpoint", ["model.safetensors"]
        )


def test_a_stopped_client_sends_nothing() -> None:
    stop = Stop()
    stop.set()
    with httpx.Client(event_hooks=stop.hooks) as http, pytest.raises(Cancelled):
        http.get("http://127.0.0.1:1")


def test_a_connection_that_is_being_made_is_ended_too() -> None:
    stop = Stop()
    hooks = {"request": [*stop.hooks["request"], lambda _: stop.set()]}
    with (
        silent_server("GET") as server,
        httpx.Client(event_hooks=hooks, timeout=SECONDS) as http,
        pytest.raises(httpx.RequestError) as ended,
    ):
        http.get(server.url)
    assert not isinstance(ended.value, httpx.TimeoutException)


def test_a_pause_ends_at_once() -> None:
    stop = Stop()
    threading.Timer(0.01, stop.set).start()
    with pytest.raises(Cancelled):
        stop.sleep(1e6)
