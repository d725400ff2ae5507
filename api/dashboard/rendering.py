"""Rendering of pages: templates, headers, and routes that answer errors with pages.

The pages load only files of this server.
"""

import hashlib
import re
from collections.abc import Callable, Coroutine, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, Final

from fastapi import APIRouter, Request
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from jinja2 import StrictUndefined
from starlette.responses import HTMLResponse, Response
from starlette.staticfiles import StaticFiles
from starlette.templating import Jinja2Templates

from deltadock import words
from deltadock.api.access import Caller
from deltadock.api.dashboard import charts
from deltadock.api.dashboard.markdown import markdown
from deltadock.api.dashboard.snippets import prompts
from deltadock.artifacts.checkpoint import KNOWN_SUFFIXES
from deltadock.errors import DeltadockError, InvalidInput
from deltadock.problems import log_failure
from deltadock.storage.tables import Scope
from deltadock.version import __version__

FOLDER: Final = Path(__file__).resolve().parent.parent
POLICY: Final = (
    "default-src 'self'; base-uri 'none'; form-action 'self'; frame-ancestors 'none'; "
    "object-src 'none'"
)
INLINE_IMAGES: Final = {"Content-Security-Policy": f"{POLICY}; img-src 'self' data:"}
"""For Swagger UI, whose style sheet holds its icons."""
HEADERS: Final = {
    "Content-Security-Policy": POLICY,
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-store",
}

static_files = StaticFiles(directory=FOLDER / "static")


@lru_cache
def asset(name: str) -> str:
    """The URL of a file in static/, with its digest as a cache buster."""
    digest = hashlib.sha256((FOLDER / "static" / name).read_bytes()).hexdigest()
    return f"/static/{name}?v={digest[:12]}"


_templates: Final = Jinja2Templates(FOLDER / "templates")
_templates.env.undefined = StrictUndefined
_templates.env.auto_reload = False  # it would look at the file of each include, in every row
_templates.env.trim_blocks = True
_templates.env.lstrip_blocks = True
_templates.env.globals |= {
    "asset": asset,
    "charts": charts,
    "prompts": prompts,
    "suffixes": sorted(KNOWN_SUFFIXES),
    "version": __version__,
}
_templates.env.filters |= {
    name: getattr(words, name)
    for name in (
        "ago", "budget", "counted", "duration", "grouped", "latency", "moment", "percentage",
        "plain", "progress", "ratio", "significant", "size",
    )
} | {"markdown": markdown}  # fmt: skip

PAGES: Final = {
    "bases": "/bases", "deltas": "/", "jobs": "/jobs", "keys": "/keys", "models": "/",
    "nodes": "/nodes", "registry": "/",
}  # fmt: skip
"""Pages that show what these routes of the api do, which its messages name; app.js knows them."""
_ROUTE: Final = re.compile(rf"GET /v1/({'|'.join(PAGES)})(?!\w)(?:[/?][\w?=&%/-]*)?")


def render(
    request: Request,
    template: str,
    context: Mapping[str, Any],
    *,
    status: int = 200,
    headers: Mapping[str, str] | None = None,
) -> Response:
    """Render a page or a part of one; it knows what the caller's key may do."""
    caller: Caller | None = getattr(request.state, "caller", None)
    scopes = frozenset[Scope]() if caller is None else caller.scopes
    rights = {"may_write": Scope.WRITE in scopes, "may_ask": Scope.INFER in scopes}
    return _templates.TemplateResponse(
        request, template, {**rights, **context}, status, {**HEADERS, **(headers or {})}
    )


def error_page(request: Request, error: DeltadockError) -> Response:
    """What went wrong, as a page, with links where the message names routes of the api."""
    return render(
        request, "error.html", {"error": error, "parts": in_pages(error.message)},
        status=error.status,
    )  # fmt: skip


def in_pages(message: str) -> list[tuple[str, str | None]]:
    """The message's parts, each with the path of the page that it stands for, if any."""
    parts: list[tuple[str, str | None]] = []
    end = 0
    for found in _ROUTE.finditer(message):
        path = PAGES[found[1]]
        name = "Deltas" if path == "/" else path[1:].capitalize()
        parts += [(message[end : found.start()], None), (name, path)]
        end = found.end()
    return [*parts, (message[end:], None)]


class PageRoute(APIRoute):
    """Answers errors with an HTML page."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """The default handler, with errors rendered."""
        handle = super().get_route_handler()

        async def handle_or_render_error(request: Request) -> Response:
            try:
                return await handle(request)
            except DeltadockError as error:
                log_failure(error, error)
                shown: DeltadockError = error
            except RequestValidationError:
                shown = InvalidInput("This is not a page of the dashboard.")
            return error_page(request, shown)

        return handle_or_render_error


def page_router() -> APIRouter:
    """A router of pages, which the description of the api leaves out.

    They ignore unknown query parameters, as whatever adds its own to links expects.
    """
    return APIRouter(
        include_in_schema=False, route_class=PageRoute, default_response_class=HTMLResponse
    )
