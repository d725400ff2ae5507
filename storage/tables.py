"""The tables. Relationships raise on lazy loading: repositories load what they need explicitly."""

from datetime import UTC, datetime
from enum import StrEnum
from typing import Any, ClassVar, Final

from sqlalchemy import (
    JSON,
    BigInteger,
    DateTime,
    Dialect,
    Enum,
    ForeignKey,
    Index,
    Integer,
    MetaData,
    String,
    Text,
    TypeDecorator,
    UniqueConstraint,
    text,
)
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column, relationship

from deltadock.storage.documents import DeltaOptions, HeldDelta


class Scope(StrEnum):
    """What an API key may be used for."""

    READ = "read"
    """List, inspect and download."""
    WRITE = "write"
    """Upload, register, compress, cancel and delete."""
    INFER = "infer"
    """Generate text."""
    ADMIN = "admin"
    """Make and revoke the tenant's keys; of the operator's tenant: make tenants."""


class UploadKind(StrEnum):
    """What a completed upload becomes."""

    CHECKPOINT = "checkpoint"
    CALIBRATION = "calibration"


class UploadState(StrEnum):
    """Files can be added only to an open upload; one that is not accepted is open again."""

    OPEN = "open"
    COMPLETING = "completing"
    """Its bytes are hashed and checked, in the background."""
    COMPLETE = "complete"
    DROPPED = "dropped"
    """It was complete; by the project's rule, or because nothing needs them, its bytes are gone."""
    ABORTED = "aborted"


class JobState(StrEnum):
    """States of a compression job, in order; the last three are final."""

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
        """Whether a job in this state can no longer change."""
        return self in FINAL_STATES


class JobPriority(StrEnum):
    """Order in which a tenant's queued jobs start; equal ones start as they were sent."""

    HIGH = "high"
    NORMAL = "normal"
    LOW = "low"


class WebhookEvent(StrEnum):
    """What webhooks are told."""

    DELTA_READY = "delta.ready"
    DELTA_FAILED = "delta.failed"
    ALIAS_MOVED = "alias.moved"


class AuditAction(StrEnum):
    """What the audit log records."""

    KEY_CREATE = "key.create"
    KEY_ROTATE = "key.rotate"
    KEY_REVOKE = "key.revoke"
    SIGN_IN = "session.start"
    SIGN_OUT = "session.end"
    TENANT_CREATE = "tenant.create"
    TENANT_CHANGE = "tenant.change"
    BASE_CREATE = "base.create"
    BASE_CHANGE = "base.change"
    BASE_DELETE = "base.delete"
    BASE_RESTORE = "base.restore"
    UPLOAD_CREATE = "upload.create"
    UPLOAD_FILE = "upload.file"
    UPLOAD_COMPLETE = "upload.complete"
    UPLOAD_ABORT = "upload.abort"
    UPLOAD_DROP = "upload.drop"
    """By a rule of retention."""
    DELTA_CREATE = "delta.create"
    DELTA_DELETE = "delta.delete"
    DELTA_RESTORE = "delta.restore"
    DELTA_COLLECT = "delta.collect"
    """Its bytes are given up: it can no longer be restored."""
    BLOB_REMOVE = "blob.remove"
    MODEL_CHANGE = "model.change"
    MODEL_DELETE = "model.delete"
    ALIAS_MOVE = "alias.move"
    JOB_CANCEL = "job.cancel"
    JOB_RETRY = "job.retry"
    JOB_END = "job.end"
    NODE_DRAIN = "node.drain"
    NODE_RESUME = "node.resume"
    NODE_EVICT = "node.evict"
    RETENTION_CHANGE = "retention.change"
    WEBHOOK_CREATE = "webhook.create"
    WEBHOOK_DELETE = "webhook.delete"
    WEBHOOK_RESEND = "webhook.resend"
    RESTORE = "database.restore"
    REQUEST = "request"
    """A request to change something that the key's scopes do not allow."""


class AuditOrigin(StrEnum):
    """What made a change."""

    REQUEST = "request"
    """A request to the api."""
    COMMAND = "command"
    """A `deltadock` command, in the database directly."""
    SYSTEM = "system"
    """A worker, or the api in the background."""


