"""Request and response bodies of uploads."""

from datetime import datetime, timedelta
from typing import Annotated, Final, Self

from pydantic import BaseModel, ConfigDict, Field, Strict, model_validator

from deltadock.api.schemas import EXAMPLE_DIGEST, EXAMPLE_TIME, CheckpointOut, Digest, RequestBody
from deltadock.artifacts.checkpoint import KNOWN_SUFFIXES
from deltadock.names import NAME_PATTERN, PART_PATTERN, SOURCE_PATTERN
from deltadock.storage.blobs.parts import is_parted, part_bytes_for
from deltadock.storage.tables import UploadFileRow, UploadKind, UploadRow, UploadState

EXAMPLE_UPLOAD_ID: Final = "upl_k7wq2mzv5c3xj6nhy4tbr2dfsa"
MAX_FILES: Final = 2_000

_SUFFIXES: Final = "|".join(sorted(s.removeprefix(".") for s in KNOWN_SUFFIXES | {".jsonl"}))
FILE_PATTERN: Final = rf"^(?:[^./\\][^/\\]*/)*[^./\\][^/\\]*\.(?:{_SUFFIXES})$"
"""Of the paths of files, roughly; what is not a file of a checkpoint or a text is refused."""

Size = Annotated[int, Field(ge=0, lt=2**63, description="Bytes.", examples=[4_194_304])]


class FileIn(RequestBody):
    """A file that is going to be sent."""

    path: str = Field(
        examples=["model.safetensors"], max_length=255, json_schema_extra={"pattern": FILE_PATTERN}
    )
    size: Size
    sha256: Digest


