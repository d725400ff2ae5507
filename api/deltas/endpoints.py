"""Routes of deltas."""

from typing import Annotated, Final, Literal

import anyio
from fastapi import Depends, Query, Request, Response
from pydantic import BeforeValidator, Field
from starlette.concurrency import run_in_threadpool
from starlette.responses import StreamingResponse

from deltadock.api.access import CallerDep
from deltadock.api.bases import require_base
from deltadock.api.comparison import REFUSED_COMPARISONS
from deltadock.api.deltas import service
from deltadock.api.deltas.download import ARTIFACT_RESPONSES, artifact_response
from deltadock.api.deltas.lookup import require_ready, show_delta
from deltadock.api.deltas.schemas import (
    DeltaAccepted,
    DeltaDetail,
    DeltaIn,
    DeltaOut,
    DeltaPage,
    ReportOut,
)
from deltadock.api.dependencies import ReadSession, ResourcesDep, WriteUnit
from deltadock.api.idempotency import OnceDep
from deltadock.api.jobs import describe_jobs
from deltadock.api.paging import After, Limit
from deltadock.api.references import DeltaReference
from deltadock.api.routing import api_router
from deltadock.errors import (
    BitsOutOfRange,
    Conflict,
    IdempotencyKeyReused,
    InvalidGoal,
    InvalidInput,
    NotFound,
    NotReady,
    QuotaExceeded,
    RateLimited,
    UnknownMethod,
)
from deltadock.problems import problems
from deltadock.storage.repositories import DeltaRepository
from deltadock.storage.repositories.listing import DeltaFilter, DeltaSort
from deltadock.storage.tables import JobState

router = api_router("/v1/deltas", tags=["deltas"])


@router.post(
    "",
    status_code=202,
    responses={
        200: {"model": DeltaAccepted, "description": "The delta or its artifact exists already"},
        **problems(
            NotFound,
            Conflict,
            InvalidInput,
            UnknownMethod,
            BitsOutOfRange,
            InvalidGoal,
            IdempotencyKeyReused,
            QuotaExceeded,
            RateLimited,
            by_state=REFUSED_COMPARISONS,
        ),
    },
)
async def create_delta(
    body: DeltaIn,
    caller: CallerDep,
    unit: WriteUnit,
    resources: ResourcesDep,
    once: OnceDep,
    response: Response,
) -> DeltaAccepted:
    """Compress a fine-tuned checkpoint; `Location` is the job."""
    compared = await anyio.to_thread.run_sync(
        service.compare_delta, resources, caller, body, limiter=resources.comparing
    )

    def create() -> DeltaAccepted:
        delta, started = service.request_delta(unit, resources, caller, body, compared)
        if not started:
            response.status_code = 200
        response.headers["Location"] = f"/v1/jobs/{delta.job.id}"
        (job,) = describe_jobs(unit.session, caller.tenant_id, [delta.job])
        return DeltaAccepted(delta=service.detail_of(unit.session, delta), job=job)

    return await run_in_threadpool(once.answer, DeltaAccepted, body, response, create)


EMPTY_IS_ANY: Final = BeforeValidator(lambda value: value or None)
"""A form sends its empty fields too."""
SortBy = Annotated[
    DeltaSort,
    Query(
        description="`newest`, `name` (then version), `size` (largest first) or `kl` (lowest "
        "first); deltas without the figure are left out of the last two."
    ),
]


