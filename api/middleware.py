"""Middleware: request ids, the access log, unexpected errors."""

import re
import time
import uuid
from collections.abc import Callable
from typing import Final

import structlog
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from deltadock.errors import DeltadockError
from deltadock.problems import error_response

access_log = structlog.get_logger("deltadock.api.access")
log = structlog.get_logger(__name__)

REQUEST_ID: Final = "X-Request-ID"

_VALID_ID: Final = re.compile(r"[A-Za-z0-9._-]{1,64}")
_QUIET_PATHS: Final = ("/healthz", "/readyz", "/metrics", "/parts/", "/static/", "/v1/nodes/")
"""Probes, heartbeats and the dashboard's polling: logged at debug level."""


class RequestContext:
    """Sets each request's id (the client's, if it is valid) in logs and the response."""

    def __init__(
        self, app: ASGIApp, *, count: Callable[[str | None, str, int, str | None], None]
    ) -> None:
        """Call `count` after each request with its route, method, status and error code."""
        self.app = app
        self._count = count

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        client_id = Headers(scope=scope).get(REQUEST_ID, "")
        request_id = client_id if _VALID_ID.fullmatch(client_id) else uuid.uuid4().hex
        state = scope.setdefault("state", {})
        state["request_id"] = request_id
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
                if status:  # the response has started: only closing the connection signals it
                    raise
                error = DeltadockError(
                    f"An unexpected error occurred; it is logged under {request_id}."
                )
                response = error_response(scope["path"], error)
                await response(scope, receive, send_with_id)
            finally:
                self._count(state.get("route"), scope["method"], status, state.get("error_code"))
                level = "debug" if scope["path"].startswith(_QUIET_PATHS) else "info"
                getattr(access_log, level)(
                    "request",
                    method=scope["method"],
                    path=scope["path"],
                    status=status,
                    milliseconds=round((time.perf_counter() - started) * 1000, 1),
                    client=scope["client"][0] if scope.get("client") else None,
                )
