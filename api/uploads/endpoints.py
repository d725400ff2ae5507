"""Routes of uploads."""

from contextlib import aclosing
from datetime import datetime, timedelta
from functools import partial
from typing import Annotated, Any, Final, Literal
from urllib.parse import quote

from fastapi import Header, Path, Query, Request, Response
from starlette.concurrency import run_in_threadpool

from deltadock.api.access import CallerDep
from deltadock.api.dependencies import ReadSession, ResourcesDep, WriteUnit
from deltadock.api.idempotency import OnceDep
from deltadock.api.paging import After, Cursor, Limit
from deltadock.api.protocol import body_of
from deltadock.api.quotas import Room, room_of
from deltadock.api.routing import api_router
from deltadock.api.schemas import EXAMPLE_DIGEST
from deltadock.api.uploads import service
from deltadock.api.uploads.receive import (
    CONTENT_DIGEST_PATTERN,
    HEX_DIGEST_PATTERN,
    announced_digests,
    check_size,
    make_inspector,
    receive_file,
    receive_part,
)
from deltadock.api.uploads.schemas import (
    EXAMPLE_UPLOAD_ID,
    FILE_PATTERN,
    FileOut,
    FilePartsOut,
    MissingPart,
    PartOut,
    UploadIn,
    UploadOut,
    UploadPage,
)
from deltadock.api.uploads.sources import open_source, source_files
from deltadock.artifacts.checkpoint import FileEntry
from deltadock.errors import (
    Conflict,
    DamagedBlob,
    Forbidden,
    HashMismatch,
    IdempotencyKeyReused,
    InvalidCalibration,
    InvalidCheckpoint,
    InvalidInput,
    MalformedSafetensors,
    NotFound,
    NotInstalled,
    QuotaExceeded,
    StorageFull,
    TooLarge,
    Unavailable,
    UnsafeFile,
    refused_by_state,
)
from deltadock.problems import problems
from deltadock.storage.blobs import PartedFile
from deltadock.storage.repositories import UploadRepository
from deltadock.storage.tables import UploadFileRow, UploadKind, UploadState

router = api_router("/v1/uploads", tags=["uploads"])


ListedState = Literal["open", "completing", "complete", "dropped"]
"""Aborted uploads are gone."""
_CURSOR: Final = Cursor("uploads", datetime, str)

UploadId = Annotated[str, Path(examples=[EXAMPLE_UPLOAD_ID])]
FilePath = Annotated[
    str,
    Path(examples=["model.safetensors"], json_schema_extra={"pattern": FILE_PATTERN}),
]
PartNumber = Annotated[int, Path(ge=1, le=10_000, examples=[3])]
ContentDigest = Annotated[
    str | None,
    Header(
        description="RFC 9530; a mismatch is rejected.",
        examples=["sha-256=:n4bQgYhMfWWaL+qgxVrQFaO/TxsrC4Is0V1sFbDwCgg=:"],
        json_schema_extra={"pattern": CONTENT_DIGEST_PATTERN},
    ),
]
ContentSha256 = Annotated[
    str | None,
    Header(
        description="The SHA-256 as 64 hex digits.",
        examples=[EXAMPLE_DIGEST],
        json_schema_extra={"pattern": HEX_DIGEST_PATTERN},
    ),
]

BINARY_BODY: Final[dict[str, Any]] = {
    "requestBody": {
        "required": True,
        "content": {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}},
    }
}


@router.post(
    "",
    status_code=201,
    responses=problems(
        InvalidInput,
        InvalidCheckpoint,
        UnsafeFile,
        InvalidCalibration,
        TooLarge,
        NotFound,
        Unavailable,
        NotInstalled,
        IdempotencyKeyReused,
        QuotaExceeded,
        Forbidden,
        Conflict,
        by_state=(InvalidCheckpoint,),
    ),
)
def create_upload(
    body: UploadIn,
    caller: CallerDep,
    unit: WriteUnit,
    resources: ResourcesDep,
    once: OnceDep,
    response: Response,
) -> UploadOut:
    """Start an upload; send its files next, then complete it.

    Announced files that you have uploaded before are `stored` from the start. Of the others, large
    ones are sent in parts. With a `source`, the server fetches the files itself: poll the upload.
    """
    settings = resources.settings
    files = [FileEntry(file.path, file.size, file.sha256) for file in body.files]
    if body.source is not None:
        with refused_by_state():
            found = source_files(open_source(body.source, settings), body.kind)
        files = [FileEntry(path, file.size, "") for path, file in found.items()]
    service.check_files(body.kind, files, settings.max_file_bytes)

    def create() -> UploadOut:
        if body.source is not None:
            total = sum(file.size for file in files)
            upload = service.create_import(
                unit.session, caller.tenant_id, body.kind, body.source, total, body.delta
            )
            work = (upload.id, caller.tenant_id, body.source)
            unit.after_commit.append(partial(resources.completer.submit, *work))
        else:
            upload = service.create_upload(
                unit.session,
                resources.blobs,
                caller.tenant_id,
                body.kind,
                files,
                body.delta,
                body.base,
            )
        return UploadOut.of(upload, settings.upload_ttl)

    return once.answer(UploadOut, body, response, create)