class DeliveryState(StrEnum):
    """States of a message to a webhook; the last two are final."""

    PENDING = "pending"
    DELIVERED = "delivered"
    FAILED = "failed"


FINAL_STATES: Final = frozenset({JobState.READY, JobState.FAILED, JobState.CANCELLED})
UNSUCCESSFUL: Final = (JobState.FAILED, JobState.CANCELLED)
"""The final states from which a job can be retried."""
RUNNING_ORDER: Final = tuple(state for state in JobState if state not in FINAL_STATES)
"""The non-final states, in order."""


def _utcnow() -> datetime:
    return datetime.now(UTC)


def _enum(kind: type[StrEnum]) -> Enum:
    """A text column of the members' values, so that adding a member needs no migration."""
    return Enum(
        kind,
        native_enum=False,
        length=16,
        values_callable=lambda members: [m.value for m in members],
    )


class UtcDateTime(TypeDecorator[datetime]):
    """A timezone-aware UTC datetime on every database (SQLite stores no time zones)."""

    impl = DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        """Normalise to UTC; SQLite stores the naive form, which sorts chronologically.

        Raises:
            ValueError: `value` is naive.
        """
        if value is None:
            return None
        if value.tzinfo is None:
            raise ValueError("A datetime without a time zone cannot be stored.")
        value = value.astimezone(UTC)
        return value.replace(tzinfo=None) if dialect.name == "sqlite" else value

    def process_result_value(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        """Attach the UTC time zone."""
        if value is None:
            return None
        return value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)


def _only(condition: str) -> dict[str, Any]:
    """Arguments of an index of the rows that meet the condition only."""
    return {"sqlite_where": text(condition), "postgresql_where": text(condition)}


class TableRow(DeclarativeBase):
    """Declarative base; constraints are named so that migrations can refer to them."""

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
        list[str]: JSON(none_as_null=True),
        DeltaOptions: JSON(none_as_null=True),
        list[HeldDelta]: JSON(none_as_null=True),
    }


class TenantRow(TableRow):
    """An organisation that owns bases, uploads and deltas; a limit that is None is none."""

    __tablename__ = "tenants"

    id: Mapped[str] = mapped_column(String(40), primary_key=True)
    name: Mapped[str] = mapped_column(String(96), unique=True)
    is_operator: Mapped[bool] = mapped_column(default=False)
    """Whether its admin keys may make tenants and share bases."""
    max_bytes: Mapped[int | None] = mapped_column(BigInteger)
    max_deltas: Mapped[int | None]
    max_jobs: Mapped[int | None]
    """Unfinished jobs at once."""
    requests_per_minute: Mapped[int | None]
    tokens_per_minute: Mapped[int | None]
    created_at: Mapped[datetime] = mapped_column(default=_utcnow)
    served_at: Mapped[datetime | None]
    """When a worker last began one of its jobs, other than to go on with it."""


class TotalsRow(TableRow):
    """A tenant's totals, kept by the repositories in the transaction of each change.

    Artifacts, and checkpoints of deltas and bases, are counted once however many rows share them.
    """

    __tablename__ = "totals"

    tenant_id: Mapped[str] = mapped_column(ForeignKey("tenants.id"), primary_key=True)
    deltas: Mapped[int] = mapped_column(default=0)
    """Ready deltas."""
    all_deltas: Mapped[int] = mapped_column(default=0)
    """Deltas in any state."""
    artifact_bytes: Mapped[int] = mapped_column(BigInteger, default=0)
    checkpoint_bytes: Mapped[int] = mapped_column(BigInteger, default=0)
    """Of the fine-tuned checkpoints of the ready deltas."""
    base_bytes: Mapped[int] = mapped_column(BigInteger, default=0)
    stored_bytes: Mapped[int] = mapped_column(BigInteger, default=0)
    """Of the blobs that the tenant uses."""


