"""The tables. Relationships refuse lazy loading: a repository says what it loads."""

from datetime import UTC, datetime
from enum import StrEnum
from typing import Any, ClassVar, Final

from sqlalchemy import (
    JSON,
    BigInteger,
    Enum,
    ForeignKey,
    Index,
    MetaData,
    String,
    Text,
    UniqueConstraint,
)
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column, relationship

from deltadock.storage.types import UtcDateTime


class UploadKind(StrEnum):
    """What an upload becomes when it is complete."""

    CHECKPOINT = "checkpoint"
    CALIBRATION = "calibration"


class UploadState(StrEnum):
    """Files may be added only while an upload is open."""

    OPEN = "open"
    COMPLETE = "complete"
    ABORTED = "aborted"


class JobState(StrEnum):
    """The life of a compression, in order; the last three are final."""

    QUEUED = "queued"
    VALIDATING = "validating"
    CALIBRATING = "calibrating"
    COMPRESSING = "compressing"
    ASSEMBLING = "assembling"
    VERIFYING = "verifying"
    READY = "ready"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def is_final(self) -> bool:
        """Whether a job in this state will never change again."""
        return self in FINAL_STATES


FINAL_STATES: Final = frozenset({JobState.READY, JobState.FAILED, JobState.CANCELLED})
RUNNING_ORDER: Final = tuple(state for state in JobState if state not in FINAL_STATES)
"""The states that a job passes through, in order."""


def _utcnow() -> datetime:
    return datetime.now(UTC)


def _enum(kind: type[StrEnum]) -> Enum:
    """A text column that holds the members' values, so that adding a member is no migration."""
    return Enum(
        kind,
        native_enum=False,
        length=16,
        values_callable=lambda members: [m.value for m in members],
    )


class TableRow(DeclarativeBase):
    """Root of the tables; constraints get names, so that migrations can address them."""

    metadata = MetaData(
        naming_convention={
            "ix": "ix_%(table_name)s_%(column_0_N_name)s",
            "uq": "uq_%(table_name)s_%(column_0_N_name)s",
            "fk": "fk_%(table_name)s_%(column_0_N_name)s",
            "pk": "pk_%(table_name)s",
        }
    )
    type_annotation_map: ClassVar[dict[Any, Any]] = {
        datetime: UtcDateTime,
        dict[str, Any]: JSON(none_as_null=True),
        list[dict[str, Any]]: JSON(none_as_null=True),
    }


class CheckpointRow(TableRow):
    """A complete checkpoint; `digest` is its manifest's, which is also the manifest's blob."""

    __tablename__ = "checkpoints"

    digest: Mapped[str] = mapped_column(String(64), primary_key=True)
    weights_digest: Mapped[str] = mapped_column(String(64), index=True)
    model_type: Mapped[str] = mapped_column(String(64))
    total_bytes: Mapped[int] = mapped_column(BigInteger)
    created_at: Mapped[datetime] = mapped_column(default=_utcnow)


class BaseRow(TableRow):
    """A checkpoint that deltas may be made against, under a name."""

    __tablename__ = "bases"

    id: Mapped[str] = mapped_column(String(40), primary_key=True)
    name: Mapped[str] = mapped_column(String(96), unique=True)
    checkpoint_digest: Mapped[str] = mapped_column(ForeignKey("checkpoints.digest"))
    created_at: Mapped[datetime] = mapped_column(default=_utcnow)

    checkpoint: Mapped[CheckpointRow] = relationship(lazy="raise")


class UploadRow(TableRow):
    """Files on their way to become a checkpoint or a calibration text."""

    __tablename__ = "uploads"

    id: Mapped[str] = mapped_column(String(40), primary_key=True)
    kind: Mapped[UploadKind] = mapped_column(_enum(UploadKind))
    state: Mapped[UploadState] = mapped_column(_enum(UploadState), default=UploadState.OPEN)
    checkpoint_digest: Mapped[str | None] = mapped_column(ForeignKey("checkpoints.digest"))
    calibration_digest: Mapped[str | None] = mapped_column(String(64), index=True)
    created_at: Mapped[datetime] = mapped_column(default=_utcnow)
    updated_at: Mapped[datetime] = mapped_column(default=_utcnow)

    files: Mapped[list["UploadFileRow"]] = relationship(lazy="raise", order_by="UploadFileRow.path")
    checkpoint: Mapped[CheckpointRow | None] = relationship(lazy="raise")


