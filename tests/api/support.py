"""A running api and a stub node, both on real sockets."""

import hashlib
import json
import logging
import socket
import threading
import time
from collections.abc import AsyncIterator, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx
import numpy as np
import uvicorn
from safetensors.numpy import save
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp

from deltadock.api.dependencies import Resources
from deltadock.api.protocol import Protocol
from deltadock.settings import Settings
from deltadock.storage.api_keys import key_secret
from deltadock.storage.database import Database
from deltadock.storage.repositories import DeltaRepository, JobRepository, KeyRepository
from deltadock.storage.tables import JobState, Scope
from deltadock.storage.tenancy import EVERY_TENANT, LOCAL_TENANT

CONFIG = json.dumps({"model_type": "llama", "hidden_size": 8}).encode()
TEXT = "Täglich grüßt das Murmeltier.\n".encode() * 20


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def weights(seed: int = 0, rows: int = 8, **more: tuple[int, ...]) -> bytes:
    """A small safetensors file."""
    random = np.random.default_rng(seed)
    shapes = {"model.embed_tokens.weight": (rows, 8), "model.norm.weight": (8,), **more}
    return save({n: random.normal(size=s).astype(np.float32) for n, s in shapes.items()})


@contextmanager
def serving(app: ASGIApp) -> Iterator[str]:
    """The app behind uvicorn in a thread; yields its URL."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    listener = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(
        uvicorn.Config(
            app, http=Protocol, log_config=None, access_log=False, timeout_graceful_shutdown=1
        )
    )
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    # Starting configures the log's output. Within a subtest, whose captured output is closed at
    # its end, that output would be closed while requests still write to it.
    while not server.started and thread.is_alive():
        time.sleep(0.005)
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()
        listener.close()
        root.handlers[:] = handlers
        root.setLevel(level)


def issue_key(
    settings: Settings, *, tenant: str = LOCAL_TENANT, scopes: Iterable[Scope] = tuple(Scope)
) -> str:
    """A new API key of the tenant."""
    database = Database(settings.sqlalchemy_url)
    with database.session_scope() as session:
        _, key = KeyRepository(session, tenant).issue(
            key_secret(settings), name="tests", scopes=scopes
        )
    database.dispose()
    return key


def bearer(key: str) -> dict[str, str]:
    """The headers that carry the key."""
    return {"Authorization": f"Bearer {key}"}


@dataclass
class Api:
    """A running api: a client for it, and its resources for inspection."""

    client: httpx.Client
    resources: Resources

    @property
    def key(self) -> str:
        """The client's API key."""
        return self.client.headers["Authorization"].removeprefix("Bearer ")

    def staged(self) -> list[str]:
        """Staging files in the (local) blob store."""
        folder = self.resources.settings.blob_folder
        return [path.name for path in (folder / "staging").iterdir()]

    def blobs(self) -> set[str]:
        """Digests in the (local) blob store."""
        folder = self.resources.settings.blob_folder
        return {path.name for path in (folder / "blobs").iterdir()}

    def open_upload(self, kind: str = "checkpoint") -> str:
        answer = self.client.post("/v1/uploads", json={"kind": kind})
        assert answer.status_code == 201, answer.text
        upload_id: str = answer.json()["id"]
        return upload_id

    def put(self, upload: str, path: str, data: bytes, **headers: str) -> httpx.Response:
        return self.client.put(f"/v1/uploads/{upload}/files/{path}", content=data, headers=headers)

    def announce(self, files: dict[str, bytes], kind: str = "checkpoint") -> dict[str, Any]:
        """An open upload that announces these files."""
        announced = [
            {"path": path, "size": len(data), "sha256": sha256(data)}
            for path, data in files.items()
        ]
        answer = self.client.post("/v1/uploads", json={"kind": kind, "files": announced})
        assert answer.status_code == 201, answer.text
        upload: dict[str, Any] = answer.json()
        return upload

    def put_part(
        self, upload: str, path: str, number: int, data: bytes, **headers: str
    ) -> httpx.Response:
        url = f"/v1/uploads/{upload}/files/{path}/parts/{number}"
        return self.client.put(url, content=data, headers=headers)

    def upload(self, kind: str, files: dict[str, bytes]) -> dict[str, Any]:
        """A completed upload."""
        upload = self.open_upload(kind)
        for path, data in files.items():
            answer = self.put(upload, path, data)
            assert answer.status_code == 200, answer.text
        answer = self.client.post(f"/v1/uploads/{upload}/complete")
        assert answer.status_code == 200, answer.text
        done: dict[str, Any] = answer.json()
        return done

    def checkpoint(self, data: bytes) -> str:
        """Digest of a checkpoint with these weights."""
        files = {"config.json": CONFIG, "model.safetensors": data}
        digest: str = self.upload("checkpoint", files)["checkpoint"]["digest"]
        return digest

    def calibration(self, text: bytes = TEXT) -> str:
        digest: str = self.upload("calibration", {"text.txt": text})["calibration"]["digest"]
        return digest

    def base(self, name: str = "tiny", data: bytes | None = None) -> str:
        """A registered base's checkpoint digest."""
        digest = self.checkpoint(data or weights(0))
        answer = self.client.post("/v1/bases", json={"name": name, "checkpoint": digest})
        assert answer.status_code in {200, 201}, answer.text
        return digest

    def delta_body(self, seed: int = 1, name: str = "maths/skills", **more: Any) -> dict[str, Any]:
        """A valid request for a delta on the base `tiny`."""
        self.base()
        return {
            "name": name,
            "base": "tiny",
            "checkpoint": self.checkpoint(weights(seed)),
            "method": "adamix",
            "bits": 1.0,
            "calibration": {"source": "text", "digest": self.calibration()},
            **more,
        }

    def delta(self, **more: Any) -> dict[str, Any]:
        """A new delta with its job."""
        answer = self.client.post("/v1/deltas", json=self.delta_body(**more))
        assert answer.status_code == 202, answer.text
        delta: dict[str, Any] = answer.json()["delta"]
        return delta

    def register(self, url: str, node: str = "node_a", **fields: Any) -> None:
        """Register a node; also its heartbeat."""
        body = {
            "url": url, "adopts": True, "capacity": 8, "admitted": 0, "delta_slots": 4,
            "lives_seconds": 600, **fields,
        }  # fmt: skip
        answer = self.client.put(f"/v1/nodes/{node}", json=body)
        assert answer.status_code == 204, answer.text

    def make_ready(self, delta: dict[str, Any], artifact: bytes = b"artifact") -> str:
        """Finish the delta's job as a worker does; returns the artifact's digest."""
        digest = self.resources.blobs.put_bytes(artifact)
        with self.resources.database.session_scope() as session:
            jobs, deltas = (
                JobRepository(session, EVERY_TENANT),
                DeltaRepository(session, EVERY_TENANT),
            )
            row = deltas.find(delta["id"])
            assert row is not None
            deltas.set_result(
                row,
                artifact_digest=digest,
                artifact_bytes=len(artifact),
                report={
                    "method": "adamix",
                    "kl": 0.01,
                    "agreement": 0.98,
                    "ratio": 12.5,
                    "matrices": [{"name": "q"}],
                    "notes": ["It has no tokenizer."],
                },
            )
            assert jobs.acquire(delta["job"], "worker", 60)
            assert jobs.finish(delta["job"], "worker", JobState.READY)
        return digest


