"""Which rows need which blobs, over all tenants.

A blob is needed while a row refers to it. Who writes such a row locks the blob, sees that it exists
(or stores it), and commits; who removes a blob locks it, sees that no row refers to it, and removes
it before the lock ends. So neither overtakes the other.
"""

from collections.abc import Collection, Iterable, Iterator
from datetime import datetime
from enum import StrEnum
from itertools import islice
from typing import Final, TypeVar

from sqlalchemy import Select, and_, delete, or_, select, union
from sqlalchemy.orm import Session, load_only

from deltadock.storage.database import database_now, lock_keys
from deltadock.storage.repositories.audit import record
from deltadock.storage.tables import (
    FINAL_STATES,
    RUNNING_ORDER,
    UNSUCCESSFUL,
    AuditAction,
    BaseRow,
    DamagedBlobRow,
    DeltaRow,
    JobRow,
    JobState,
    NodeRow,
    UploadFileRow,
    UploadKind,
    UploadRow,
    UploadState,
)
from deltadock.storage.tenancy import EVERY_TENANT, Tenant, owned_by

HOLDS_FILES: Final = (UploadState.OPEN, UploadState.COMPLETING, UploadState.COMPLETE)
BATCH: Final = 500
"""Rows of a long result that are read at once, and digests that are asked for."""

Item = TypeVar("Item")


class BlobKind(StrEnum):
    """What a blob is stored for."""

    ARTIFACTS = "artifacts"
    CHECKPOINTS = "checkpoints"
    CALIBRATION = "calibration"
    UPLOADS = "uploads"
    """Files of unfinished uploads."""
    UNREFERENCED = "unreferenced"


def batches(items: Iterable[Item], size: int = BATCH) -> Iterator[list[Item]]:
    """The items by so many."""
    iterator = iter(items)
    while batch := list(islice(iterator, size)):
        yield batch


def lock_blobs(session: Session, *digests: str) -> None:
    """Lock blobs until the transaction ends, in one order for all."""
    lock_keys(session, [("blob", digest) for digest in sorted(set(digests))])