class UploadIn(RequestBody):
    """A new upload, with or without a list of its files."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {"kind": "checkpoint"},
                {
                    "kind": "checkpoint",
                    "files": [{"path": "config.json", "size": 704, "sha256": EXAMPLE_DIGEST}],
                },
            ],
            "anyOf": [
                {"properties": {"source": {"type": "null"}}},
                {"properties": {"files": {"maxItems": 0}}},
            ],
        }
    )

    kind: Annotated[UploadKind, Strict(False)]
    files: list[FileIn] = Field(
        default=[],
        max_length=MAX_FILES,
        description="Files announced here can be sent in parts, and are not sent at all where "
        "you have uploaded the same bytes before. Others can be added.",
    )
    delta: str | None = Field(
        default=None,
        pattern=NAME_PATTERN,
        description="Name of the delta that it will become, project/model. If bytes must be sent, "
        "what that delta would be refused for is refused now: the tenant may have no more deltas "
        "or jobs, or the model was deleted. Quotas are left to the delta itself if the model has a "
        "version of this fine-tune, as the delta may be that.",
        examples=["maths/skills"],
    )
    base: str | None = Field(
        default=None,
        pattern=PART_PATTERN,
        description="Name of the base that it will become. If announced weights must be sent, a "
        "name that belongs to a checkpoint with other weights is refused now.",
        examples=["maths"],
    )
    source: str | None = Field(
        default=None,
        max_length=1000,
        pattern=SOURCE_PATTERN,
        description="Instead of files, a place that the server reads them from, if its operator "
        "allows it: `file:///folder`, `s3://bucket/prefix` or `hf://org/name@revision`. The upload "
        "completes by itself.",
    )

    @model_validator(mode="after")
    def _files_or_source(self) -> Self:
        if self.files and self.source is not None:
            raise ValueError("give either files or a source")
        return self


class PartsOut(BaseModel):
    """How a large file is sent: in parts, in parallel and in any order."""

    bytes: int = Field(description="Of each part but the last.", examples=[16_777_216])
    count: int = Field(description="Parts are numbered from 1 to this.", examples=[290])


class FileOut(BaseModel):
    """A file of an upload."""

    path: str = Field(examples=["model.safetensors"])
    size: int = Field(description="Bytes.", examples=[4_194_304])
    sha256: Digest = Field(description="Computed by the server, once stored; until then announced.")
    stored: bool = Field(description="Whether its bytes are here, hashed and checked.")
    parts: PartsOut | None = Field(
        default=None,
        description="For a large file that is not stored: send its parts, which "
        "`GET .../files/{path}/parts` lists. Any other is the body of one PUT.",
    )

    @classmethod
    def of(cls, file: UploadFileRow) -> Self:
        """Convert a row."""
        parts = None
        if not file.stored and is_parted(file.size):
            part_bytes = part_bytes_for(file.size)
            parts = PartsOut(bytes=part_bytes, count=-(-file.size // part_bytes))
        return cls(
            path=file.path, size=file.size, sha256=file.sha256, stored=file.stored, parts=parts
        )


class MissingPart(BaseModel):
    """A part to send."""

    number: int = Field(examples=[3])
    size: int = Field(description="Bytes.", examples=[16_777_216])
    url: str = Field(
        description="PUT the part here, as it is: a route of this api, or the object store's, "
        "which needs no key and is valid for an hour.",
        examples=[f"/v1/uploads/{EXAMPLE_UPLOAD_ID}/files/model.safetensors/parts/3"],
    )


class FilePartsOut(PartsOut):
    """The parts of one file."""

    arrived: list[int] = Field(description="Numbers of the parts that are here.", examples=[[1, 2]])
    missing: list[MissingPart] = Field(description="The first of the parts that are not.")


class PartOut(BaseModel):
    """A part that has arrived."""

    number: int = Field(examples=[3])
    size: int = Field(description="Bytes.", examples=[16_777_216])


class CalibrationTextOut(BaseModel):
    """A complete calibration text."""

    digest: Digest
    size: int = Field(description="Bytes.", examples=[65_536])


class UploadError(BaseModel):
    """Why an upload was not accepted. Everything else that was sent is kept."""

    code: str = Field(examples=["hash_mismatch"])
    message: str = Field(examples=["'model.safetensors' arrived with another SHA-256."])
    file: str | None = Field(description="The file to send again.", examples=["model.safetensors"])


class UploadOut(BaseModel):
    """An upload and, once complete, its checkpoint or calibration text."""

    id: str = Field(examples=[EXAMPLE_UPLOAD_ID])
    kind: UploadKind
    state: UploadState
    source: str | None = Field(
        default=None,
        description="Where its files are imported from.",
        examples=["hf://org/name@main"],
    )
    files: list[FileOut]
    percent: float | None = Field(
        default=None,
        description="While the upload is completing: share of the bytes that are hashed and "
        "checked.",
        examples=[42.5],
    )
    error: UploadError | None = Field(
        default=None,
        description="Why it was not accepted when it was last completed. While it is completing: "
        "why the last attempt failed, such as a store that does not answer; another one follows.",
    )
    checkpoint: CheckpointOut | None = None
    calibration: CalibrationTextOut | None = None
    ignored: list[str] = Field(
        default_factory=list,
        description="Files that are not the model's, and so not part of the checkpoint.",
        examples=[["trainer_state.json"]],
    )
    created_at: datetime = Field(examples=[EXAMPLE_TIME])
    expires_at: datetime | None = Field(
        default=None,
        description="When the unfinished upload and its parts are removed, unless there is "
        "activity before.",
        examples=[EXAMPLE_TIME],
    )

    @classmethod
    def of(cls, upload: UploadRow, ttl_seconds: float) -> Self:
        """Convert a row; an unfinished upload expires `ttl_seconds` after its last activity."""
        calibration = None
        if upload.calibration_digest is not None:
            calibration = CalibrationTextOut(
                digest=upload.calibration_digest, size=upload.files[0].size
            )
        percent = None
        if upload.state is UploadState.COMPLETING:
            total = upload.source_bytes or sum(file.size for file in upload.files)
            percent = round(100 * upload.done_bytes / max(total, 1), 1)
        unfinished = upload.state in {UploadState.OPEN, UploadState.COMPLETING}
        return cls(
            id=upload.id,
            kind=upload.kind,
            state=upload.state,
            source=upload.source,
            files=[FileOut.of(file) for file in upload.files],
            percent=percent,
            error=UploadError.model_validate(upload.error) if upload.error else None,
            checkpoint=CheckpointOut.of(upload.checkpoint) if upload.checkpoint else None,
            calibration=calibration,
            ignored=upload.ignored or [],
            created_at=upload.created_at,
            expires_at=upload.updated_at + timedelta(seconds=ttl_seconds) if unfinished else None,
        )


class UploadPage(BaseModel):
    """Uploads, newest first. `next` is the next page's `after`; null on the last page."""

    data: list[UploadOut]
    next: str | None = Field(description="Opaque.")
