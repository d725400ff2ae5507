"""Pages from templates, for browsers that may load nothing but what this server holds."""

import hashlib
from collections.abc import Callable, Coroutine, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, Final

import structlog
from fastapi import Request
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from jinja2 import StrictUndefined
from starlette.responses import Response
from starlette.staticfiles import StaticFiles
from starlette.templating import Jinja2Templates

from deltadock.api.dashboard import charts, formats, service
from deltadock.errors import DeltadockError, InvalidInput
from deltadock.version import __version__

log = structlog.get_logger(__name__)

FOLDER: Final = Path(__file__).resolve().parent.parent
HEADERS: Final = {
    "Content-Security-Policy": (
        "default-src 'self'; base-uri 'none'; form-action 'self'; frame-ancestors 'none'; "
        "object-src 'none'"
    ),
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-store",
}

static_files = StaticFiles(directory=FOLDER / "static")


@lru_cache
def asset(name: str) -> str:
    """The address of a file in static/; it changes with the bytes, so that caches do no harm."""
    digest = hashlib.sha256((FOLDER / "static" / name).read_bytes()).hexdigest()
    return f"/static/{name}?v={digest[:12]}"


_templates: Final = Jinja2Templates(FOLDER / "templates")
_templates.env.undefined = StrictUndefined
_templates.env.trim_blocks = True
_templates.env.lstrip_blocks = True
_templates.env.globals |= {
    "asset": asset,
    "charts": charts,
    "stages": service.stages,
    "advice": service.advice,
    "version": __version__,
}
_templates.env.filters |= {
    name: getattr(formats, name)
    for name in ("size", "significant", "percentage", "plain", "grouped", "moment", "seconds")
}


def render(
    request: Request,
    template: str,
    context: Mapping[str, Any],
    *,
    status: int = 200,
    headers: Mapping[str, str] | None = None,
) -> Response:
    """A page, or a part of one."""
    return _templates.TemplateResponse(
        request, template, dict(context), status, {**HEADERS, **(headers or {})}
    )


class PageRoute(APIRoute):
    """Answers errors with a page, since a person is looking."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """The usual handler, with our errors rendered."""
        handle = super().get_route_handler()

        async def handle_or_explain(request: Request) -> Response:
            try:
                return await handle(request)
            except DeltadockError as error:
                if error.status >= 500:
                    log.exception("page_failed", code=error.code)
                fault: DeltadockError = error
            except RequestValidationError:
                fault = InvalidInput("The address is not one of this dashboard's.")
            return render(request, "error.html", {"error": fault}, status=fault.status)

        return handle_or_explain