class UploadFileRow(TableRow):
    """One file that arrived whole; `tensors` is what its safetensors header holds."""

    __tablename__ = "upload_files"

    upload_id: Mapped[str] = mapped_column(
        ForeignKey("uploads.id", ondelete="CASCADE"), primary_key=True
    )
    path: Mapped[str] = mapped_column(String(255), primary_key=True)
    size: Mapped[int] = mapped_column(BigInteger)
    sha256: Mapped[str] = mapped_column(String(64))
    tensors: Mapped[list[dict[str, Any]]]


class DeltaRow(TableRow):
    """A fine-tune kept as its difference from a base, under `name` and an integer version."""

    __tablename__ = "deltas"
    __table_args__ = (
        # A deleted row keeps its name and version: they are never given to other bytes.
        UniqueConstraint("name", "version"),
        Index("ix_deltas_created_at_id", "created_at", "id"),
    )

    id: Mapped[str] = mapped_column(String(40), primary_key=True)
    name: Mapped[str] = mapped_column(String(200))
    version: Mapped[int]
    base_id: Mapped[str] = mapped_column(ForeignKey("bases.id"), index=True)
    checkpoint_digest: Mapped[str] = mapped_column(ForeignKey("checkpoints.digest"))
    method: Mapped[str] = mapped_column(String(32))
    bits: Mapped[float | None]
    options: Mapped[dict[str, Any]]
    """`seed`, `solver`, `goal` ({kind, value}, or null for a method of one size), `calibration`
    ({sources: [{digest or null, weight}], tokens, length}, or null)."""
    fingerprint: Mapped[str] = mapped_column(String(64), index=True)
    """SHA-256 (hex) over everything that determines the artifact: the same again is no new work."""
    artifact_digest: Mapped[str | None] = mapped_column(String(64))
    artifact_bytes: Mapped[int | None] = mapped_column(BigInteger)
    report: Mapped[dict[str, Any] | None]
    created_at: Mapped[datetime] = mapped_column(default=_utcnow)
    deleted_at: Mapped[datetime | None]

    base: Mapped[BaseRow] = relationship(lazy="raise")
    job: Mapped["JobRow"] = relationship(lazy="raise", back_populates="delta")


class JobRow(TableRow):
    """The truth about one delta's compression; workers change it only while they hold the lease."""

    __tablename__ = "jobs"

    id: Mapped[str] = mapped_column(String(40), primary_key=True)
    delta_id: Mapped[str] = mapped_column(ForeignKey("deltas.id"), unique=True)
    state: Mapped[JobState] = mapped_column(_enum(JobState), default=JobState.QUEUED, index=True)
    stage_block: Mapped[int] = mapped_column(default=0)
    stage_blocks: Mapped[int] = mapped_column(default=0)
    percent: Mapped[float] = mapped_column(default=0.0)
    message: Mapped[str] = mapped_column(Text, default="")
    error_code: Mapped[str | None] = mapped_column(String(64))
    error_message: Mapped[str | None] = mapped_column(Text)
    cancel_requested: Mapped[bool] = mapped_column(default=False)
    lease_owner: Mapped[str | None] = mapped_column(String(128))
    lease_expires_at: Mapped[datetime | None]
    attempt: Mapped[int] = mapped_column(default=0)
    sent_at: Mapped[datetime] = mapped_column(default=_utcnow)
    """When its task was last handed to the broker, or was about to be."""
    created_at: Mapped[datetime] = mapped_column(default=_utcnow)
    updated_at: Mapped[datetime] = mapped_column(default=_utcnow)
    finished_at: Mapped[datetime | None]

    delta: Mapped[DeltaRow] = relationship(lazy="raise", back_populates="job")


class NodeRow(TableRow):
    """An inference node, as it told of itself last; not told again, it is gone at `expires_at`."""

    __tablename__ = "nodes"

    id: Mapped[str] = mapped_column(String(40), primary_key=True)
    url: Mapped[str] = mapped_column(String(255), index=True)
    base_digest: Mapped[str | None] = mapped_column(String(64))
    """The base in its memory; None before the first request."""
    adopts: Mapped[bool]
    """Whether it changes its base to what requests name."""
    draining: Mapped[bool]
    """Whether it only finishes what runs."""
    capacity: Mapped[int]
    """Sequences that it takes at once, running and waiting."""
    admitted: Mapped[int]
    """Sequences that it has."""
    delta_slots: Mapped[int]
    deltas: Mapped[list[dict[str, Any]]]
    """[{digest, tier, bytes, references, pinned}], each in the fastest tier that has it."""
    started_at: Mapped[datetime] = mapped_column(default=_utcnow)
    seen_at: Mapped[datetime]
    expires_at: Mapped[datetime]