class BlobUseRow(TableRow):
    """How many of a tenant's files and artifacts are one blob, stored or announced."""

    __tablename__ = "blob_uses"

    tenant_id: Mapped[str] = mapped_column(ForeignKey("tenants.id"), primary_key=True)
    digest: Mapped[str] = mapped_column(String(64), primary_key=True)
    size: Mapped[int] = mapped_column(BigInteger, primary_key=True, autoincrement=False)
    """As announced, until the bytes are stored and hashed."""
    uses: Mapped[int]


class DamagedBlobRow(TableRow):
    """A blob that was found damaged, until its bytes arrive again."""

    __tablename__ = "damaged_blobs"

    digest: Mapped[str] = mapped_column(String(64), primary_key=True)


class ApiKeyRow(TableRow):
    """An API key. Only an HMAC of it is stored; `prefix` is its readable start."""

    __tablename__ = "api_keys"
    __table_args__ = (
        Index("ix_api_keys_tenant_id_created_at_id", "tenant_id", "created_at", "id"),
    )

    id: Mapped[str] = mapped_column(String(40), primary_key=True)
    tenant_id: Mapped[str] = mapped_column(ForeignKey("tenants.id"))
    name: Mapped[str] = mapped_column(String(96))
    prefix: Mapped[str] = mapped_column(String(16), unique=True)
    hmac: Mapped[str] = mapped_column(String(64))
    """HMAC-SHA256 (hex) of the whole key under the server's secret."""
    scopes: Mapped[list[str]]
    created_at: Mapped[datetime] = mapped_column(default=_utcnow)
    expires_at: Mapped[datetime | None]
    revoked_at: Mapped[datetime | None]
    last_used_at: Mapped[datetime | None]

    tenant: Mapped[TenantRow] = relationship(lazy="raise")


class CheckpointRow(TableRow):
    """A complete checkpoint. `digest` is the SHA-256 of its manifest, a blob of the same name."""

    __tablename__ = "checkpoints"

    digest: Mapped[str] = mapped_column(String(64), primary_key=True)
    weights_digest: Mapped[str] = mapped_column(String(64), index=True)
    model_type: Mapped[str] = mapped_column(String(64))
    total_bytes: Mapped[int] = mapped_column(BigInteger)
    has_chat_template: Mapped[bool | None]
    """None: an adapter that takes its base's, or a checkpoint of before revision 0018."""
    created_at: Mapped[datetime] = mapped_column(default=_utcnow)


class BaseRow(TableRow):
    """A checkpoint registered under a name, against which deltas are compressed."""

    __tablename__ = "bases"
    __table_args__ = (
        UniqueConstraint("tenant_id", "name"),
        Index("ix_bases_shared_name_id", "shared", "name", "id"),
        Index("ix_bases_checkpoint_digest_tenant_id", "checkpoint_digest", "tenant_id"),
    )

    id: Mapped[str] = mapped_column(String(40), primary_key=True)
    tenant_id: Mapped[str] = mapped_column(ForeignKey("tenants.id"))
    name: Mapped[str] = mapped_column(String(96))
    shared: Mapped[bool] = mapped_column(default=False)
    """Whether every tenant may read it and compress against it."""
    checkpoint_digest: Mapped[str] = mapped_column(ForeignKey("checkpoints.digest"))
    created_at: Mapped[datetime] = mapped_column(default=_utcnow)
    deleted_at: Mapped[datetime | None]

    checkpoint: Mapped[CheckpointRow] = relationship(lazy="raise")


