"""The life of an upload: announcing and adding files, completing it, aborting it.

    open -> completing -> complete
      ^         |
      +---------+  not accepted: the reason is kept, and so are the good files

An unfinished upload can be aborted, by its owner or after a while without activity; a complete one
that nothing needs can be dropped.
"""

from collections.abc import Collection, Sequence
from datetime import timedelta
from typing import Final

import structlog
from sqlalchemy.orm import Session

from deltadock.api.quotas import check_delta, within_bytes
from deltadock.api.uploads.assembly import AssembledCheckpoint, contents_of
from deltadock.api.uploads.receive import check_size, make_inspector
from deltadock.artifacts.checkpoint import FileEntry, TensorEntry
from deltadock.compression.options import check_text_bytes
from deltadock.errors import (
    Conflict,
    DamagedBlob,
    DeltadockError,
    InvalidCalibration,
    InvalidInput,
    NotFound,
    Unavailable,
)
from deltadock.storage.blobs import BlobStore, PartedFile
from deltadock.storage.blobs.parts import is_parted, part_bytes_for
from deltadock.storage.database import Database, database_now
from deltadock.storage.repositories import (
    BaseRepository,
    CheckpointRepository,
    ModelRepository,
    UploadRepository,
)
from deltadock.storage.repositories.blobs import BlobRepository, lock_blobs
from deltadock.storage.tables import UploadFileRow, UploadKind, UploadRow, UploadState

TOUCH_SECONDS: Final = 30.0
"""Activity is noted in the database at most so often."""

log = structlog.get_logger(__name__)


def require_upload(
    session: Session, tenant_id: str, upload_id: str, *, lock: bool = False
) -> UploadRow:
    """The upload with this id.

    Raises:
        NotFound: there is none, or it was aborted.
    """
    upload = UploadRepository(session, tenant_id).find(upload_id, lock=lock)
    if upload is None or upload.state is UploadState.ABORTED:
        raise _no_upload(upload_id)
    return upload


def _no_upload(upload_id: str) -> NotFound:
    return NotFound(
        f"There is no upload {upload_id!r}; an unfinished one is removed when it is aborted, or "
        "after a while without activity."
    )


def check_files(kind: UploadKind, files: Sequence[FileEntry], limit: int) -> None:
    """Reject a list of files that cannot become an upload.

    Raises:
        InvalidInput: a path is there twice.
        InvalidCalibration: a calibration text is one file.
        TooLarge, UnsafeFile, InvalidCheckpoint, InvalidCalibration: a file is not acceptable.
    """
    for file in files:
        make_inspector(kind, file.path)
        check_size(file.size, limit)
        if kind is UploadKind.CALIBRATION:
            check_text_bytes(file.path, file.size)
    if len({file.path for file in files}) < len(files):
        raise InvalidInput("A path is there twice; each file of an upload has its own.")
    if kind is UploadKind.CALIBRATION and len(files) > 1:
        raise InvalidCalibration("A calibration upload holds one file.")


def create_upload(
    session: Session,
    blobs: BlobStore,
    tenant_id: str,
    kind: UploadKind,
    files: Collection[FileEntry],
    delta: str | None = None,
    base: str | None = None,
) -> UploadRow:
    """Add an upload; of the announced files, those that the tenant has stored before are here.

    `delta` is as for `_check_delta`, unless all are here: an equal delta may be, too. `base` is the
    name of a base that it will become.

    Raises:
        QuotaExceeded: the others are more than the tenant may store.
        QuotaExceeded, RateLimited, Conflict: as `_check_delta`.
        Conflict: the base's name belongs to another checkpoint.
    """
    uploads = UploadRepository(session, tenant_id)
    known = uploads.stored_files(kind, [file.sha256 for file in files]) if files else {}
    lock_blobs(session, *known)
    damaged = BlobRepository(session).damaged(known)
    rows = []
    for file in files:
        twin, weights = known.get(file.sha256), _is_weights(file.path)
        same = (
            twin is not None
            and twin.size == file.size
            and _is_weights(twin.path) == weights
            and file.sha256 not in damaged
            and _holds(blobs, file)
        )
        rows.append(
            uploads.copy_of(twin, file.path)
            if same and twin and weights
            else UploadFileRow(
                path=file.path, size=file.size, sha256=file.sha256, stored=same, tensors=[]
            )
        )
    with within_bytes(session, tenant_id):
        upload = uploads.add(kind, rows)
    is_here = upload.files and all(file.stored for file in upload.files)
    digests = [file.sha256 for file in files if _is_weights(file.path)]
    if delta is not None and not is_here:
        _check_delta(session, tenant_id, delta, uploads.models_of(digests))
    if base is not None and digests and not is_here:
        BaseRepository(session, tenant_id).named(base, uploads.checkpoints_of(digests))
    return upload