@dataclass
class StandInNode:
    """Speaks the node's protocol and records requests; `answer` may be replaced."""

    requests: list[dict[str, Any]] = field(default_factory=list)
    answer: Response | None = None
    gate: threading.Event | None = None
    gone: threading.Event = field(default_factory=threading.Event)

    def app(self) -> ASGIApp:
        routes = [
            Route("/v1/completions", self._complete, methods=["POST"]),
            Route("/v1/chat/completions", self._complete, methods=["POST"]),
            Route("/v1/responses", self._complete, methods=["POST"]),
            Route("/v1/generations/{name}", self._end, methods=["DELETE"]),
            Route("/v1/{what:path}", self._obey, methods=["POST"]),
        ]
        return Starlette(routes=routes)

    async def _obey(self, request: Request) -> Response:
        """Routes for operators; `answer` is a refusal."""
        self.requests.append({"path": request.url.path, "headers": dict(request.headers)})
        return self.answer or Response(status_code=204)

    async def _end(self, request: Request) -> Response:
        """End a request that it has begun to answer, after four tokens."""
        name = request.path_params["name"]
        if all(asked["headers"].get("deltadock-generation") != name for asked in self.requests):
            return Response(status_code=404)
        usage = {"prompt_tokens": 5, "completion_tokens": 4, "total_tokens": 9}
        return JSONResponse(usage)

    async def _complete(self, request: Request) -> Response:
        body = await request.json()
        self.requests.append(
            {"path": request.url.path, "headers": dict(request.headers), "body": body}
        )
        if self.gate is not None:
            self.gate.set()
            while (await request.receive())["type"] != "http.disconnect":
                pass
            self.gone.set()
        if self.answer is not None:
            return self.answer
        if body.get("stream"):
            return StreamingResponse(self._events(body), media_type="text/event-stream")
        return JSONResponse(
            {
                "id": "cmpl-1",
                "object": "text_completion",
                "created": 1,
                "model": body["model"],
                "choices": [{"index": 0, "text": " 42", "finish_reason": "stop", "logprobs": None}],
                "usage": {"prompt_tokens": 5, "completion_tokens": 3, "total_tokens": 8},
            }
        )

    async def _events(self, body: dict[str, Any]) -> AsyncIterator[bytes]:
        for text in (" 4", "2"):
            choice = {"index": 0, "text": text, "finish_reason": None}
            chunk = {
                "id": "cmpl-1",
                "object": "text_completion",
                "created": 1,
                "model": "x",
                "choices": [choice],
            }
            yield f"data: {json.dumps(chunk)}\n\n".encode()
        if (body.get("stream_options") or {}).get("include_usage"):
            usage = {"prompt_tokens": 5, "completion_tokens": 3, "total_tokens": 8}
            yield f"data: {json.dumps({'choices': [], 'usage': usage})}\n\n".encode()
        yield b"data: [DONE]\n\n"
