"""Around every request: its id, its access log line, a bound on JSON bodies, the last resort."""

import re
import time
import uuid
from typing import Final

import structlog
from fastapi import HTTPException
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from deltadock.api.problems import error_response
from deltadock.errors import DeltadockError

access_log = structlog.get_logger("deltadock.api.access")
log = structlog.get_logger(__name__)

REQUEST_ID: Final = "X-Request-ID"
MAX_BODY_BYTES: Final = 8 << 20
"""For bodies that are read whole, which is all but uploaded files."""

_PLAIN_ID: Final = re.compile(r"[A-Za-z0-9._-]{1,64}")
_QUIET_PATHS: Final = ("/healthz", "/readyz", "/metrics", "/parts/", "/static/", "/v1/nodes/")
"""Probes, heartbeats, and what an open dashboard asks for every second."""


class RequestContext:
    """Gives each request an id (the client's, if it is a plain one) that logs and answers carry."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        announced = Headers(scope=scope).get(REQUEST_ID, "")
        request_id = announced if _PLAIN_ID.fullmatch(announced) else uuid.uuid4().hex
        scope.setdefault("state", {})["request_id"] = request_id
        status = 0
        started = time.perf_counter()

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)[REQUEST_ID] = request_id
            await send(message)

        with structlog.contextvars.bound_contextvars(request_id=request_id):
            try:
                await self.app(scope, receive, send_with_id)
            except Exception:
                log.exception("unexpected_error")
                if status:  # half an answer is out: only a broken connection tells the client
                    raise
                response = error_response(
                    scope["path"],
                    DeltadockError.status,
                    DeltadockError.code,
                    f"Something unexpected happened; the logs have it under {request_id}.",
                )
                await response(scope, receive, send_with_id)
            finally:
                level = "debug" if scope["path"].startswith(_QUIET_PATHS) else "info"
                getattr(access_log, level)(
                    "request",
                    method=scope["method"],
                    path=scope["path"],
                    status=status,
                    milliseconds=round((time.perf_counter() - started) * 1000, 1),
                    client=scope["client"][0] if scope.get("client") else None,
                )


class BodyLimit:
    """Refuses bodies over `MAX_BODY_BYTES`, except files (PUT), which stream under their own."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] == "PUT":
            await self.app(scope, receive, send)
            return
        received = 0

        async def bounded_receive() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > MAX_BODY_BYTES:
                # FastAPI lets this kind of error through from where it reads the body.
                raise HTTPException(413, f"The body is larger than {MAX_BODY_BYTES} bytes.")
            return message

        await self.app(scope, bounded_receive, send)
