"""Middleware: the access log, unexpected errors."""

import time
from collections.abc import Callable
from typing import Final

import structlog
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from deltadock.errors import DeltadockError
from deltadock.problems import error_response

access_log = structlog.get_logger("deltadock.api.access")
log = structlog.get_logger(__name__)

_QUIET_PATHS: Final = ("/healthz", "/readyz", "/metrics", "/parts/", "/static/", "/v1/nodes/")
"""Probes, heartbeats and the dashboard's polling: logged at debug level."""


class RequestLog:
    """Logs and counts each request; what it raises unexpectedly is an error with its id."""

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
        state = scope["state"]
        status = 0
        started = time.perf_counter()

        async def send_and_note(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self.app(scope, receive, send_and_note)
        except Exception:
            log.exception("unexpected_error")
            if status:  # the response has started: only closing the connection signals it
                raise
            error = DeltadockError(
                f"An unexpected error occurred; it is logged under {state['request_id']}."
            )
            response = error_response(scope["path"], error)
            await response(scope, receive, send_and_note)
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
