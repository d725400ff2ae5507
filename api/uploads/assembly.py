"""What the files of an upload are together: a checkpoint or an adapter, with its manifest."""

from dataclasses import dataclass
from typing import Final

from sqlalchemy.orm import Session

from deltadock.artifacts.checkpoint import (
    ADAPTER_CONFIG,
    ADAPTER_TYPE,
    CHAT_TEMPLATE,
    CONFIG,
    SHARD_INDEX,
    TOKENIZER_CONFIG,
    VOCABULARY_FILES,
    CheckpointManifest,
    FileEntry,
    TensorEntry,
    assemble,
    configures_chat,
)
from deltadock.storage.blobs import BlobStore
from deltadock.storage.repositories import UploadRepository
from deltadock.storage.tables import CheckpointRow, UploadKind, UploadRow

MAX_JSON_BYTES: Final = 32 << 20
"""Of config and shard index, which are read into memory (a 1T-parameter model: a tenth of it)."""


@dataclass(frozen=True)
class AssembledCheckpoint:
    """The checkpoint that an upload's files are."""

    files: dict[str, str]
    """SHA-256 of each, by its path."""
    ignored: list[str]
    """Paths of files that are not part of it."""
    manifest_json: bytes
    checkpoint: CheckpointRow


def assemble_upload(
    session: Session, blobs: BlobStore, upload: UploadRow
) -> AssembledCheckpoint | None:
    """What a checkpoint's files, all stored, are together; None: it is a calibration text.

    With tens of thousands of tensors this takes seconds, so it precedes the transaction that
    completes the upload. A PEFT adapter becomes a checkpoint with a model type of its own. Files
    that are not the model's are not part of the checkpoint.

    Raises:
        InvalidCheckpoint: the checkpoint is incomplete or invalid.
        DamagedBlob: a file that is read is damaged in the store.
    """
    if upload.kind is UploadKind.CALIBRATION:
        return None
    manifest = _manifest(session, upload, blobs)
    kept = {file.path for file in manifest.files}
    manifest_json = manifest.to_json()
    return AssembledCheckpoint(
        files=contents_of(upload),
        ignored=sorted(file.path for file in upload.files if file.path not in kept),
        manifest_json=manifest_json,
        checkpoint=CheckpointRow(
            digest=blobs.put_bytes(manifest_json),
            weights_digest=manifest.weights_digest,
            model_type=manifest.config["model_type"],
            total_bytes=manifest.total_bytes,
            has_chat_template=_has_chat_template(manifest, blobs),
        ),
    )


def contents_of(upload: UploadRow) -> dict[str, str]:
    """The SHA-256 of each file, by its path."""
    return {file.path: file.sha256 for file in upload.files}


def _has_chat_template(manifest: CheckpointManifest, blobs: BlobStore) -> bool | None:
    """Whether conversations with it have a format; None: that is its base's tokenizer's."""
    digests = {file.path: file.sha256 for file in manifest.files}
    if CHAT_TEMPLATE in digests or (
        TOKENIZER_CONFIG in digests
        and configures_chat(blobs.read(digests[TOKENIZER_CONFIG], MAX_JSON_BYTES))
    ):
        return True
    inherits = (
        manifest.config["model_type"] == ADAPTER_TYPE or not VOCABULARY_FILES & digests.keys()
    )
    return None if inherits else False


def _manifest(session: Session, upload: UploadRow, blobs: BlobStore) -> CheckpointManifest:
    digests = contents_of(upload)
    tensors = UploadRepository(session, upload.tenant_id).tensors(upload)
    return assemble(
        [FileEntry(file.path, file.size, file.sha256) for file in upload.files],
        [
            TensorEntry(
                tensor["name"], tensor["dtype"], tuple(tensor["shape"]), path, tensor["sha256"]
            )
            for path, listed in tensors.items()
            for tensor in listed
        ],
        *(
            blobs.read(digests[name], MAX_JSON_BYTES) if name in digests else None
            for name in (CONFIG, ADAPTER_CONFIG, SHARD_INDEX)
        ),
    )
