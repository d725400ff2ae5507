"""Uploads and their files."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from datetime import datetime, timedelta
from pathlib import PurePosixPath
from typing import Any, Final

from sqlalchemy import (
    ColumnElement,
    Select,
    and_,
    bindparam,
    case,
    exists,
    func,
    literal,
    or_,
    select,
    true,
    tuple_,
    update,
)
from sqlalchemy.orm import Session, joinedload, selectinload

from deltadock.storage.database import changed_rows, database_now, unindexed
from deltadock.storage.ids import new_id
from deltadock.storage.repositories.audit import DONE, record
from deltadock.storage.repositories.blobs import BlobRepository, lock_blobs
from deltadock.storage.repositories.listing import Key
from deltadock.storage.repositories.totals import TotalsRepository
from deltadock.storage.tables import (
    AuditAction,
    BaseRow,
    BlobUseRow,
    DeltaRow,
    UploadFileRow,
    UploadKind,
    UploadRow,
    UploadState,
)
from deltadock.storage.tenancy import Tenant, owned_by, owner_of

UNFINISHED: Final = (UploadState.OPEN, UploadState.COMPLETING)


class UploadRepository:
    """The tenant's uploads, loaded with their files and, once complete, their checkpoint."""

    def __init__(self, session: Session, tenant: Tenant) -> None:
        self.session = session
        self.tenant = tenant

    def _owned(self) -> ColumnElement[bool]:
        return owned_by(UploadRow.tenant_id, self.tenant)

    def _unfinished(self) -> ColumnElement[bool]:
        """Found by the index of these uploads, which the literals tell, however many others are."""
        states: Any = bindparam("unfinished", UNFINISHED, expanding=True, literal_execute=True)
        return and_(
            UploadRow.state.in_(states), owned_by(unindexed(UploadRow.tenant_id), self.tenant)
        )

    def add(self, kind: UploadKind, files: Iterable[UploadFileRow] = ()) -> UploadRow:
        """Insert an open upload with these files, stored or announced."""
        upload = UploadRow(
            id=new_id("upl"),
            tenant_id=owner_of(self.tenant),
            kind=kind,
            files=sorted(files, key=lambda file: file.path),
            checkpoint=None,
        )
        self.session.add(upload)
        self.session.flush()
        self._record(AuditAction.UPLOAD_CREATE, upload, kind=kind, files=len(upload.files))
        self._count(upload.tenant_id, upload.files, 1)
        return upload

    def _count(self, tenant_id: str, files: Iterable[UploadFileRow], sign: int) -> None:
        blobs = [(file.sha256, file.size) for file in files]
        TotalsRepository(self.session, tenant_id).count_blobs(blobs, sign)

    def names(self, upload_ids: Collection[str]) -> dict[str, str]:
        """What people call those of these uploads that have a name: of a calibration text its file.

        Of a checkpoint the base or the model that was made of it: the first one after it, as equal
        checkpoints are uploaded again.
        """
        own = owned_by(unindexed(UploadRow.tenant_id), self.tenant)
        texts = (
            select(UploadFileRow.upload_id, UploadFileRow.path)
            .join(UploadRow, UploadRow.id == UploadFileRow.upload_id)
            .where(UploadRow.id.in_(upload_ids), UploadRow.kind == UploadKind.CALIBRATION, own)
        )
        found = {text.upload_id: text.path for text in self.session.execute(texts)}
        for row, name in ((DeltaRow, DeltaRow.name), (BaseRow, BaseRow.name)):
            first = (
                select(name)
                .where(
                    row.checkpoint_digest == UploadRow.checkpoint_digest,
                    row.tenant_id == UploadRow.tenant_id,
                    row.created_at >= UploadRow.created_at,
                )
                .order_by(row.created_at, row.id)
                .limit(1)
                .scalar_subquery()
            )
            query = select(UploadRow.id, first.label("name")).where(
                UploadRow.id.in_(upload_ids), own
            )
            found |= {one.id: one.name for one in self.session.execute(query) if one.name}
        return found

    def _record(
        self, action: AuditAction, upload: UploadRow, *, outcome: str = DONE, **details: Any
    ) -> None:
        record(self.session, upload.tenant_id, action, upload.id, outcome=outcome, **details)

    def find(self, upload_id: str, *, lock: bool = False) -> UploadRow | None:
        """The upload with this id, or None; `lock` locks its row for update."""
        by_id = and_(UploadRow.id == upload_id, self._owned())
        if lock:
            # A separate statement: after waiting for a lock, Postgres re-reads only the locked row;
            # joined rows would be those of the statement's earlier snapshot.
            self.session.execute(select(UploadRow.id).where(by_id).with_for_update())
        return self.session.scalars(
            select(UploadRow)
            .options(selectinload(UploadRow.files), joinedload(UploadRow.checkpoint))
            .where(by_id)
            .execution_options(populate_existing=lock)
        ).one_or_none()

    def find_file(self, upload_id: str, path: str) -> tuple[UploadRow, UploadFileRow | None] | None:
        """The upload with this id, alone, and its file at this path, or None."""
        at_path = and_(UploadFileRow.upload_id == UploadRow.id, UploadFileRow.path == path)
        return self.session.execute(
            select(UploadRow, UploadFileRow)
            .outerjoin(UploadFileRow, at_path)
            .where(UploadRow.id == upload_id, self._owned())
        ).one_or_none()

    def tensors(self, upload: UploadRow) -> dict[str, list[dict[str, Any]]]:
        """The tensors of each file of an upload, by its path."""
        files = select(UploadFileRow.path, UploadFileRow.tensors).where(
            UploadFileRow.upload_id == upload.id
        )
        return {row.path: row.tensors for row in self.session.execute(files)}

    @staticmethod
    def copy_of(file: UploadFileRow, path: str) -> UploadFileRow:
        """A row for an equal file as this stored one; the database copies the tensors.

        It does as it inserts the row: if another request has replaced or removed the file by then,
        the row is that of a file which is not stored.
        """
        same = and_(
            UploadFileRow.upload_id == file.upload_id,
            UploadFileRow.path == file.path,
            UploadFileRow.sha256 == file.sha256,
            UploadFileRow.stored,
        )
        tensors = select(UploadFileRow.tensors).where(same).scalar_subquery()
        return UploadFileRow(
            path=path,
            size=file.size,
            sha256=file.sha256,
            stored=exists().where(same),
            tensors=func.coalesce(tensors, literal([], UploadFileRow.tensors.type)),
        )

    def page(
        self, *, limit: int, after: Key | None = None, states: Collection[UploadState] = ()
    ) -> Sequence[UploadRow]:
        """Up to `limit` uploads, newest first, that follow the place `after`.

        Of these states, or of all but aborted.
        """
        query = (
            select(UploadRow)
            .options(selectinload(UploadRow.files), joinedload(UploadRow.checkpoint))
            .order_by(UploadRow.created_at.desc(), UploadRow.id.desc())
            .limit(limit)
        )
        if not states:
            query = query.where(self._owned(), UploadRow.state != UploadState.ABORTED)
        elif set(states) <= set(UNFINISHED):
            query = query.where(self._unfinished(), UploadRow.state.in_(states))
        else:
            query = query.where(self._owned(), UploadRow.state.in_(states))
        if after is not None:
            place = tuple_(UploadRow.created_at, UploadRow.id)
            query = query.where(place < after)
        return self.session.scalars(query).all()

    def count_unfinished(self) -> dict[UploadState, int]:
        """The number of uploads that are open or completing."""
        query = (
            select(UploadRow.state, func.count().label("number"))
            .where(self._unfinished())
            .group_by(UploadRow.state)
        )
        return {row.state: row.number for row in self.session.execute(query)}

    def bytes_to_import(self) -> int:
        """Bytes that unfinished imports have yet to read."""
        imported = (
            select(func.coalesce(func.sum(UploadFileRow.size), 0))
            .where(UploadFileRow.upload_id == UploadRow.id)
            .scalar_subquery()
        )
        pending = self.session.execute(
            select(UploadRow.source_bytes, imported).where(
                self._unfinished(), UploadRow.source_bytes.is_not(None)
            )
        )
        return sum(max(0, (every or 0) - int(done)) for every, done in pending)

    def bytes_to_arrive(self) -> int:
        """Bytes of announced files beyond what totals count: of each, as each may reserve its own.

        The totals count equal blobs once, and so all of these files, or none if the tenant uses
        the blob elsewhere.
        """
        # Joined with them, SQLite would walk the files of all uploads, by their SHA-256.
        unfinished = select(UploadRow.id).where(self._unfinished())
        waiting = (
            select(UploadFileRow.sha256, UploadFileRow.size, func.count().label("files"))
            .where(UploadFileRow.upload_id.in_(unfinished), UploadFileRow.stored.is_(False))
            .group_by(UploadFileRow.sha256, UploadFileRow.size)
            .subquery()
        )
        is_counted = case((BlobUseRow.uses == waiting.c.files, 1), else_=0)
        total = func.sum(waiting.c.size * (waiting.c.files - is_counted))
        use = and_(
            BlobUseRow.tenant_id == owner_of(self.tenant),
            BlobUseRow.digest == waiting.c.sha256,
            BlobUseRow.size == waiting.c.size,
        )
        query = select(total).select_from(waiting).outerjoin(BlobUseRow, use)
        return int(self.session.scalar(query) or 0)

    def stored_files(self, kind: UploadKind, digests: Collection[str]) -> dict[str, UploadFileRow]:
        """One of the tenant's stored files with each SHA-256, by it, of uploads of this kind.

        However many there are, such as each fine-tune's tokenizer.
        """
        wanted = (
            select(UploadFileRow.sha256).where(UploadFileRow.sha256.in_(digests)).distinct()
        ).subquery()
        one = (
            select(UploadFileRow.upload_id)
            .join(UploadRow, UploadRow.id == UploadFileRow.upload_id)
            .where(
                owned_by(unindexed(UploadRow.tenant_id), self.tenant),
                UploadRow.kind == kind,
                UploadFileRow.stored,
                UploadFileRow.sha256 == wanted.c.sha256,
            )
            .limit(1)
            .scalar_subquery()
        )
        uploads = self.session.scalars(select(one).select_from(wanted)).all()
        found = self.session.scalars(
            select(UploadFileRow).where(
                UploadFileRow.upload_id.in_(uploads),
                UploadFileRow.stored,
                unindexed(UploadFileRow.sha256).in_(digests),
            )
        )
        return {file.sha256: file for file in found}

    def models_of(self, weights: Collection[str] = (), source: str | None = None) -> set[str]:
        """Names of the models with a version of a checkpoint that was uploaded before.

        Of one that has files with all these SHA-256, or was imported from `source`; it may have
        been dropped since.
        """
        uploads = _with_weights(self.tenant, weights)
        if source is not None:
            uploads = select(UploadRow.checkpoint_digest).where(
                self._owned(), UploadRow.source == source
            )
        versions = select(DeltaRow.name).where(
            owned_by(DeltaRow.tenant_id, self.tenant),
            DeltaRow.checkpoint_digest.in_(uploads),
            DeltaRow.deleted_at.is_(None),
        )
        return set(self.session.scalars(versions.distinct()))

    def checkpoints_of(self, weights: Collection[str]) -> set[str]:
        """Digests of the checkpoints uploaded before that have files with all these SHA-256."""
        digests = self.session.scalars(_with_weights(self.tenant, weights))
        return {digest for digest in digests if digest is not None}

    def set_parts_token(self, upload_id: str, path: str, token: str | None) -> bool:
        """Set the token of a waiting file's parts, if it has none, or remove it.

        Returns whether it was set.
        """
        changed = self.session.execute(
            update(UploadFileRow)
            .where(
                UploadFileRow.upload_id == upload_id,
                UploadFileRow.path == path,
                UploadFileRow.stored.is_(False),
                UploadFileRow.parts_token.is_(None) if token is not None else true(),
            )
            .values(parts_token=token)
        )
        return changed_rows(changed)

    def touch(self, upload_id: str) -> None:
        """Note activity, so that the upload does not expire."""
        self.session.execute(
            update(UploadRow)
            .where(UploadRow.id == upload_id, self._owned())
            .values(updated_at=database_now(self.session))
        )

    def start_completing(self, upload: UploadRow) -> None:
        """Mark a locked open upload as completing, for a process to acquire."""
        upload.error, upload.done_bytes = None, 0
        upload.lease_owner = upload.lease_expires_at = None
        self._set_state(upload, UploadState.COMPLETING)

    def _free(self) -> ColumnElement[bool]:
        now = database_now(self.session)
        return and_(
            self._unfinished(),
            UploadRow.state == UploadState.COMPLETING,
            or_(UploadRow.lease_expires_at.is_(None), UploadRow.lease_expires_at <= now),
        )

    def unleased(self) -> list[tuple[str, str, str | None]]:
        """(id, tenant, source) of completing uploads that no process hashes, oldest first."""
        query = (
            select(UploadRow.id, UploadRow.tenant_id, UploadRow.source)
            .where(self._free())
            .order_by(UploadRow.updated_at)
        )
        return [(one, tenant, source) for one, tenant, source in self.session.execute(query)]

    def acquire(self, upload_id: str, owner: str, seconds: float) -> UploadRow | None:
        """Lease a completing upload to `owner`; None if another process has it."""
        leased = self.session.execute(
            update(UploadRow)
            .where(UploadRow.id == upload_id, self._free())
            .values(
                lease_owner=owner,
                lease_expires_at=database_now(self.session) + timedelta(seconds=seconds),
            )
        )
        return self.find(upload_id) if changed_rows(leased) else None

    def renew(self, upload_id: str, owner: str, seconds: float, done_bytes: int) -> bool:
        """Extend the lease and record progress; False if the lease is lost."""
        now = database_now(self.session)
        renewed = self.session.execute(
            update(UploadRow)
            .where(UploadRow.id == upload_id, self._held(owner))
            .values(
                lease_expires_at=now + timedelta(seconds=seconds),
                done_bytes=done_bytes,
                updated_at=now,
            )
        )
        return changed_rows(renewed)

    def release(
        self, upload_id: str, owner: str, retry_seconds: float, reason: dict[str, Any] | None
    ) -> None:
        """Let any process acquire the upload after this time; `reason`: why it is not complete."""
        later = database_now(self.session) + timedelta(seconds=retry_seconds)
        self.session.execute(
            update(UploadRow)
            .where(UploadRow.id == upload_id, self._held(owner))
            .values(lease_expires_at=later, error=reason)
        )

    def _held(self, owner: str) -> ColumnElement[bool]:
        return and_(UploadRow.state == UploadState.COMPLETING, UploadRow.lease_owner == owner)

    def find_held(self, upload_id: str, owner: str) -> UploadRow | None:
        """The completing upload, locked, if `owner` still has its lease."""
        upload = self.find(upload_id, lock=True)
        held = upload is not None and upload.state is UploadState.COMPLETING
        return upload if held and upload and upload.lease_owner == owner else None

    def reopen(self, upload: UploadRow, error: dict[str, Any]) -> None:
        """Open a locked completing upload again, with the reason."""
        upload.error = error
        self._set_state(upload, UploadState.OPEN)
        self._record(AuditAction.UPLOAD_COMPLETE, upload, outcome=error["code"], file=error["file"])

    def put_file(self, upload: UploadRow, file: UploadFileRow) -> None:
        """Add `file` to a locked upload, replacing one with the same path.

        Its blob is locked: the caller checks that it still exists.
        """
        lock_blobs(self.session, file.sha256)
        BlobRepository(self.session).note_stored(file.sha256)
        file.upload_id = upload.id
        earlier = [(other.sha256, other.size) for other in upload.files if other.path == file.path]
        self.session.merge(file)
        upload.updated_at = database_now(self.session)
        self.session.flush()
        self._record(
            AuditAction.UPLOAD_FILE, upload, path=file.path, sha256=file.sha256, bytes=file.size
        )
        totals = TotalsRepository(self.session, upload.tenant_id)
        totals.count_blobs([(file.sha256, file.size)], 1)
        totals.count_blobs(earlier, -1)

    def forget_damaged(self, upload: UploadRow, digest: str | None) -> str | None:
        """Wait for a locked upload's file again whose blob is damaged; returns its path."""
        path = None
        if digest is not None:
            BlobRepository(self.session).note_damaged(digest)
        for file in upload.files:
            if file.sha256 == digest:
                file.stored, file.source_version, path = False, None, file.path
        return path

    def keep_imported(self, upload: UploadRow, versions: Mapping[str, str]) -> set[str]:
        """Remove a locked import's files but those in these versions, by path.

        Returns the paths of those that stay.
        """
        others = [
            file
            for file in upload.files
            if file.path not in versions or file.source_version != versions[file.path]
        ]
        for file in others:
            self.session.delete(file)
        self.session.flush()
        self._count(upload.tenant_id, others, -1)
        return {file.path for file in upload.files} - {file.path for file in others}

    def calibration_suffix(self, digest: str) -> str | None:
        """The suffix of the calibration text with this SHA-256 as it was last uploaded, or None.

        It tells how the text is read: the same bytes can be plain text and conversations.
        """
        path = self.session.scalar(
            select(UploadFileRow.path)
            .join(UploadRow, UploadRow.id == UploadFileRow.upload_id)
            .where(
                self._owned(),
                UploadRow.calibration_digest == digest,
                UploadRow.state == UploadState.COMPLETE,
            )
            .order_by(UploadRow.updated_at.desc())
            .limit(1)
        )
        return None if path is None else PurePosixPath(path).suffix

    def abandoned(self, before: datetime, limit: int) -> Sequence[str]:
        """Ids of up to `limit` unfinished uploads last updated before `before`."""
        return self.session.scalars(
            select(UploadRow.id)
            .where(self._unfinished(), UploadRow.updated_at < before)
            .limit(limit)
        ).all()

    def complete(self, upload: UploadRow) -> None:
        """Mark a locked upload as complete."""
        upload.error = upload.lease_owner = upload.lease_expires_at = None
        self._set_state(upload, UploadState.COMPLETE)
        digest = upload.calibration_digest or upload.checkpoint_digest
        self._record(AuditAction.UPLOAD_COMPLETE, upload, digest=digest)

    def abort(self, upload: UploadRow) -> None:
        """Abort a locked unfinished upload and delete its file rows; any other is unchanged."""
        if upload.state in UNFINISHED:
            files = list(upload.files)
            for file in files:
                self.session.delete(file)
            self._set_state(upload, UploadState.ABORTED)
            self._record(AuditAction.UPLOAD_ABORT, upload)
            self._count(upload.tenant_id, files, -1)

    def drop(self, upload: UploadRow) -> None:
        """Give up a locked complete upload's bytes; its rows stay."""
        self._set_state(upload, UploadState.DROPPED)
        self._record(AuditAction.UPLOAD_DROP, upload)
        files = self.session.scalars(
            select(UploadFileRow).where(UploadFileRow.upload_id == upload.id)
        ).all()
        self._count(upload.tenant_id, files, -1)

    def _set_state(self, upload: UploadRow, state: UploadState) -> None:
        upload.state = state
        upload.updated_at = database_now(self.session)
        self.session.flush()


def _with_weights(tenant: Tenant, weights: Collection[str]) -> Select[str | None]:
    """Selects the checkpoints of the tenant's uploads that have files with all these SHA-256."""
    return (
        select(UploadRow.checkpoint_digest)
        .join(UploadFileRow, UploadFileRow.upload_id == UploadRow.id)
        .where(owned_by(unindexed(UploadRow.tenant_id), tenant), UploadFileRow.sha256.in_(weights))
        .group_by(UploadRow.id)
        .having(func.count(UploadFileRow.sha256.distinct()) == len(set(weights)))
    )