def _check_delta(session: Session, tenant_id: str, name: str, models: Collection[str]) -> None:
    """Refuse now, before hours of upload, what a delta of this name will be refused for.

    `models` are those with a version of this fine-tune. The delta may equal that, and then
    takes neither a new version nor, of another name, a job.

    Raises:
        QuotaExceeded, RateLimited: the tenant may have no more deltas or jobs.
        Conflict: the name is a deleted model's.
    """
    ModelRepository(session, tenant_id).check_open(name)
    if name not in models:
        check_delta(session, tenant_id, starts_job=not models, more=1)


def _holds(blobs: BlobStore, file: FileEntry) -> bool:
    """Whether the store has all of the file's bytes; they are not read."""
    try:
        return blobs.size(file.sha256) == file.size
    except NotFound:
        return False


def create_import(
    session: Session,
    tenant_id: str,
    kind: UploadKind,
    source: str,
    total_bytes: int,
    delta: str | None = None,
) -> UploadRow:
    """Add an upload whose files a background thread imports.

    Raises:
        QuotaExceeded: they are more than the tenant may store.
        QuotaExceeded, RateLimited, Conflict: as `_check_delta`.
    """
    uploads = UploadRepository(session, tenant_id)
    with within_bytes(session, tenant_id):
        upload = uploads.add(kind)
        upload.source, upload.source_bytes = source, total_bytes
        uploads.start_completing(upload)
    if delta is not None:
        _check_delta(session, tenant_id, delta, uploads.models_of(source=source))
    return upload


def _is_weights(path: str) -> bool:
    return path.endswith(".safetensors")


def check_open(upload: UploadRow) -> None:
    """Raise Conflict if the upload takes no files."""
    if upload.state is UploadState.COMPLETING:
        raise Conflict(f"Upload {upload.id} is being completed; wait for its state to change.")
    if upload.state is UploadState.DROPPED:
        raise Conflict(f"Upload {upload.id} was dropped, and so were its bytes; start a new one.")
    if upload.state is not UploadState.OPEN:
        raise Conflict(f"Upload {upload.id} is {upload.state}; start a new one.")


def check_may_add(upload: UploadRow, path: str) -> frozenset[str]:
    """Reject a file that cannot be added, before its bytes are received.

    Returns the SHA-256 that it was announced with, if it was.

    Raises:
        Conflict: the upload is no longer open.
        InvalidCalibration: it would be a second calibration text.
    """
    check_open(upload)
    if upload.source is not None:
        raise Conflict(f"Upload {upload.id} is an import; complete it to try again.")
    others = [file.path for file in upload.files if file.path != path]
    if upload.kind is UploadKind.CALIBRATION and others:
        raise InvalidCalibration(
            f"A calibration upload holds one file, and this one has {others[0]!r}."
        )
    return frozenset(f.sha256 for f in upload.files if f.path == path and not f.stored)