class UploadRow(TableRow):
    """Files uploaded to become a checkpoint or a calibration text."""

    __tablename__ = "uploads"
    __table_args__ = (
        # Checkpoints belong to the tenants that uploaded them.
        Index("ix_uploads_tenant_id_checkpoint_digest", "tenant_id", "checkpoint_digest"),
        Index("ix_uploads_tenant_id_created_at_id", "tenant_id", "created_at", "id"),
        Index(
            "ix_uploads_unfinished_updated_at",
            "updated_at",
            **_only("state IN ('open', 'completing')"),
        ),
        Index("ix_uploads_checkpoint_digest", "checkpoint_digest"),
    )

    id: Mapped[str] = mapped_column(String(40), primary_key=True)
    tenant_id: Mapped[str] = mapped_column(ForeignKey("tenants.id"))
    kind: Mapped[UploadKind] = mapped_column(_enum(UploadKind))
    state: Mapped[UploadState] = mapped_column(_enum(UploadState), default=UploadState.OPEN)
    checkpoint_digest: Mapped[str | None] = mapped_column(ForeignKey("checkpoints.digest"))
    calibration_digest: Mapped[str | None] = mapped_column(String(64), index=True)
    source: Mapped[str | None] = mapped_column(Text)
    """The URI that its files are imported from, if they are."""
    source_bytes: Mapped[int | None] = mapped_column(BigInteger)
    """Of all files of the source."""
    ignored: Mapped[list[str] | None]
    """Paths of stored files that are not part of the checkpoint."""
    done_bytes: Mapped[int] = mapped_column(BigInteger, default=0)
    """While the upload is completing: bytes of its files that are hashed and checked."""
    error: Mapped[dict[str, Any] | None]
    """{code, message, file or null}: why it was not accepted when it was last completed.

    While it is completing: why the last attempt failed, and how many did in a row (`retries`)."""
    lease_owner: Mapped[str | None] = mapped_column(String(128))
    """The process that hashes it."""
    lease_expires_at: Mapped[datetime | None]
    created_at: Mapped[datetime] = mapped_column(default=_utcnow)
    updated_at: Mapped[datetime] = mapped_column(default=_utcnow)

    files: Mapped[list["UploadFileRow"]] = relationship(lazy="raise", order_by="UploadFileRow.path")
    checkpoint: Mapped[CheckpointRow | None] = relationship(lazy="raise")


class UploadFileRow(TableRow):
    """One file of an upload, whose bytes may be yet to come."""

    __tablename__ = "upload_files"

    upload_id: Mapped[str] = mapped_column(
        ForeignKey("uploads.id", ondelete="CASCADE"), primary_key=True
    )
    path: Mapped[str] = mapped_column(String(255), primary_key=True)
    size: Mapped[int] = mapped_column(BigInteger)
    sha256: Mapped[str] = mapped_column(String(64), index=True)
    """As announced, until the bytes are stored and hashed."""
    tensors: Mapped[list[dict[str, Any]]] = mapped_column(deferred=True, deferred_raiseload=True)
    """The tensors of a stored safetensors file, up to megabytes of JSON."""
    stored: Mapped[bool] = mapped_column(default=True)
    """Whether the bytes were checked and are a blob."""
    parts_token: Mapped[str | None] = mapped_column(Text)
    """Names the file's parts in the blob store, once the first was asked for."""
    source_version: Mapped[str | None] = mapped_column(Text)
    """Of an imported file: what its source told it by."""


class ModelRow(TableRow):
    """A name, `project/model`: the versions under it are deltas."""

    __tablename__ = "models"
    # Deleted rows keep their name, so that it is not reused.
    __table_args__ = (UniqueConstraint("tenant_id", "name"),)

    id: Mapped[str] = mapped_column(String(40), primary_key=True)
    tenant_id: Mapped[str] = mapped_column(ForeignKey("tenants.id"))
    name: Mapped[str] = mapped_column(String(200))
    description: Mapped[str] = mapped_column(
        Text, default="", deferred=True, deferred_raiseload=True
    )
    """The model card, in Markdown."""
    tags: Mapped[list[str]] = mapped_column(default=list)
    rule: Mapped[dict[str, Any] | None]
    """When a new version becomes the default: `max_kl` and `max_increase` of the KL; None: only
    the first one does."""
    last_version: Mapped[int] = mapped_column(default=0)
    created_at: Mapped[datetime] = mapped_column(default=_utcnow)
    deleted_at: Mapped[datetime | None]


class TermKind(StrEnum):
    """What a term of a model is."""

    TAG = "tag"
    WORD = "word"
    """Of its name or description, in lower case."""


