"""Pages of the dashboard, and the parts of them that htmx refreshes.

The pages load only files of this server.
"""

import hashlib
from collections.abc import Callable, Coroutine, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, Final

import structlog
from fastapi import APIRouter, Depends, Request
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from jinja2 import StrictUndefined
from sqlalchemy.orm import Session
from starlette.responses import HTMLResponse, Response
from starlette.staticfiles import StaticFiles
from starlette.templating import Jinja2Templates

from deltadock.api.access import Caller, CallerDep
from deltadock.api.dashboard import charts, formats, views
from deltadock.api.deltas.endpoints import SortBy, wanted_deltas
from deltadock.api.dependencies import ReadSession, Resources, ResourcesDep
from deltadock.api.nodes import registered_nodes
from deltadock.api.paging import After
from deltadock.api.references import DeltaReference
from deltadock.compression.options import METHODS
from deltadock.errors import DeltadockError, InvalidInput, NotFound
from deltadock.storage.collection import UsageByKind
from deltadock.storage.models import JobState
from deltadock.storage.repositories.listing import DeltaFilter, DeltaSort
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
    """The URL of a file in static/, with its digest as a cache buster."""
    digest = hashlib.sha256((FOLDER / "static" / name).read_bytes()).hexdigest()
    return f"/static/{name}?v={digest[:12]}"


_templates: Final = Jinja2Templates(FOLDER / "templates")
_templates.env.undefined = StrictUndefined
_templates.env.trim_blocks = True
_templates.env.lstrip_blocks = True
_templates.env.globals |= {
    "asset": asset,
    "charts": charts,
    "stages": views.stages,
    "advice": views.advice,
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
    """Render a page or a part of one."""
    return _templates.TemplateResponse(
        request, template, dict(context), status, {**HEADERS, **(headers or {})}
    )


class PageRoute(APIRoute):
    """Answers errors with an HTML page."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """The default handler, with errors rendered."""
        handle = super().get_route_handler()

        async def handle_or_render_error(request: Request) -> Response:
            try:
                return await handle(request)
            except DeltadockError as error:
                if error.status >= 500:
                    log.exception("page_failed", code=error.code)
                shown: DeltadockError = error
            except RequestValidationError:
                shown = InvalidInput("This is not a page of the dashboard.")
            return render(request, "error.html", {"error": shown}, status=shown.status)

        return handle_or_render_error


router = APIRouter(
    include_in_schema=False, route_class=PageRoute, default_response_class=HTMLResponse
)

DELTAS_PER_NODE: Final = 50
"""Shown on the nodes page, fastest tier first."""
REFRESH: Final = {"HX-Refresh": "true"}
REMOVE: Final = {"HX-Reswap": "delete"}
ENDED: Final = {"HX-Trigger": "job-ended"}


@router.get("/")
def show_deltas(
    request: Request,
    caller: CallerDep,
    session: ReadSession,
    resources: ResourcesDep,
    wanted: Annotated[DeltaFilter, Depends(wanted_deltas)],
    sort: SortBy = DeltaSort.NEWEST,
    after: After = None,
) -> Response:
    """The list of stored deltas and bases."""
    overview = views.overview(session, caller.tenant_id, after=after, wanted=wanted, sort=sort)
    asked = [(name, value) for name, value in request.query_params.items() if name != "after"]
    context = {
        "usage": _usage(caller, resources),
        "overview": overview,
        "after": after,
        "asked": {name: value for name, value in asked if value},
        "states": list(JobState),
        "methods": list(METHODS),
        "sorts": list(DeltaSort),
    }
    return render(request, "deltas.html", context)


@router.get("/parts/totals")
def show_totals(
    request: Request, caller: CallerDep, session: ReadSession, resources: ResourcesDep
) -> Response:
    """The totals, refreshed when a job ends."""
    totals = views.totals(session, caller.tenant_id)
    context = {"totals": totals, "usage": _usage(caller, resources)}
    return render(request, "parts/totals.html", context)


def _usage(caller: Caller, resources: Resources) -> UsageByKind | None:
    """What the blob store holds, of all tenants; for the operator's tenant."""
    return resources.storage.usage() if caller.is_operator else None


@router.get("/parts/deltas/{delta_id:prefix}/row")
def show_row(
    delta_id: DeltaReference, request: Request, caller: CallerDep, session: ReadSession
) -> Response:
    """A row of the list, refreshed while its job runs."""
    try:
        entry = views.entry(session, caller.tenant_id, delta_id)
    except NotFound:
        return HTMLResponse(headers=HEADERS | REMOVE)
    headers = ENDED if entry.job.state.is_final else None
    return render(request, "parts/row.html", {"entry": entry}, headers=headers)


@router.get("/parts/deltas/{delta_id:prefix}/job")
def show_job(
    delta_id: DeltaReference, request: Request, caller: CallerDep, session: ReadSession
) -> Response:
    """The job on a delta's page; reloads the page when it has ended."""
    try:
        entry = views.entry(session, caller.tenant_id, delta_id)
    except NotFound:
        return HTMLResponse(headers=HEADERS | REFRESH)
    if entry.job.state.is_final:
        return HTMLResponse(headers=HEADERS | REFRESH)
    return render(request, "parts/job.html", {"entry": entry})


@router.get("/nodes")
def show_nodes(request: Request, caller: CallerDep, session: ReadSession) -> Response:
    """The inference nodes and the deltas they hold."""
    return render(request, "nodes.html", _nodes(session, caller))


@router.get("/parts/nodes")
def refresh_nodes(request: Request, caller: CallerDep, session: ReadSession) -> Response:
    """The nodes without the surrounding page."""
    return render(request, "parts/nodes.html", _nodes(session, caller))


def _nodes(session: Session, caller: Caller) -> dict[str, Any]:
    return {"nodes": registered_nodes(session, caller).data, "shown": DELTAS_PER_NODE}


@router.get("/deltas/{delta_id:reference}")
def show_delta(
    delta_id: DeltaReference, request: Request, caller: CallerDep, session: ReadSession
) -> Response:
    """One delta's page."""
    page = views.delta_view(session, caller.tenant_id, delta_id)
    return render(request, "delta.html", {"page": page})
