"""Pages of the dashboard, and the parts of them that refresh themselves."""

from typing import Annotated, Any, Final

from fastapi import APIRouter, Query, Request
from sqlalchemy.orm import Session
from starlette.responses import HTMLResponse, Response

from deltadock.api.dashboard import service
from deltadock.api.dashboard.pages import HEADERS, PageRoute, render
from deltadock.api.deltas.endpoints import DeltaId
from deltadock.api.dependencies import ReadSession
from deltadock.api.nodes.service import list_nodes
from deltadock.errors import NotFound

router = APIRouter(
    include_in_schema=False, route_class=PageRoute, default_response_class=HTMLResponse
)

SHOWN_DELTAS: Final = 50
"""Of a node; the fastest tiers come first."""
REFRESH: Final = {"HX-Refresh": "true"}
REMOVE: Final = {"HX-Reswap": "delete"}
ENDED: Final = {"HX-Trigger": "job-ended"}


@router.get("/")
def show_deltas(
    request: Request, session: ReadSession, after: Annotated[str | None, Query()] = None
) -> Response:
    """The stored deltas and bases."""
    context = {"overview": service.overview(session, after), "after": after}
    return render(request, "deltas.html", context)


@router.get("/parts/totals")
def show_totals(request: Request, session: ReadSession) -> Response:
    """The line of totals, once a job has ended."""
    return render(request, "parts/totals.html", {"totals": service.totals(session)})


@router.get("/parts/deltas/{delta_id}/row")
def show_row(delta_id: DeltaId, request: Request, session: ReadSession) -> Response:
    """A line of the list while its job runs."""
    try:
        entry = service.entry(session, delta_id)
    except NotFound:
        return HTMLResponse(headers=HEADERS | REMOVE)
    headers = ENDED if entry.job.state.is_final else None
    return render(request, "parts/row.html", {"entry": entry}, headers=headers)


@router.get("/parts/deltas/{delta_id}/job")
def show_job(delta_id: DeltaId, request: Request, session: ReadSession) -> Response:
    """The job on a delta's page while it runs; at its end the whole page is loaded again."""
    try:
        entry = service.entry(session, delta_id)
    except NotFound:
        return HTMLResponse(headers=HEADERS | REFRESH)
    if entry.job.state.is_final:
        return HTMLResponse(headers=HEADERS | REFRESH)
    return render(request, "parts/job.html", {"entry": entry})


@router.get("/nodes")
def show_nodes(request: Request, session: ReadSession) -> Response:
    """The inference nodes, and what they hold."""
    return render(request, "nodes.html", _nodes(session))


@router.get("/parts/nodes")
def refresh_nodes(request: Request, session: ReadSession) -> Response:
    """The same without the page around it."""
    return render(request, "parts/nodes.html", _nodes(session))


def _nodes(session: Session) -> dict[str, Any]:
    return {"nodes": list_nodes(session).data, "shown": SHOWN_DELTAS}


@router.get("/deltas/{delta_id}")
def show_delta(delta_id: DeltaId, request: Request, session: ReadSession) -> Response:
    """One delta."""
    return render(request, "delta.html", {"page": service.delta_page(session, delta_id)})