class ModelTermRow(TableRow):
    """A model's tag, or a word that it is found by."""

    __tablename__ = "model_terms"
    __table_args__ = (Index("ix_model_terms_model_id_kind_term", "model_id", "kind", "term"),)

    tenant_id: Mapped[str] = mapped_column(ForeignKey("tenants.id"), primary_key=True)
    kind: Mapped[TermKind] = mapped_column(_enum(TermKind), primary_key=True)
    term: Mapped[str] = mapped_column(String(64), primary_key=True)
    model_id: Mapped[str] = mapped_column(ForeignKey("models.id"), primary_key=True)


class AliasRow(TableRow):
    """What `project/model@alias` means now; the bare name means the alias `default`."""

    __tablename__ = "aliases"

    model_id: Mapped[str] = mapped_column(ForeignKey("models.id"), primary_key=True)
    alias: Mapped[str] = mapped_column(String(64), primary_key=True)
    delta_id: Mapped[str] = mapped_column(ForeignKey("deltas.id"), index=True)
    version: Mapped[int]
    """The delta's."""
    last_contender: Mapped[int | None]
    """Of a default that the first ready version became: the highest version that was pushed by
    then; a better one up to it replaces it. None: a person or a rule has decided."""
    moved_at: Mapped[datetime]


class AliasMoveRow(TableRow):
    """One move of an alias: append-only. A version of None is no version."""

    __tablename__ = "alias_moves"
    __table_args__ = (Index("ix_alias_moves_model_id_id", "model_id", "id"),)

    id: Mapped[int] = mapped_column(
        BigInteger().with_variant(Integer, "sqlite"), primary_key=True, autoincrement=True
    )
    model_id: Mapped[str] = mapped_column(ForeignKey("models.id"))
    alias: Mapped[str] = mapped_column(String(64))
    from_version: Mapped[int | None]
    to_version: Mapped[int | None]
    reason: Mapped[str] = mapped_column(Text)
    moved_by: Mapped[str | None] = mapped_column(String(40))
    """The id of an API key; None: the model's rule, or the first version."""
    at: Mapped[datetime]


_NOT_DELETED: Final = _only("deleted_at IS NULL")