def parts_of(
    database: Database, blobs: BlobStore, tenant_id: str, upload_id: str, path: str
) -> tuple[UploadKind, PartedFile]:
    """The parts of an announced file that is not stored, and its upload's kind.

    Asking for them is activity.

    Raises:
        NotFound: there is no such upload or announced file.
        Conflict: the upload takes no files, or this one is stored or to be sent whole.
        StorageFull: the store has no room for the file.
    """
    with database.read_scope() as session:
        found = UploadRepository(session, tenant_id).find_file(upload_id, path)
        if found is None or found[0].state is UploadState.ABORTED:
            raise _no_upload(upload_id)
        upload, file = found
        idle = (database_now(session) - upload.updated_at).total_seconds()
    check_open(upload)
    if file is None:
        raise NotFound(f"{path!r} was not announced when the upload was created; PUT it whole.")
    if file.stored:
        raise Conflict(f"{path!r} is stored already; there is nothing to send.")
    if not is_parted(file.size):
        raise Conflict(f"{path!r} is not sent in parts, since it is small; PUT it whole.")
    layout = (file.size, part_bytes_for(file.size))
    if file.parts_token is None:
        begun = blobs.begin_parts(upload_id, *layout)
        with database.session_scope() as session:
            uploads = UploadRepository(session, tenant_id)
            is_first = uploads.set_parts_token(upload_id, path, begun.token)
        if not is_first:
            begun.drop()
            return parts_of(database, blobs, tenant_id, upload_id, path)
        try:
            begun.reserve()  # by one of several requests
        except DeltadockError:
            with database.session_scope() as session:
                UploadRepository(session, tenant_id).set_parts_token(upload_id, path, None)
            begun.drop()
            raise
        return upload.kind, begun
    if idle > TOUCH_SECONDS:
        with database.session_scope() as session:
            UploadRepository(session, tenant_id).touch(upload_id)
    return upload.kind, blobs.parted(upload_id, file.parts_token, *layout)


def check_stored(blobs: BlobStore, digest: str) -> None:
    """Check that a blob whose row is being written has not been collected since it was stored.

    Raises:
        Unavailable: it has; its sender stores it again.
    """
    if not blobs.exists(digest):
        raise Unavailable(f"The stored file {digest} was collected just now; send it again.")


def record_file(
    session: Session,
    blobs: BlobStore,
    tenant_id: str,
    upload_id: str,
    file: FileEntry,
    tensors: list[TensorEntry],
) -> UploadFileRow:
    """Add a stored file to an open upload.

    Raises:
        Unavailable: as `check_stored`.
        NotFound, Conflict, InvalidCalibration: as `require_upload` and `check_may_add`.
    """
    row = stored_row(upload_id, file, tensors)  # before the lock: there may be 100,000 tensors
    upload = require_upload(session, tenant_id, upload_id, lock=True)
    check_may_add(upload, file.path)
    with within_bytes(session, tenant_id):
        UploadRepository(session, tenant_id).put_file(upload, row)
    check_stored(blobs, file.sha256)
    return row


def stored_row(
    upload_id: str,
    file: FileEntry,
    tensors: list[TensorEntry],
    source_version: str | None = None,
) -> UploadFileRow:
    """The row of a stored file; an imported one has the version that was read."""
    return UploadFileRow(
        upload_id=upload_id,
        path=file.path,
        size=file.size,
        sha256=file.sha256,
        stored=True,
        parts_token=None,
        source_version=source_version,
        tensors=[
            {
                "name": tensor.name,
                "dtype": tensor.dtype,
                "shape": list(tensor.shape),
                "sha256": tensor.sha256,
            }
            for tensor in tensors
        ],
    )


def delete_upload(session: Session, tenant_id: str, upload_id: str, undo: timedelta) -> None:
    """Abort an unfinished upload, or drop a complete one that nothing needs.

    Raises:
        NotFound: there is none, or it was aborted.
        Conflict: a base, a delta or a job needs it, or may until `undo` is over; or it was dropped.
    """
    uploads = UploadRepository(session, tenant_id)
    upload = require_upload(session, tenant_id, upload_id)
    if (digest := upload.checkpoint_digest or upload.calibration_digest) is not None:
        lock_blobs(session, digest)  # before the row, as collection does: nothing needs it anew
    was, upload = upload.state, require_upload(session, tenant_id, upload_id, lock=True)
    if upload.state is UploadState.DROPPED:
        raise Conflict(f"Upload {upload_id} was dropped already; there is nothing to remove.")
    if upload.state is not UploadState.COMPLETE:
        uploads.abort(upload)
        return
    if was is not UploadState.COMPLETE:
        raise Conflict(f"Upload {upload_id} was completed just now; delete it again to drop it.")
    undo_from = database_now(session) - undo
    if (reason := BlobRepository(session).need_of(upload, undo_from)) is not None:
        raise Conflict(f"Upload {upload_id} is needed: {reason}.")
    uploads.drop(upload)