@router.get("", responses=problems(NotFound))
def list_uploads(
    caller: CallerDep,
    session: ReadSession,
    resources: ResourcesDep,
    state: Annotated[list[ListedState] | None, Query(description="Any of these states.")] = None,
    after: After = None,
    limit: Limit = 50,
) -> UploadPage:
    """List the uploads, newest first."""
    uploads = UploadRepository(session, caller.tenant_id)
    states = [UploadState(name) for name in state or ()]
    found = uploads.page(limit=limit + 1, after=_CURSOR.read(after), states=states)
    page, next_after = _CURSOR.page(found, limit, lambda upload: (upload.created_at, upload.id))
    ttl = resources.settings.upload_ttl
    return UploadPage(data=[UploadOut.of(upload, ttl) for upload in page], next=next_after)


@router.get("/{upload_id}", responses=problems(NotFound))
def get_upload(
    upload_id: UploadId, caller: CallerDep, session: ReadSession, resources: ResourcesDep
) -> UploadOut:
    """Get the upload and its files, so that an interrupted client can resume."""
    upload = service.require_upload(session, caller.tenant_id, upload_id)
    return UploadOut.of(upload, resources.settings.upload_ttl)


@router.delete("/{upload_id}", status_code=204, responses=problems(NotFound, Conflict))
def delete_upload(
    upload_id: UploadId, caller: CallerDep, unit: WriteUnit, resources: ResourcesDep
) -> None:
    """Abort the upload and remove its parts; or drop a complete one that no base, delta or job
    needs, so that its bytes no longer count.
    """
    undo = timedelta(days=resources.settings.undo_days)
    service.delete_upload(unit.session, caller.tenant_id, upload_id, undo)
    unit.after_commit.append(lambda: service.drop_parts(resources.blobs, upload_id))


# Before the route of whole files, whose path matches everything.
@router.get(
    "/{upload_id}/files/{path:path}/parts",
    responses=problems(NotFound, Conflict, StorageFull),
)
def list_parts(
    upload_id: UploadId,
    path: FilePath,
    caller: CallerDep,
    resources: ResourcesDep,
    limit: Annotated[int, Query(ge=1, le=1000, description="Missing parts to list.")] = 100,
) -> FilePartsOut:
    """List which parts of a file are here, and where to send the others."""
    _, file = service.parts_of(
        resources.database, resources.blobs, caller.tenant_id, upload_id, path
    )
    arrived = file.arrived()
    missing = [number for number in range(1, file.count + 1) if number not in arrived]
    return FilePartsOut(
        bytes=file.part_bytes,
        count=file.count,
        arrived=sorted(arrived),
        missing=[
            MissingPart(
                number=number,
                size=file.part_size(number),
                url=file.url(number)
                or f"/v1/uploads/{upload_id}/files/{quote(path)}/parts/{number}",
            )
            for number in missing[:limit]
        ],
    )