async def wanted_deltas(
    caller: CallerDep,
    resources: ResourcesDep,
    base: Annotated[str | None, EMPTY_IS_ANY, Query(description="A base's id or name.")] = None,
    method: Annotated[
        str | None, EMPTY_IS_ANY, Query(description="One of GET /v1/methods.")
    ] = None,
    state: Annotated[JobState | Literal[""] | None, EMPTY_IS_ANY, Query()] = None,
    owner: Annotated[
        str | None, EMPTY_IS_ANY, Query(description="The id of the API key that asked.")
    ] = None,
    name: Annotated[
        str | None, EMPTY_IS_ANY, Query(description="All versions of project/model.")
    ] = None,
    tag: Annotated[
        Annotated[str, Field(max_length=64)] | None,
        EMPTY_IS_ANY,
        Query(description="A tag of the model."),
    ] = None,
    text: Annotated[
        Annotated[str, Field(max_length=200)] | None,
        EMPTY_IS_ANY,
        Query(description="Words, or their beginnings, of the model's name or card."),
    ] = None,
) -> DeltaFilter:
    """The query parameters that choose deltas of a list."""

    def id_of(base: str) -> str:
        with resources.database.read_scope() as session:
            return require_base(session, caller.tenant_id, base).id

    return DeltaFilter(
        base_id=None if base is None else await run_in_threadpool(id_of, base),
        method=method,
        state=state or None,
        created_by=owner,
        name=name,
        tag=tag,
        text=text,
    )


@router.get("", responses=problems(InvalidInput, NotFound))
def list_deltas(
    caller: CallerDep,
    session: ReadSession,
    wanted: Annotated[DeltaFilter, Depends(wanted_deltas)],
    sort: SortBy = DeltaSort.NEWEST,
    after: After = None,
    limit: Limit = 50,
) -> DeltaPage:
    """List the deltas that meet all filters."""
    deltas, next_after = service.page_of_deltas(
        session, caller.tenant_id, limit=limit, after=after, wanted=wanted, sort=sort
    )
    return DeltaPage(data=[DeltaOut.of(delta) for delta in deltas], next=next_after)


@router.get("/{delta_id:reference}", responses=problems(NotFound))
def get_delta(delta_id: DeltaReference, caller: CallerDep, session: ReadSession) -> DeltaDetail:
    """Get one delta with its lineage."""
    return service.detail_of(session, show_delta(session, caller.tenant_id, delta_id))


@router.delete(
    "/{delta_id:reference}", status_code=204, responses=problems(NotFound, NotReady, Conflict)
)
def delete_delta(delta_id: DeltaReference, caller: CallerDep, unit: WriteUnit) -> None:
    """Delete a delta; a bare name deletes its default version. Its name and version are never
    reused; for some days it can be restored.
    """
    service.delete_delta(unit.session, caller, delta_id)


@router.post("/{delta_id:prefix}/restore", responses=problems(NotFound, QuotaExceeded))
def restore_delta(delta_id: DeltaReference, caller: CallerDep, unit: WriteUnit) -> DeltaDetail:
    """Restore a deleted delta, as long as its bytes are kept; of a bare name the version deleted
    last. Its job, if cancelled, can be retried.
    """
    restored = service.restore_delta(unit.session, caller.tenant_id, delta_id)
    return service.detail_of(unit.session, restored)


@router.get("/{delta_id:prefix}/report", responses=problems(NotFound, NotReady))
def get_report(delta_id: DeltaReference, caller: CallerDep, session: ReadSession) -> ReportOut:
    """Get the compression's measurements."""
    delta = show_delta(session, caller.tenant_id, delta_id)
    require_ready(delta)
    report = DeltaRepository(session, caller.tenant_id).report(delta.id)
    return ReportOut.model_validate(report)


@router.get(
    "/{delta_id:prefix}/artifact", response_class=StreamingResponse, responses=ARTIFACT_RESPONSES
)
@router.head(
    "/{delta_id:prefix}/artifact",
    response_class=StreamingResponse,
    responses=problems(NotFound, NotReady),
    operation_id="head_artifact",
)
def download_artifact(
    delta_id: DeltaReference,
    request: Request,
    caller: CallerDep,
    session: ReadSession,
    resources: ResourcesDep,
) -> Response:
    """Download the artifact; `ETag` is its SHA-256, and `Range` resumes a download.

    Where clients can reach the object store, the answer is a redirect to it, valid for minutes.
    """
    delta = show_delta(session, caller.tenant_id, delta_id)
    digest = require_ready(delta)
    return artifact_response(request, resources.blobs, digest, f"{delta.id}.delta")
