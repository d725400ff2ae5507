"""Routes of deltas."""

import base64
from typing import Annotated, Any, Final

from fastapi import APIRouter, Path, Query, Request, Response
from starlette.responses import StreamingResponse

from deltadock.api.deltas import service
from deltadock.api.deltas.ranges import ByteRange, is_unchanged, requested_range
from deltadock.api.deltas.schemas import (
    EXAMPLE_DELTA_ID,
    DeltaAccepted,
    DeltaIn,
    DeltaOut,
    DeltaPage,
    ReportOut,
)
from deltadock.api.dependencies import ReadSession, ResourcesDep, WriteUnit
from deltadock.api.jobs.schemas import JobOut
from deltadock.api.problems import problems
from deltadock.errors import (
    ArchitectureMismatch,
    BitsOutOfRange,
    InvalidGoal,
    InvalidInput,
    NotFound,
    NotReady,
    RangeNotSatisfiable,
    UnknownMethod,
)

router = APIRouter(prefix="/v1/deltas", tags=["deltas"])

ARTIFACT_RESPONSES: Final[dict[int | str, dict[str, Any]]] = {
    200: {
        "description": "The artifact (safetensors)",
        "content": {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}},
    },
    206: {
        "description": "The part that Range asked for",
        "content": {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}},
    },
    304: {"description": "If-None-Match names this version"},
    **problems(NotFound, NotReady, RangeNotSatisfiable),
}

DeltaId = Annotated[str, Path(examples=[EXAMPLE_DELTA_ID])]


@router.post(
    "",
    status_code=202,
    responses={
        200: {"model": DeltaAccepted, "description": "Nothing to do: it exists, or its bytes do"},
        **problems(
            NotFound,
            InvalidInput,
            UnknownMethod,
            BitsOutOfRange,
            InvalidGoal,
            ArchitectureMismatch,
        ),
    },
)
def create_delta(
    body: DeltaIn, unit: WriteUnit, resources: ResourcesDep, response: Response
) -> DeltaAccepted:
    """Compress a fine-tuned checkpoint; follow the job at `Location`."""
    delta, is_work = service.request_delta(unit, resources, body)
    if not is_work:
        response.status_code = 200
    response.headers["Location"] = f"/v1/jobs/{delta.job.id}"
    return DeltaAccepted(delta=DeltaOut.of(delta), job=JobOut.of(delta.job))


@router.get("", responses=problems(InvalidInput))
def list_deltas(
    session: ReadSession,
    after: Annotated[str | None, Query(description="`next` of the page before.")] = None,
    limit: Annotated[int, Query(ge=1, le=200)] = 50,
) -> DeltaPage:
    """The deltas, newest first."""
    deltas, following = service.page_of_deltas(session, limit=limit, after=after)
    return DeltaPage(data=[DeltaOut.of(delta) for delta in deltas], next=following)


@router.get("/{delta_id}", responses=problems(NotFound))
def get_delta(delta_id: DeltaId, session: ReadSession) -> DeltaOut:
    """One delta."""
    return DeltaOut.of(service.get_delta(session, delta_id))


@router.delete("/{delta_id}", status_code=204, responses=problems(NotFound))
def delete_delta(delta_id: DeltaId, unit: WriteUnit) -> None:
    """Delete a delta. Its name and version are never given to other bytes."""
    service.delete_delta(unit.session, delta_id)


@router.get("/{delta_id}/report", responses=problems(NotFound, NotReady))
def get_report(delta_id: DeltaId, session: ReadSession) -> ReportOut:
    """What the compression measured."""
    delta = service.get_delta(session, delta_id)
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
    delta_id: DeltaId, request: Request, session: ReadSession, resources: ResourcesDep
) -> Response:
    """The delta's file; `ETag` is its SHA-256, and a broken download can go on with `Range`."""
    delta = service.get_delta(session, delta_id)
    digest = service.require_ready(delta)
    size = resources.blobs.size(digest)
    etag = f'"{digest}"'
    headers = {
        "Accept-Ranges": "bytes",
        "ETag": etag,
        "Repr-Digest": f"sha-256=:{base64.b64encode(bytes.fromhex(digest)).decode()}:",
        "Content-Disposition": f'attachment; filename="{delta.id}.delta"',
        # The id's bytes never change, but the delta may be deleted: ask, then reuse.
        "Cache-Control": "private, no-cache",
    }
    if is_unchanged(request.headers, etag):
        return Response(status_code=304, headers=headers)
    part = requested_range(request.headers, size, etag) if request.method == "GET" else None
    start, end = part or ByteRange(0, size)
    headers["Content-Length"] = str(end - start)
    if part is not None:
        headers["Content-Range"] = f"bytes {start}-{end - 1}/{size}"
    body = iter(()) if request.method == "HEAD" else resources.blobs.open(digest, start, end)
    return StreamingResponse(
        body, 206 if part else 200, headers, media_type="application/octet-stream"
    )
