"""Bodies of the upload routes."""

from datetime import datetime
from typing import Self

from pydantic import BaseModel, ConfigDict, Field

from deltadock.api.schemas import EXAMPLE_TIME, CheckpointOut, Digest, RequestBody
from deltadock.storage.models import UploadFileRow, UploadKind, UploadRow, UploadState

EXAMPLE_UPLOAD_ID = "upl_k7wq2mzv5c3xj6nhy4tbr2dfsa"


class UploadIn(RequestBody):
    """A new upload."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"kind": "checkpoint"}]})

    kind: UploadKind


class FileOut(BaseModel):
    """A file that arrived whole, as the server hashed it."""

    path: str = Field(examples=["model.safetensors"])
    size: int = Field(description="Bytes.", examples=[4_194_304])
    sha256: Digest

    @classmethod
    def of(cls, file: UploadFileRow) -> Self:
        """The public form of a row."""
        return cls(path=file.path, size=file.size, sha256=file.sha256)


class CalibrationOut(BaseModel):
    """A complete calibration text."""

    digest: Digest
    size: int = Field(description="Bytes.", examples=[65_536])


class UploadOut(BaseModel):
    """An upload; once complete, with what it became."""

    id: str = Field(examples=[EXAMPLE_UPLOAD_ID])
    kind: UploadKind
    state: UploadState
    files: list[FileOut]
    checkpoint: CheckpointOut | None = None
    calibration: CalibrationOut | None = None
    created_at: datetime = Field(examples=[EXAMPLE_TIME])

    @classmethod
    def of(cls, upload: UploadRow) -> Self:
        """The public form of a row."""
        calibration = None
        if upload.calibration_digest is not None:
            calibration = CalibrationOut(
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
