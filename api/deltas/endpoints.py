"""Routes of deltas."""

from typing import Annotated

from fastapi import APIRouter, Path, Query, Request, Response
from starlette.responses import StreamingResponse

from deltadock.api.access import CallerDep
from deltadock.api.deltas import service
from deltadock.api.deltas.download import ARTIFACT_RESPONSES, artifact_response
from deltadock.api.deltas.schemas import (
    DeltaAccepted,
    DeltaIn,
    DeltaOut,
    DeltaPage,
    ReportOut,
)
from deltadock.api.dependencies import ReadSession, ResourcesDep, WriteUnit
from deltadock.api.idempotency import OnceDep
from deltadock.api.jobs import describe_jobs
from deltadock.api.problems import problems
from deltadock.api.schemas import EXAMPLE_DELTA_ID
from deltadock.errors import (
    ArchitectureMismatch,
    BitsOutOfRange,
    IdempotencyKeyReused,
    InvalidGoal,
    InvalidInput,
    NotFound,
    NotReady,
    QuotaExceeded,
    RateLimited,
    UnchangedCheckpoint,
    UnknownMethod,
)

router = APIRouter(prefix="/v1/deltas", tags=["deltas"])


DeltaId = Annotated[str, Path(examples=[EXAMPLE_DELTA_ID])]


@router.post(
    "",
    status_code=202,
    responses={
        200: {"model": DeltaAccepted, "description": "The delta or its artifact exists already"},
        **problems(
            NotFound,
            InvalidInput,
            UnknownMethod,
            BitsOutOfRange,
            InvalidGoal,
            ArchitectureMismatch,
            UnchangedCheckpoint,
            IdempotencyKeyReused,
            QuotaExceeded,
            RateLimited,
        ),
    },
)
def create_delta(
    body: DeltaIn,
    caller: CallerDep,
    unit: WriteUnit,
    resources: ResourcesDep,
    once: OnceDep,
    response: Response,
) -> DeltaAccepted:
    """Compress a fine-tuned checkpoint; `Location` is the job."""

    def create() -> DeltaAccepted:
        delta, started = service.request_delta(unit, resources, caller.tenant_id, body)
        if not started:
            response.status_code = 200
        response.headers["Location"] = f"/v1/jobs/{delta.job.id}"
        (job,) = describe_jobs(unit.session, caller.tenant_id, [delta.job])
        return DeltaAccepted(delta=DeltaOut.of(delta), job=job)

    return once.answer(DeltaAccepted, body, response, create)


@router.get("", responses=problems(InvalidInput))
def list_deltas(
    caller: CallerDep,
    session: ReadSession,
    after: Annotated[str | None, Query(description="`next` of the previous page.")] = None,
    limit: Annotated[int, Query(ge=1, le=200)] = 50,
) -> DeltaPage:
    """List the deltas, newest first."""
    deltas, next_after = service.page_of_deltas(session, caller.tenant_id, limit=limit, after=after)
    return DeltaPage(data=[DeltaOut.of(delta) for delta in deltas], next=next_after)


@router.get("/{delta_id}", responses=problems(NotFound))
def get_delta(delta_id: DeltaId, caller: CallerDep, session: ReadSession) -> DeltaOut:
    """Get one delta."""
    return DeltaOut.of(service.require_delta(session, caller.tenant_id, delta_id))


@router.delete("/{delta_id}", status_code=204, responses=problems(NotFound))
def delete_delta(delta_id: DeltaId, caller: CallerDep, unit: WriteUnit) -> None:
    """Delete a delta. Its name and version are never reused; for some days it can be restored."""
    service.delete_delta(unit.session, caller.tenant_id, delta_id)


@router.post("/{delta_id}/restore", responses=problems(NotFound, QuotaExceeded))
def restore_delta(delta_id: DeltaId, caller: CallerDep, unit: WriteUnit) -> DeltaOut:
    """Restore a deleted delta, as long as its bytes are kept. Its job, if cancelled, can be
    retried.
    """
    return DeltaOut.of(service.restore_delta(unit.session, caller.tenant_id, delta_id))


@router.get("/{delta_id}/report", responses=problems(NotFound, NotReady))
def get_report(delta_id: DeltaId, caller: CallerDep, session: ReadSession) -> ReportOut:
    """Get the compression's measurements."""
    delta = service.require_delta(session, caller.tenant_id, delta_id)
    service.require_ready(delta)
    return ReportOut.model_validate(delta.report)


@router.get("/{delta_id}/artifact", response_class=StreamingResponse, responses=ARTIFACT_RESPONSES)
@router.head(
    "/{delta_id}/artifact",
    response_class=StreamingResponse,
    responses=problems(NotFound, NotReady),
    operation_id="head_artifact",
)
def download_artifact(
    delta_id: DeltaId,
    request: Request,
    caller: CallerDep,
    session: ReadSession,
    resources: ResourcesDep,
) -> Response:
    """Download the artifact; `ETag` is its SHA-256, and `Range` resumes a download.

    Where clients can reach the object store, the answer is a redirect to it, valid for minutes.
    """
    delta = service.require_delta(session, caller.tenant_id, delta_id)
    digest = service.require_ready(delta)
    return artifact_response(request, resources.blobs, digest, f"{delta.id}.delta")