def drop_parts(blobs: BlobStore, upload_id: str) -> None:
    """Remove an aborted upload's parts; if the store fails, the sweeper does later."""
    try:
        blobs.drop_parts(upload_id)
    except DeltadockError as error:
        log.warning("parts_not_dropped", upload=upload_id, error=error.message)


def check_arrived(blobs: BlobStore, upload: UploadRow) -> None:
    """Raise Conflict if an announced file, or a part of one, has not arrived."""
    for file in upload.files:
        if not file.stored and file.parts_token is None:
            raise Conflict(f"{file.path!r} has not arrived. Send it, then complete the upload.")
        if not file.stored and file.parts_token is not None:
            parts = blobs.parted(upload.id, file.parts_token, file.size, part_bytes_for(file.size))
            try:
                parts.check_complete()
            except Conflict as error:
                raise Conflict(f"{file.path!r}: {error.message}") from error


def complete_upload(
    session: Session,
    blobs: BlobStore,
    tenant_id: str,
    upload_id: str,
    assembled: AssembledCheckpoint | None,
) -> UploadRow:
    """Turn an open upload's files into a checkpoint or a calibration text; idempotent.

    A checkpoint was assembled beforehand, if all files were stored. If files arrived in parts,
    their bytes must be hashed first: the upload is then `completing`, as it is if another request
    has changed a file meanwhile.

    Raises:
        NotFound: there is no such upload.
        Conflict: it was dropped.
        InvalidCalibration: there is no text.
    """
    upload = require_upload(session, tenant_id, upload_id, lock=True)
    if upload.state in {UploadState.COMPLETE, UploadState.COMPLETING}:
        return upload
    check_open(upload)
    is_checkpoint = upload.kind is UploadKind.CHECKPOINT
    if not is_all_stored(upload) or (
        is_checkpoint and (assembled is None or assembled.files != contents_of(upload))
    ):
        UploadRepository(session, tenant_id).start_completing(upload)
    else:
        finish_upload(session, blobs, upload, assembled)
    return upload


def is_all_stored(upload: UploadRow) -> bool:
    """Whether all files are blobs, so that nothing needs to be hashed or imported."""
    return upload.source is None and all(file.stored for file in upload.files)


def forget_damaged(session: Session, tenant_id: str, upload_id: str, error: DamagedBlob) -> None:
    """Let an open upload's file be sent again whose blob is damaged."""
    upload = require_upload(session, tenant_id, upload_id, lock=True)
    if upload.state is UploadState.OPEN:
        UploadRepository(session, tenant_id).forget_damaged(upload, error.digest)


def finish_upload(
    session: Session,
    blobs: BlobStore,
    upload: UploadRow,
    assembled: AssembledCheckpoint | None,
) -> None:
    """Complete a locked upload whose files are all stored, as `assemble_upload` found them.

    Raises:
        InvalidCalibration: there is no text.
    """
    if assembled is None:
        if not upload.files:
            raise InvalidCalibration("The upload has no file yet; put one .txt or .jsonl file.")
        upload.calibration_digest = upload.files[0].sha256
    else:
        lock_blobs(session, assembled.checkpoint.digest)
        BlobRepository(session).note_stored(assembled.checkpoint.digest)
        if not blobs.exists(assembled.checkpoint.digest):  # it was collected just now
            blobs.put_bytes(assembled.manifest_json)
        upload.ignored = assembled.ignored
        upload.checkpoint = CheckpointRepository(session, upload.tenant_id).add(
            assembled.checkpoint
        )
    UploadRepository(session, upload.tenant_id).complete(upload)
