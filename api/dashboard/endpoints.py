"""Pages of deltas and models, and the parts of them that htmx refreshes."""

from typing import Annotated, Any, Final

from fastapi import Depends, Query, Request
from starlette.responses import HTMLResponse, RedirectResponse, Response

from deltadock.api.access import Caller, CallerDep
from deltadock.api.bases import page_of_bases
from deltadock.api.dashboard import snippets, views
from deltadock.api.dashboard.rendering import HEADERS, page_router, render
from deltadock.api.deltas import lookup
from deltadock.api.deltas.endpoints import SortBy, wanted_deltas
from deltadock.api.dependencies import ReadSession, Resources, ResourcesDep
from deltadock.api.paging import After
from deltadock.api.references import DeltaReference
from deltadock.api.registry.endpoints import Name
from deltadock.compression.options import METHODS, default_method
from deltadock.errors import InvalidInput, NotFound, NotReady
from deltadock.model_target import SERVED
from deltadock.storage.api_keys import local_key_path
from deltadock.storage.repositories import BaseRepository, DeltaRepository, ModelRepository
from deltadock.storage.repositories.deltas import Sibling
from deltadock.storage.repositories.listing import DeltaFilter, DeltaSort
from deltadock.storage.tables import JobState, Scope
from deltadock.storage.usage import UsageByKind

router = page_router()

MEASURE_SECONDS: Final = 0.02
"""A page does not wait longer for a listing of the store, but shows the one before."""
REFRESH: Final = {"HX-Refresh": "true"}
REMOVE: Final = {"HX-Reswap": "delete"}
ENDED: Final = {"HX-Trigger": "job-ended"}
MOST_COMPARED: Final = 4
MOST_TRIED: Final = 5
"""Models side by side: a base, its fine-tune and three deltas."""
CHOICES: Final = 200
"""Bases and models that a form offers."""


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
    """The list of stored deltas, by model."""
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
        "grouped": sort in {DeltaSort.NEWEST, DeltaSort.NAME},
        "default_method": default_method(),
        "bases": page_of_bases(session, caller.tenant_id, limit=CHOICES, after=None).data,
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
    return resources.storage.usage_within(MEASURE_SECONDS) if caller.is_operator else None


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
    """The job on a delta's page; reloads the page when it has ended or the delta was deleted."""
    try:
        entry = views.entry(session, caller.tenant_id, delta_id)
    except NotFound:
        return HTMLResponse(headers=HEADERS | REFRESH)
    if entry.job.state.is_final:
        return HTMLResponse(headers=HEADERS | REFRESH)
    return render(request, "parts/job.html", {"entry": entry, "stages": views.stages})


@router.get("/deltas/{delta_id:reference}")
def show_delta(
    delta_id: DeltaReference,
    request: Request,
    caller: CallerDep,
    session: ReadSession,
    resources: ResourcesDep,
) -> Response:
    """One delta's page; that of a model's newest version if none is ready."""
    try:
        page = views.delta_view(session, caller.tenant_id, delta_id)
    except NotReady as error:
        return RedirectResponse(f"/deltas/{error.details['newest']}", 303, HEADERS)
    makes_keys = Scope.ADMIN in caller.scopes
    kept = local_key_path(resources.settings.home.absolute())
    key_file = kept if makes_keys and caller.is_operator and kept.is_file() else None
    url = str(request.base_url).rstrip("/")
    context = {
        "page": page,
        "advice": views.advice,
        "stages": views.stages,
        "makes_keys": makes_keys,
        "key_file": key_file,
        "environment": snippets.environment(url, key_file),
        "examples": snippets.loading(page.entry.reference)
        if page.not_served
        else snippets.examples(
            page.entry.reference, page.tried[-1].checkpoints, chats=page.tried[-1].chats or False
        ),
    }
    return render(request, "delta.html", context)


@router.get("/models/{project}/{model}")
def show_model(
    name: Name, request: Request, caller: CallerDep, session: ReadSession, after: After = None
) -> Response:
    """One model's page: its card, aliases, rule, versions and history."""
    page = views.model_view(session, caller.tenant_id, name, after=after)
    return render(request, "model.html", {"page": page, "after": after})


@router.get("/compare")
def compare_deltas(
    request: Request,
    caller: CallerDep,
    session: ReadSession,
    delta: Annotated[list[str], Query(max_length=20)] = [],  # noqa: B006
) -> Response:
    """Two to four deltas side by side, or the form that chooses them."""
    references = [reference for reference in dict.fromkeys(delta) if reference]
    if len(references) > MOST_COMPARED:
        raise InvalidInput(f"Choose 2 to {MOST_COMPARED} deltas to compare.")
    if len(references) < 2:
        answering = ModelRepository(session, caller.tenant_id).answering(limit=CHOICES)
        choices = [model.name for model in answering]
        context = {"chosen": references, "choices": choices, "most": MOST_COMPARED}
        return render(request, "compare_choice.html", context)
    rows = [lookup.show_delta(session, caller.tenant_id, reference) for reference in references]
    entries = [views.DeltaEntry.of(row) for row in rows]
    deltas = DeltaRepository(session, caller.tenant_id)
    shown = {row.id: Sibling.of(row) for row in rows}
    for digest in dict.fromkeys(row.checkpoint_digest for row in rows):
        found = deltas.of_checkpoint(digest, limit=views.SIBLINGS_SHOWN)
        shown |= {sibling.id: sibling for sibling in found}
    context = {
        "entries": entries,
        "differences": views.differences(entries),
        "has_one_text": views.has_one_text(entries),
        "points": views.points_of(list(shown.values()), [row.id for row in rows]),
    }
    return render(request, "compare.html", context)


@router.get("/try")
def show_try(
    request: Request,
    caller: CallerDep,
    session: ReadSession,
    model: Annotated[list[str], Query(max_length=20)] = [],  # noqa: B006
) -> Response:
    """Models side by side on one prompt."""
    tenant, served = caller.tenant_id, SERVED
    answering = ModelRepository(session, tenant).answering(limit=CHOICES, model_types=served)
    found = BaseRepository(session, tenant).page(limit=CHOICES, model_types=served)
    bases = [base.name for base in found]
    # One without figures may lack a tokenizer, and then nobody can ask it.
    measured = ([one.base, one.name] for one in answering if one.kl is not None)
    first = next(measured, bases[:1])
    chosen = [name for name in dict.fromkeys(model) if name][:MOST_TRIED]
    context = {
        "tried": views.tried(session, caller.tenant_id, chosen or first),
        "choices": [*bases, *(delta.name for delta in answering)],
        "most": MOST_TRIED,
    }
    return render(request, "try.html", context)


@router.get("/new")
def show_new(
    request: Request,
    caller: CallerDep,
    session: ReadSession,
    base: Annotated[str | None, Query(max_length=96)] = None,
    name: Annotated[str | None, Query(max_length=200)] = None,
) -> Response:
    """The form that uploads a fine-tune and compresses it."""
    context: dict[str, Any] = {
        "bases": page_of_bases(session, caller.tenant_id, limit=CHOICES, after=None).data,
        "base": base,
        "name": name or "",
        "methods": [m for m in METHODS.values() if not m.imports_adapter],
        "default_method": default_method(),
    }
    return render(request, "new.html", context)
