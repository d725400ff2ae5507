"""Routes of uploads, with their request and response bodies."""

from datetime import datetime
from typing import Annotated, Any, Final, Self

from fastapi import APIRouter, Header, Path, Request
from pydantic import BaseModel, ConfigDict, Field
from starlette.concurrency import run_in_threadpool

from deltadock.api.access import CallerDep
from deltadock.api.dependencies import ReadSession, ResourcesDep, WriteUnit
from deltadock.api.problems import problems
from deltadock.api.schemas import EXAMPLE_TIME, CheckpointOut, Digest, RequestBody
from deltadock.api.uploads import service
from deltadock.api.uploads.receive import (
    announced_digests,
    check_size,
    make_inspector,
    receive_file,
)
from deltadock.errors import (
    Conflict,
    DamagedBlob,
    HashMismatch,
    InvalidCalibration,
    InvalidCheckpoint,
    InvalidInput,
    MalformedSafetensors,
    NotFound,
    TooLarge,
    UnsafeFile,
)
from deltadock.storage.models import UploadFileRow, UploadKind, UploadRow, UploadState
from deltadock.storage.repositories import UploadRepository

router = APIRouter(prefix="/v1/uploads", tags=["uploads"])

EXAMPLE_UPLOAD_ID: Final = "upl_k7wq2mzv5c3xj6nhy4tbr2dfsa"

UploadId = Annotated[str, Path(examples=[EXAMPLE_UPLOAD_ID])]

BINARY_BODY: Final[dict[str, Any]] = {
    "requestBody": {
        "required": True,
        "content": {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}},
    }
}


class UploadIn(RequestBody):
    """A new upload."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"kind": "checkpoint"}]})

    kind: UploadKind


class FileOut(BaseModel):
    """A stored file, with the digest that the server computed."""

    path: str = Field(examples=["model.safetensors"])
    size: int = Field(description="Bytes.", examples=[4_194_304])
    sha256: Digest

    @classmethod
    def of(cls, file: UploadFileRow) -> Self:
        """Convert a row."""
        return cls(path=file.path, size=file.size, sha256=file.sha256)


class CalibrationTextOut(BaseModel):
    """A complete calibration text."""

    digest: Digest
    size: int = Field(description="Bytes.", examples=[65_536])


class UploadOut(BaseModel):
    """An upload and, once complete, its checkpoint or calibration text."""

    id: str = Field(examples=[EXAMPLE_UPLOAD_ID])
    kind: UploadKind
    state: UploadState
    files: list[FileOut]
    checkpoint: CheckpointOut | None = None
    calibration: CalibrationTextOut | None = None
    ignored: list[str] = Field(
        default_factory=list,
        description="Files that are not the model's, and so not part of the checkpoint; named "
        "when the upload is completed.",
        examples=[["trainer_state.json"]],
    )
    created_at: datetime = Field(examples=[EXAMPLE_TIME])

    @classmethod
    def of(cls, upload: UploadRow) -> Self:
        """Convert a row."""
        calibration = None
        if upload.calibration_digest is not None:
            calibration = CalibrationTextOut(
                digest=upload.calibration_digest, size=upload.files[0].size
            )
        return cls(
            id=upload.id,
            kind=upload.kind,
            state=upload.state,
            files=[FileOut.of(file) for file in upload.files],
            checkpoint=CheckpointOut.of(upload.checkpoint) if upload.checkpoint else None,
            calibration=calibration,
            created_at=upload.created_at,
        )


@router.post("", status_code=201, responses=problems(InvalidInput))
def create_upload(body: UploadIn, caller: CallerDep, unit: WriteUnit) -> UploadOut:
    """Start an upload; put its files next, then complete it."""
    return UploadOut.of(UploadRepository(unit.session, caller.tenant_id).add(body.kind))


@router.get("/{upload_id}", responses=problems(NotFound))
def get_upload(upload_id: UploadId, caller: CallerDep, session: ReadSession) -> UploadOut:
    """Get the upload and its stored files, so that an interrupted client can resume."""
    return UploadOut.of(service.require_upload(session, caller.tenant_id, upload_id))


@router.delete("/{upload_id}", status_code=204, responses=problems(NotFound, Conflict))
def abort_upload(upload_id: UploadId, caller: CallerDep, unit: WriteUnit) -> None:
    """Abort the upload."""
    service.abort_upload(unit.session, caller.tenant_id, upload_id)


@router.put(
    "/{upload_id}/files/{path:path}",
    openapi_extra=BINARY_BODY,
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
    caller: CallerDep,
    resources: ResourcesDep,
    content_digest: Annotated[
        str | None,
        Header(
            description="RFC 9530; a mismatch is rejected.",
            examples=["sha-256=:n4bQgYhMfWWaL+qgxVrQFaO/TxsrC4Is0V1sFbDwCgg=:"],
        ),
    ] = None,
    x_content_sha256: Annotated[
        str | None, Header(description="The SHA-256 as 64 hex digits.")
    ] = None,
) -> FileOut:
    """Upload one file as the request body; a file with the same path is replaced.

    The bytes are hashed and checked while they stream: an invalid file is rejected as soon as
    possible, and nothing of it is stored.
    """
    announced = announced_digests(content_digest, x_content_sha256)
    limit = resources.settings.max_file_bytes
    length = request.headers.get("content-length", "")
    if length.isdecimal():
        check_size(int(length), limit)

    def admit() -> UploadRow:
        with resources.database.read_scope() as session:
            upload = service.require_upload(session, caller.tenant_id, upload_id)
            service.check_may_add(upload, path)
            return upload

    upload = await run_in_threadpool(admit)
    inspector = make_inspector(upload.kind, path)
    # No transaction is open during the transfer, which may take hours.
    file, tensors = await receive_file(
        request.stream(), inspector, resources.blobs, limit=limit, announced=announced
    )

    def record() -> UploadFileRow:
        with resources.database.session_scope() as session:
            return service.record_file(session, caller.tenant_id, upload_id, file, tensors)

    return FileOut.of(await run_in_threadpool(record))


@router.post(
    "/{upload_id}/complete",
    responses=problems(NotFound, Conflict, InvalidCheckpoint, InvalidCalibration, DamagedBlob),
)
def complete_upload(
    upload_id: UploadId, caller: CallerDep, unit: WriteUnit, resources: ResourcesDep
) -> UploadOut:
    """Complete the upload: its files become a checkpoint or a calibration text."""
    upload, ignored = service.complete_upload(
        unit.session, resources.blobs, caller.tenant_id, upload_id
    )
    return UploadOut.of(upload).model_copy(update={"ignored": ignored})