@router.put(
    "/{upload_id}/files/{path:path}/parts/{number}",
    openapi_extra=BINARY_BODY,
    responses=problems(NotFound, Conflict, HashMismatch, InvalidInput, StorageFull, Unavailable),
)
async def put_part(
    *,
    request: Request,
    upload_id: UploadId,
    path: FilePath,
    number: PartNumber,
    caller: CallerDep,
    resources: ResourcesDep,
    content_digest: ContentDigest = None,
    x_content_sha256: ContentSha256 = None,
) -> PartOut:
    """Upload one part of a large file as the request body.

    Parts may come in parallel and in any order; one that comes again replaces the first.
    """
    announced = announced_digests(content_digest, x_content_sha256)
    length = request.headers.get("content-length", "")

    def admit() -> tuple[UploadKind, PartedFile]:
        kind, file = service.parts_of(
            resources.database, resources.blobs, caller.tenant_id, upload_id, path
        )
        with refused_by_state():  # the file has fewer parts
            size = file.part_size(number)
        if length.isdecimal() and int(length) != size:
            raise Conflict(f"Part {number} has {size} bytes, and the body {length}.")
        return kind, file

    kind, file = await run_in_threadpool(admit)
    in_memory = file.part_size(number) if file.sent_whole else 0
    with resources.arrivals.memory(caller.tenant_id, in_memory):
        async with aclosing(body_of(request)) as pieces:
            size = await receive_part(pieces, file, number, announced)
    resources.completer.ahead.arrived(kind, path, file)
    return PartOut(number=number, size=size)


@router.put(
    "/{upload_id}/files/{path:file}",
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
        StorageFull,
        QuotaExceeded,
        Unavailable,
    ),
)
async def put_file(
    *,
    request: Request,
    upload_id: UploadId,
    path: FilePath,
    caller: CallerDep,
    resources: ResourcesDep,
    content_digest: ContentDigest = None,
    x_content_sha256: ContentSha256 = None,
) -> FileOut:
    """Upload one file as the request body; a file with the same path is replaced.

    The bytes are hashed and checked while they stream: an invalid file is rejected as soon as
    possible, and nothing of it is stored.
    """
    digests = announced_digests(content_digest, x_content_sha256)
    limit = resources.settings.max_file_bytes
    length = request.headers.get("content-length", "")

    key = (upload_id, path)
    arrivals = resources.arrivals

    def admit() -> tuple[UploadKind, frozenset[str], Room | None, int]:
        with resources.database.read_scope() as session:
            upload = service.require_upload(session, caller.tenant_id, upload_id)
            promised = service.check_may_add(upload, path)
            room = room_of(session, caller.tenant_id)
            announced = sum(file.size for file in upload.files if file.path == path)
            if length.isdecimal():
                check_size(int(length), limit)
                if room is not None:
                    more = max(0, int(length) - arrivals.covered(key, announced))
                    room.check(arrivals.staged(caller.tenant_id) + more)
            return upload.kind, promised, room, announced

    kind, promised, room, announced = await run_in_threadpool(admit)
    inspector = make_inspector(kind, path)
    # No transaction is open during the transfer, which may take hours.
    in_memory = resources.blobs.buffer_bytes
    if length.isdecimal():
        in_memory = min(in_memory, int(length))
    with (
        arrivals.memory(caller.tenant_id, in_memory),
        arrivals.file(caller.tenant_id, key, room, announced) as arrived,
    ):
        async with aclosing(body_of(request)) as pieces:
            file, tensors = await receive_file(
                pieces,
                inspector,
                resources.blobs,
                limit=limit,
                announced=digests | promised,
                arrived=arrived,
            )

    def record() -> UploadFileRow:
        with resources.database.session_scope() as session:
            return service.record_file(
                session, resources.blobs, caller.tenant_id, upload_id, file, tensors
            )

    return FileOut.of(await run_in_threadpool(record))


@router.post(
    "/{upload_id}/complete",
    responses={
        202: {
            "model": UploadOut,
            "description": "Its bytes are still being hashed and checked; poll the upload",
        },
        **problems(
            NotFound,
            Conflict,
            DamagedBlob,
            QuotaExceeded,
            by_state=(HashMismatch, InvalidCheckpoint, MalformedSafetensors, InvalidCalibration),
        ),
    },
)
async def complete_upload(
    upload_id: UploadId, caller: CallerDep, resources: ResourcesDep, response: Response
) -> UploadOut:
    """Complete the upload: its files become a checkpoint or a calibration text.

    Files that came in parts are hashed and checked first, in the background: the answer is a 202
    if that takes more than a few seconds. If a file is not accepted, the upload is open again, with
    its `error`; only that file needs to be sent again.
    """
    with refused_by_state():
        upload = await resources.completer.complete(caller.tenant_id, upload_id)
    if upload.state is UploadState.COMPLETING:
        response.status_code = 202
    return UploadOut.of(upload, resources.settings.upload_ttl)
