"""Routes of uploads."""

from typing import Annotated, Any, Final

from fastapi import APIRouter, Header, Path, Request
from starlette.concurrency import run_in_threadpool

from deltadock.api.dependencies import ReadSession, ResourcesDep, WriteUnit
from deltadock.api.problems import problems
from deltadock.api.uploads import service
from deltadock.api.uploads.inspectors import make_inspector
from deltadock.api.uploads.receive import announced_digests, check_size, receive_file
from deltadock.api.uploads.schemas import EXAMPLE_UPLOAD_ID, FileOut, UploadIn, UploadOut
from deltadock.errors import (
    Conflict,
    HashMismatch,
    InvalidCalibration,
    InvalidCheckpoint,
    InvalidInput,
    MalformedSafetensors,
    NotFound,
    TooLarge,
    UnsafeFile,
)
from deltadock.storage.models import UploadFileRow, UploadRow
from deltadock.storage.repositories import UploadRepository

router = APIRouter(prefix="/v1/uploads", tags=["uploads"])

UploadId = Annotated[str, Path(examples=[EXAMPLE_UPLOAD_ID])]

RAW_BODY: Final[dict[str, Any]] = {
    "requestBody": {
        "required": True,
        "content": {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}},
    }
}


@router.post("", status_code=201, responses=problems(InvalidInput))
def create_upload(body: UploadIn, unit: WriteUnit) -> UploadOut:
    """Begin an upload; put its files next, then complete it."""
    return UploadOut.of(UploadRepository(unit.session).add(body.kind))


@router.get("/{upload_id}", responses=problems(NotFound))
def get_upload(upload_id: UploadId, session: ReadSession) -> UploadOut:
    """The upload and the files that have arrived whole, so that an interrupted client can go on."""
    return UploadOut.of(service.get_upload(session, upload_id))


@router.delete("/{upload_id}", status_code=204, responses=problems(NotFound, Conflict))
def abort_upload(upload_id: UploadId, unit: WriteUnit) -> None:
    """Give the upload up."""
    service.abort_upload(unit.session, upload_id)


@router.put(
    "/{upload_id}/files/{path:path}",
    openapi_extra=RAW_BODY,
    responses=problems(
        NotFound,
        Conflict,
        TooLarge,
        UnsafeFile,
        MalformedSafetensors,
        InvalidCheckpoint,
        InvalidCalibration,
        HashMismatch,
    ),
)
async def put_file(
    *,
    request: Request,
    upload_id: UploadId,
    path: Annotated[str, Path(examples=["model.safetensors"])],
    resources: ResourcesDep,
    content_digest: Annotated[
        str | None,
        Header(
            description="RFC 9530; a mismatch is refused.",
            examples=["sha-256=:n4bQgYhMfWWaL+qgxVrQFaO/TxsrC4Is0V1sFbDwCgg=:"],
        ),
    ] = None,
    x_content_sha256: Annotated[
        str | None, Header(description="The same as 64 hex digits.")
    ] = None,
) -> FileOut:
    """Send one file as the raw body; the same path again replaces it.

    The bytes are hashed and checked while they stream: a file that cannot be right is refused as
    soon as that is known, and nothing of it stays.
    """
    announced = announced_digests(content_digest, x_content_sha256)
    limit = resources.settings.max_file_bytes
    length = request.headers.get("content-length", "")
    if length.isdecimal():
        check_size(int(length), limit)

    def admit() -> UploadRow:
        with resources.database.read_scope() as session:
            upload = service.get_upload(session, upload_id)
            service.check_may_add(upload, path)
            return upload

    upload = await run_in_threadpool(admit)
    inspector = make_inspector(upload.kind, path)
    # No transaction is open while bytes flow, which may take hours.
    file, tensors = await receive_file(
        request.stream(), inspector, resources.blobs, limit=limit, announced=announced
    )

    def record() -> UploadFileRow:
        with resources.database.session_scope() as session:
            return service.record_file(session, upload_id, file, tensors)

    return FileOut.of(await run_in_threadpool(record))


@router.post(
    "/{upload_id}/complete",
    responses=problems(NotFound, Conflict, InvalidCheckpoint, InvalidCalibration),
)
def complete_upload(upload_id: UploadId, unit: WriteUnit, resources: ResourcesDep) -> UploadOut:
    """Turn the files into a checkpoint or a calibration text, named by its digest."""
    return UploadOut.of(service.complete_upload(unit.session, resources.blobs, upload_id))