class BlobRepository:
    """Serves all tenants."""

    def __init__(self, session: Session) -> None:
        self.session = session

    def needed(self, digests: Collection[str]) -> dict[str, BlobKind]:
        """Those of the blobs that a row or a node needs, with what for."""
        found: dict[str, BlobKind] = dict.fromkeys(
            self._on_nodes() & set(digests), BlobKind.ARTIFACTS
        )
        files = self.session.execute(
            select(UploadFileRow.sha256, UploadRow.kind, UploadRow.state)
            .join(UploadRow, UploadRow.id == UploadFileRow.upload_id)
            .where(
                UploadFileRow.sha256.in_(digests),
                UploadFileRow.stored,
                UploadRow.state.in_(HOLDS_FILES),
            )
            .distinct()
        )
        # A file of a complete upload is a part of it, even if another one is still arriving.
        for digest, kind, state in sorted(files, key=lambda row: row[2] is UploadState.COMPLETE):
            complete = state is UploadState.COMPLETE
            found[digest] = BlobKind(_KINDS[kind]) if complete else BlobKind.UPLOADS
        manifests = select(UploadRow.checkpoint_digest).where(
            UploadRow.checkpoint_digest.in_(digests), UploadRow.state == UploadState.COMPLETE
        )
        of_bases = select(BaseRow.checkpoint_digest).where(
            BaseRow.checkpoint_digest.in_(digests), BaseRow.deleted_at.is_(None)
        )
        found |= dict.fromkeys(
            self.session.scalars(manifests.union(of_bases)), BlobKind.CHECKPOINTS
        )
        artifacts = select(DeltaRow.artifact_digest).where(
            DeltaRow.artifact_digest.in_(digests), DeltaRow.collected_at.is_(None)
        )
        found |= {d: BlobKind.ARTIFACTS for d in self.session.scalars(artifacts) if d}
        return found

    def need_of(self, upload: UploadRow, undo_from: datetime) -> str | None:
        """What of its tenant needs a complete upload, in words, or may need it; None: nothing.

        What was deleted, or failed, since `undo_from` may.
        """
        if upload.kind is UploadKind.CALIBRATION:
            in_use = self.texts_of_jobs(undo_from, upload.tenant_id)
            return "a job reads it" if upload.calibration_digest in in_use else None
        base = self.session.scalar(
            select(BaseRow.name)
            .where(
                BaseRow.checkpoint_digest == upload.checkpoint_digest,
                BaseRow.tenant_id == upload.tenant_id,
                or_(BaseRow.deleted_at.is_(None), BaseRow.deleted_at >= undo_from),
            )
            .limit(1)
        )
        if base is not None:
            return f"it is the base {base!r}"
        delta = self.session.execute(
            select(DeltaRow.name, DeltaRow.version)
            .where(
                DeltaRow.checkpoint_digest == upload.checkpoint_digest,
                DeltaRow.tenant_id == upload.tenant_id,
                DeltaRow.collected_at.is_(None),
            )
            .limit(1)
        ).one_or_none()
        return None if delta is None else f"it is the fine-tune of {delta.name}:{delta.version}"

    def once_needed(self, digests: Collection[str]) -> dict[str, BlobKind]:
        """Those of the blobs that rows needed before they were collected, with what for."""
        files = self.session.execute(
            select(UploadFileRow.sha256, UploadRow.kind)
            .join(UploadRow, UploadRow.id == UploadFileRow.upload_id)
            .where(UploadFileRow.sha256.in_(digests), UploadRow.state == UploadState.DROPPED)
            .distinct()
        )
        found = {digest: BlobKind(_KINDS[kind]) for digest, kind in files}
        manifests = select(UploadRow.checkpoint_digest).where(
            UploadRow.checkpoint_digest.in_(digests)
        )
        found |= {d: BlobKind.CHECKPOINTS for d in self.session.scalars(manifests) if d}
        artifacts = select(DeltaRow.artifact_digest).where(DeltaRow.artifact_digest.in_(digests))
        found |= {d: BlobKind.ARTIFACTS for d in self.session.scalars(artifacts) if d}
        return found

    def referenced(self) -> Iterator[str]:
        """The digest of every blob that a row needs, from one statement."""
        first, *others = _REFERENCES
        every = self.session.scalars(
            union(
                first.with_only_columns(first.selected_columns[0]),
                *(query.with_only_columns(query.selected_columns[0]) for query in others),
            ),
            execution_options={"yield_per": BATCH},
        )
        return (digest for digest in every if digest is not None)

    def only_needed_by(self, holders: Collection[str], digests: Collection[str]) -> set[str]:
        """Those of the blobs that only these uploads and deltas need, by id."""
        if not holders:
            return set()
        others = self._on_nodes()
        for query in _REFERENCES:
            digest = query.selected_columns[0]
            found = self.session.execute(query.where(digest.in_(digests)))
            others |= {row[0] for row in found if row[0] and row[1] not in holders}
        return set(digests) - others

    def _on_nodes(self) -> set[str]:
        """Artifacts in a node's memory, or pinned; what a node has on disk only it can miss."""
        alive = select(NodeRow.deltas).where(NodeRow.expires_at > database_now(self.session))
        return {
            held["digest"]
            for deltas in self.session.scalars(alive)
            for held in deltas
            if held["tier"] != "disk" or held["references"] or held["pinned"]
        }

    def deleted_before(self, moment: datetime) -> tuple[list[str], list[DeltaRow]]:
        """Deltas deleted before `moment` and not collected: ids of free ones, and others.

        Those are on nodes, and have only what names them and their artifact.
        """
        named = load_only(DeltaRow.name, DeltaRow.version, DeltaRow.artifact_digest, raiseload=True)
        found = self.session.scalars(
            select(DeltaRow)
            .options(named)
            .where(
                DeltaRow.deleted_at.is_not(None),
                DeltaRow.deleted_at < moment,
                DeltaRow.collected_at.is_(None),
            ),
            execution_options={"yield_per": BATCH},
        )
        on_nodes = self._on_nodes()
        free: list[str] = []
        held: list[DeltaRow] = []
        for delta in found:
            if delta.artifact_digest in on_nodes:
                held.append(delta)
            else:
                free.append(delta.id)
        return free, held

    def collect(self, delta_id: str) -> None:
        """Give up a deleted delta's bytes and report; its row keeps name and version."""
        locked = self.session.get(DeltaRow, delta_id, with_for_update=True, populate_existing=True)
        if locked is not None and locked.deleted_at is not None:
            locked.collected_at, locked.report = database_now(self.session), None
            self.session.flush()
            record(self.session, locked.tenant_id, AuditAction.DELTA_COLLECT, locked.id)

    def note_damaged(self, digest: str) -> None:
        """Ask for the blob's bytes again whenever they are announced, until they arrive."""
        lock_blobs(self.session, digest)
        self.session.merge(DamagedBlobRow(digest=digest))
        self.session.flush()

    def note_stored(self, digest: str) -> None:
        """The bytes of a locked blob have arrived: it is undamaged now."""
        self.session.execute(delete(DamagedBlobRow).where(DamagedBlobRow.digest == digest))

    def damaged(self, digests: Collection[str]) -> set[str]:
        """Those of the blobs that are noted as damaged."""
        noted = select(DamagedBlobRow.digest).where(DamagedBlobRow.digest.in_(digests))
        return set(self.session.scalars(noted))

    def ended_jobs(
        self, job_ids: Collection[str], before: datetime, given_up: Collection[str] = ()
    ) -> set[str]:
        """Those of the jobs whose saved blocks nobody needs: unknown, ready, or ended long ago.

        Or of deltas that are given up, or would be: `given_up` are those's ids.
        """
        kept = self.session.execute(
            select(JobRow.id, JobRow.delta_id)
            .join(JobRow.delta)
            .where(
                JobRow.id.in_(job_ids),
                DeltaRow.collected_at.is_(None),
                or_(
                    JobRow.state.not_in(FINAL_STATES),
                    and_(JobRow.state != JobState.READY, JobRow.finished_at >= before),
                ),
            )
        )
        return set(job_ids) - {job for job, delta in kept if delta not in given_up}

    def texts_of_jobs(self, undo_from: datetime, tenant: Tenant = EVERY_TENANT) -> set[str]:
        """Digests of the calibration texts of jobs that run or may continue."""
        pending = self.session.scalars(
            select(DeltaRow.options)
            .join(DeltaRow.job)
            .where(
                owned_by(JobRow.tenant_id, tenant),
                or_(
                    JobRow.state.in_(RUNNING_ORDER),
                    and_(JobRow.state.in_(UNSUCCESSFUL), JobRow.finished_at >= undo_from),
                ),
            )
        ).all()
        mixtures = [options["calibration"] for options in pending]
        sources = [source for mixture in mixtures if mixture for source in mixture["sources"]]
        return {source["digest"] for source in sources if source["digest"]}


_REFERENCES: Final[tuple[Select[str | None, str], ...]] = (
    select(UploadFileRow.sha256, UploadRow.id)
    .join(UploadRow, UploadRow.id == UploadFileRow.upload_id)
    .where(UploadFileRow.stored, UploadRow.state.in_(HOLDS_FILES)),
    select(UploadRow.checkpoint_digest, UploadRow.id).where(
        UploadRow.state == UploadState.COMPLETE
    ),
    select(BaseRow.checkpoint_digest, BaseRow.id).where(BaseRow.deleted_at.is_(None)),
    select(DeltaRow.artifact_digest, DeltaRow.id).where(DeltaRow.collected_at.is_(None)),
)
"""The digests that rows need, with the ids of the uploads, bases and deltas that do."""

_KINDS: Final = {
    UploadKind.CHECKPOINT: BlobKind.CHECKPOINTS,
    UploadKind.CALIBRATION: BlobKind.CALIBRATION,
}