class DeltaRow(TableRow):
    """A fine-tune stored as its delta to a base, under `name` and an integer version."""

    __tablename__ = "deltas"
    __table_args__ = (
        # Deleted rows keep their name and version, so that neither is reused for other bytes.
        UniqueConstraint("tenant_id", "name", "version"),
        # Lists: one index per sort and per filter (storage/repositories/listing.py).
        *(
            Index(f"ix_deltas_tenant_id_{'_'.join(columns)}", "tenant_id", *columns, **_NOT_DELETED)
            for columns in (
                ("created_at", "id"),
                ("method", "created_at", "id"),
                ("created_by", "created_at", "id"),
                ("artifact_bytes", "id"),
                ("kl", "id"),
            )
        ),
        Index(
            "ix_deltas_tenant_id_base_id_created_at_id", "tenant_id", "base_id", "created_at", "id"
        ),
        Index("ix_deltas_model_id", "model_id"),
        # To be collected.
        Index(
            "ix_deltas_deleted_at",
            "deleted_at",
            **_only("deleted_at IS NOT NULL AND collected_at IS NULL"),
        ),
        # Who shares these bytes; and of a fine-tune also the deleted deltas that may need it.
        Index(
            "ix_deltas_artifact_digest_tenant_id", "artifact_digest", "tenant_id", **_NOT_DELETED
        ),
        Index("ix_deltas_checkpoint_digest_tenant_id", "checkpoint_digest", "tenant_id"),
    )

    id: Mapped[str] = mapped_column(String(40), primary_key=True)
    tenant_id: Mapped[str] = mapped_column(ForeignKey("tenants.id"))
    model_id: Mapped[str] = mapped_column(ForeignKey("models.id"))
    name: Mapped[str] = mapped_column(String(200))
    """The model's."""
    version: Mapped[int]
    base_id: Mapped[str] = mapped_column(ForeignKey("bases.id"))
    checkpoint_digest: Mapped[str] = mapped_column(ForeignKey("checkpoints.digest"))
    method: Mapped[str] = mapped_column(String(32))
    bits: Mapped[float | None]
    options: Mapped[DeltaOptions]
    fingerprint: Mapped[str] = mapped_column(String(64), index=True)
    """SHA-256 (hex) of all inputs that determine the artifact; equal requests of a
    tenant share one result."""
    artifact_digest: Mapped[str | None] = mapped_column(String(64), index=True)
    artifact_bytes: Mapped[int | None] = mapped_column(BigInteger)
    report: Mapped[dict[str, Any] | None] = mapped_column(deferred=True, deferred_raiseload=True)
    """Tens of kilobytes: read by `DeltaRepository.report` alone; the figures follow."""
    ratio: Mapped[float | None]
    true_bits: Mapped[float | None]
    kl: Mapped[float | None]
    agreement: Mapped[float | None]
    nll: Mapped[float | None]
    nll_finetuned: Mapped[float | None]
    nll_base: Mapped[float | None]
    parent_id: Mapped[str | None] = mapped_column(ForeignKey("deltas.id"))
    """The delta that the fine-tune continues, as its owner says."""
    recipe: Mapped[dict[str, Any] | None] = mapped_column(deferred=True, deferred_raiseload=True)
    """How the fine-tune was trained, as its owner says."""
    code_version: Mapped[str | None] = mapped_column(String(32))
    """Of Deltadock, when it was asked for."""
    code_commit: Mapped[str | None] = mapped_column(String(64))
    """Of the training code, as the client says."""
    created_by: Mapped[str | None] = mapped_column(String(40))
    """The id of the API key that asked for it."""
    created_at: Mapped[datetime] = mapped_column(default=_utcnow)
    deleted_at: Mapped[datetime | None]
    collected_at: Mapped[datetime | None]
    """When its bytes were given up, days after it was deleted; until then it can be restored."""

    base: Mapped[BaseRow] = relationship(lazy="raise")
    aliases: Mapped[list[AliasRow]] = relationship(
        lazy="raise", viewonly=True, order_by="AliasRow.alias"
    )
    """Those that mean this version."""
    default: Mapped[AliasRow | None] = relationship(
        lazy="raise",
        viewonly=True,
        primaryjoin="and_(foreign(DeltaRow.model_id) == AliasRow.model_id, "
        "AliasRow.alias == 'default')",
    )
    """What the bare name means."""
    job: Mapped["JobRow"] = relationship(lazy="raise", back_populates="delta")

    @property
    def alias_names(self) -> list[str]:
        """The aliases that mean this version."""
        return [alias.alias for alias in self.aliases]

    @property
    def default_version(self) -> int | None:
        """The version that the bare name means."""
        return self.default.version if self.default else None


class JobRow(TableRow):
    """The authoritative state of one compression; workers update it only under the lease."""

    __tablename__ = "jobs"
    __table_args__ = (
        # A job's time of creation is its delta's, so that both lists have one order.
        Index("ix_jobs_tenant_id_created_at_delta_id", "tenant_id", "created_at", "delta_id"),
        Index(
            "ix_jobs_tenant_id_state_created_at_delta_id",
            "tenant_id", "state", "created_at", "delta_id",
        ),
        # The queue.
        Index("ix_jobs_state_priority_sent_at_id", "state", "priority", "sent_at", "id"),
        Index(
            "ix_jobs_begun_sent_at_id", "sent_at", "id",
            **_only("started_at IS NOT NULL AND finished_at IS NULL"),
        ),
        Index(
            "ix_jobs_waiting_tenant_id_priority_sent_at_id",
            "tenant_id", "priority", "sent_at", "id",
            **_only("started_at IS NULL AND finished_at IS NULL"),
        ),
    )  # fmt: skip

    id: Mapped[str] = mapped_column(String(40), primary_key=True)
    tenant_id: Mapped[str] = mapped_column(ForeignKey("tenants.id"))
    """Its delta's."""
    delta_id: Mapped[str] = mapped_column(ForeignKey("deltas.id"), unique=True)
    state: Mapped[JobState] = mapped_column(_enum(JobState), default=JobState.QUEUED)
    priority: Mapped[JobPriority] = mapped_column(_enum(JobPriority), default=JobPriority.NORMAL)
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
    """When it was created or retried, and its task sent to the broker."""
    created_at: Mapped[datetime] = mapped_column(default=_utcnow)
    updated_at: Mapped[datetime] = mapped_column(default=_utcnow)
    started_at: Mapped[datetime | None]
    """When a worker first started it; for a retried job, since the retry."""
    idle_seconds: Mapped[float] = mapped_column(default=0.0, server_default="0")
    """In which it had no worker, from then until it was acquired last."""
    expected_at: Mapped[datetime | None]
    """When it will finish at its rate so far; None until that is known."""
    finished_at: Mapped[datetime | None]

    delta: Mapped[DeltaRow] = relationship(lazy="raise", back_populates="job")


