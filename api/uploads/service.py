"""The life of an upload: adding files, completing it, aborting it."""

from typing import Final

from sqlalchemy.orm import Session

from deltadock.artifacts.checkpoint import (
    ADAPTER_CONFIG,
    CONFIG,
    SHARD_INDEX,
    CheckpointManifest,
    FileEntry,
    TensorEntry,
    assemble,
)
from deltadock.errors import Conflict, InvalidCalibration, NotFound
from deltadock.storage.blobs import BlobStore
from deltadock.storage.models import (
    CheckpointRow,
    UploadFileRow,
    UploadKind,
    UploadRow,
    UploadState,
)
from deltadock.storage.repositories import CheckpointRepository, UploadRepository

MAX_JSON_BYTES: Final = 32 << 20
"""Of config and shard index, which are read into memory (a 1T-parameter model: a tenth of it)."""


def require_upload(
    session: Session, tenant_id: str, upload_id: str, *, lock: bool = False
) -> UploadRow:
    """The upload with this id.

    Raises:
        NotFound: there is none.
    """
    upload = UploadRepository(session, tenant_id).find(upload_id, lock=lock)
    if upload is None:
        raise NotFound(f"There is no upload {upload_id!r}.")
    return upload


def check_may_add(upload: UploadRow, path: str) -> None:
    """Reject a file that cannot be added, before its bytes are received.

    Raises:
        Conflict: the upload is no longer open.
        InvalidCalibration: it would be a second calibration text.
    """
    if upload.state is not UploadState.OPEN:
        raise Conflict(f"Upload {upload.id} is {upload.state}; start a new one.")
    others = [file.path for file in upload.files if file.path != path]
    if upload.kind is UploadKind.CALIBRATION and others:
        raise InvalidCalibration(
            f"A calibration upload holds one file, and this one has {others[0]!r}."
        )


def record_file(
    session: Session, tenant_id: str, upload_id: str, file: FileEntry, tensors: list[TensorEntry]
) -> UploadFileRow:
    """Add a stored file to an open upload.

    Raises:
        NotFound, Conflict, InvalidCalibration: as `require_upload` and `check_may_add`.
    """
    upload = require_upload(session, tenant_id, upload_id, lock=True)
    check_may_add(upload, file.path)
    row = UploadFileRow(
        upload_id=upload.id,
        path=file.path,
        size=file.size,
        sha256=file.sha256,
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
    UploadRepository(session, tenant_id).put_file(upload, row)
    return row


def abort_upload(session: Session, tenant_id: str, upload_id: str) -> None:
    """Abort an upload; idempotent.

    Raises:
        Conflict: it is complete.
    """
    upload = require_upload(session, tenant_id, upload_id, lock=True)
    if upload.state is UploadState.COMPLETE:
        raise Conflict(f"Upload {upload_id} is complete and can no longer be aborted.")
    UploadRepository(session, tenant_id).abort(upload)


def complete_upload(
    session: Session, blobs: BlobStore, tenant_id: str, upload_id: str
) -> tuple[UploadRow, list[str]]:
    """Turn an upload's files into a checkpoint or a calibration text; idempotent.

    A PEFT adapter becomes a checkpoint with a model type of its own. Files that are not the
    model's are not part of the checkpoint; their paths are returned.

    Raises:
        Conflict: the upload was aborted.
        InvalidCheckpoint: the checkpoint is incomplete or invalid; the upload stays open.
        InvalidCalibration: there is no text.
    """
    upload = require_upload(session, tenant_id, upload_id, lock=True)
    if upload.state is UploadState.COMPLETE:
        return upload, []
    if upload.state is UploadState.ABORTED:
        raise Conflict(f"Upload {upload_id} was aborted; start a new one.")
    ignored: list[str] = []
    if upload.kind is UploadKind.CALIBRATION:
        if not upload.files:
            raise InvalidCalibration("The upload has no file yet; put one .txt or .jsonl file.")
        upload.calibration_digest = upload.files[0].sha256
    else:
        manifest = _manifest(upload, blobs)
        kept = {file.path for file in manifest.files}
        ignored = sorted(file.path for file in upload.files if file.path not in kept)
        upload.checkpoint = CheckpointRepository(session, tenant_id).add(
            CheckpointRow(
                digest=blobs.put_bytes(manifest.to_json()),
                weights_digest=manifest.weights_digest,
                model_type=manifest.config["model_type"],
                total_bytes=manifest.total_bytes,
            )
        )
    UploadRepository(session, tenant_id).complete(upload)
    return upload, ignored


def _manifest(upload: UploadRow, blobs: BlobStore) -> CheckpointManifest:
    digests = {file.path: file.sha256 for file in upload.files}
    return assemble(
        [FileEntry(file.path, file.size, file.sha256) for file in upload.files],
        [
            TensorEntry(
                tensor["name"],
                tensor["dtype"],
                tuple(tensor["shape"]),
                file.path,
                tensor["sha256"],
            )
            for file in upload.files
            for tensor in file.tensors
        ],
        *(
            blobs.read(digests[name], MAX_JSON_BYTES) if name in digests else None
            for name in (CONFIG, ADAPTER_CONFIG, SHARD_INDEX)
        ),
    )