class JobLogRow(TableRow):
    """One line of a job's log; a job keeps its newest lines."""

    __tablename__ = "job_log"
    __table_args__ = (Index("ix_job_log_job_id_id", "job_id", "id"),)

    id: Mapped[int] = mapped_column(
        BigInteger().with_variant(Integer, "sqlite"), primary_key=True, autoincrement=True
    )
    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id", ondelete="CASCADE"))
    at: Mapped[datetime]
    message: Mapped[str] = mapped_column(Text)


class NodeRow(TableRow):
    """An inference node's last heartbeat; the registration expires at `expires_at`."""

    __tablename__ = "nodes"

    id: Mapped[str] = mapped_column(String(40), primary_key=True)
    url: Mapped[str] = mapped_column(String(255), index=True)
    base_digest: Mapped[str | None] = mapped_column(String(64))
    """Checkpoint digest of the loaded base; None if none is loaded yet."""
    adopts: Mapped[bool]
    """Whether it loads whichever base requests name."""
    draining: Mapped[bool]
    """Whether it only finishes running requests."""
    capacity: Mapped[int]
    """Maximum sequences, running and waiting."""
    admitted: Mapped[int]
    """Current sequences, running and waiting."""
    delta_slots: Mapped[int]
    context_tokens: Mapped[int | None]
    """Of the longest sequence, the answer included; None: its version reports none."""
    deltas: Mapped[list[HeldDelta]]
    usage: Mapped[dict[str, Any] | None]
    """Throughput, latency and memory, see `NodeSampleRow`; None: its version reports none."""
    sampled_at: Mapped[datetime | None]
    """Of its last sample."""
    started_at: Mapped[datetime] = mapped_column(default=_utcnow)
    seen_at: Mapped[datetime]
    expires_at: Mapped[datetime]


class NodeSampleRow(TableRow):
    """What a node reported at one moment of the last hour."""

    __tablename__ = "node_samples"
    __table_args__ = (Index("ix_node_samples_at", "at"),)

    node_id: Mapped[str] = mapped_column(String(40), primary_key=True)
    at: Mapped[datetime] = mapped_column(primary_key=True)
    admitted: Mapped[int]
    """Sequences, running and waiting."""
    device: Mapped[int]
    host: Mapped[int]
    disk: Mapped[int]
    """Deltas by the fastest tier that holds them."""
    tokens_per_second: Mapped[float]
    """Generated."""
    first_token_seconds: Mapped[float | None]
    inter_token_seconds: Mapped[float | None]
    """Means; None: there was no token."""
    memory_bytes: Mapped[int | None] = mapped_column(BigInteger)
    memory_limit: Mapped[int | None] = mapped_column(BigInteger)


class IdempotencyRow(TableRow):
    """The first answer to a creating request with an Idempotency-Key."""

    __tablename__ = "idempotency_keys"

    tenant_id: Mapped[str] = mapped_column(ForeignKey("tenants.id"), primary_key=True)
    key: Mapped[str] = mapped_column(String(255), primary_key=True)
    fingerprint: Mapped[str] = mapped_column(String(64))
    """SHA-256 (hex) of the route and the body."""
    status: Mapped[int | None]
    """None: the route's own."""
    location: Mapped[str | None] = mapped_column(String(255))
    body: Mapped[dict[str, Any]]
    created_at: Mapped[datetime] = mapped_column(default=_utcnow, index=True)


class WebhookRow(TableRow):
    """A tenant's URL that is told about events."""

    __tablename__ = "webhooks"

    id: Mapped[str] = mapped_column(String(40), primary_key=True)
    tenant_id: Mapped[str] = mapped_column(ForeignKey("tenants.id"), index=True)
    url: Mapped[str] = mapped_column(String(2048))
    events: Mapped[list[str]]
    secret: Mapped[str] = mapped_column(String(64))
    """`whsec_` and base64; messages are signed with it, so it is kept as it is."""
    created_at: Mapped[datetime] = mapped_column(default=_utcnow)


class DeliveryRow(TableRow):
    """A message to a webhook, written in the transaction of its event and sent by the workers."""

    __tablename__ = "webhook_deliveries"
    __table_args__ = (
        Index("ix_webhook_deliveries_webhook_id_created_at_id", "webhook_id", "created_at", "id"),
        Index("ix_webhook_deliveries_state_next_attempt_at", "state", "next_attempt_at"),
    )

    id: Mapped[str] = mapped_column(String(40), primary_key=True)
    webhook_id: Mapped[str] = mapped_column(ForeignKey("webhooks.id", ondelete="CASCADE"))
    event: Mapped[WebhookEvent] = mapped_column(_enum(WebhookEvent))
    body: Mapped[str] = mapped_column(Text)
    """The JSON that is sent and signed."""
    state: Mapped[DeliveryState] = mapped_column(
        _enum(DeliveryState), default=DeliveryState.PENDING
    )
    attempts: Mapped[int] = mapped_column(default=0)
    next_attempt_at: Mapped[datetime | None]
    status: Mapped[int | None]
    """HTTP status of the last answer; None if there was none."""
    error: Mapped[str | None] = mapped_column(Text)
    """Why the last attempt failed."""
    created_at: Mapped[datetime] = mapped_column(default=_utcnow)
    delivered_at: Mapped[datetime | None]

    webhook: Mapped[WebhookRow] = relationship(lazy="raise")


class RetentionRow(TableRow):
    """A project's rule for the fine-tunes that its deltas were made of."""

    __tablename__ = "retention_rules"

    tenant_id: Mapped[str] = mapped_column(ForeignKey("tenants.id"), primary_key=True)
    project: Mapped[str] = mapped_column(String(96), primary_key=True)
    rule: Mapped[str] = mapped_column(String(16))
    """`keep`, `ready` (drop once the delta is ready), or a number of days after that."""


class AuditRow(TableRow):
    """One change, written in its transaction. Triggers refuse to update and delete these rows.

    No foreign keys: a record outlives what it names.
    """

    __tablename__ = "audit_log"
    __table_args__ = (
        Index("ix_audit_log_tenant_id_id", "tenant_id", "id"),
        Index("ix_audit_log_tenant_id_action_id", "tenant_id", "action", "id"),
        Index("ix_audit_log_tenant_id_object_id_id", "tenant_id", "object_id", "id"),
        Index("ix_audit_log_tenant_id_by_key_id_id", "tenant_id", "by_key_id", "id"),
    )

    id: Mapped[int] = mapped_column(
        BigInteger().with_variant(Integer, "sqlite"), primary_key=True, autoincrement=True
    )
    at: Mapped[datetime]
    tenant_id: Mapped[str] = mapped_column(String(40))
    """The tenant that the object belongs to."""
    origin: Mapped[AuditOrigin] = mapped_column(_enum(AuditOrigin))
    by_tenant_id: Mapped[str | None] = mapped_column(String(40))
    """The key's tenant: another one if an operator acted for a tenant."""
    by_key_id: Mapped[str | None] = mapped_column(String(40))
    """The API key of the request; None: a command or the system."""
    request_id: Mapped[str | None] = mapped_column(String(64))
    action: Mapped[AuditAction] = mapped_column(_enum(AuditAction))
    object_id: Mapped[str] = mapped_column(String(255))
    outcome: Mapped[str] = mapped_column(String(64))
    """`done`, or the code of the error."""
    details: Mapped[dict[str, Any] | None]
