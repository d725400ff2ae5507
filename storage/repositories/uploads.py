"""Uploads and their files."""

from collections.abc import Sequence
from datetime import datetime

from sqlalchemy import ColumnElement, and_, exists, select
from sqlalchemy.orm import Session, joinedload, selectinload

from deltadock.storage.database import database_now
from deltadock.storage.ids import new_id
from deltadock.storage.models import UploadFileRow, UploadKind, UploadRow, UploadState
from deltadock.storage.tenancy import Tenant, owned_by, owner_of


class UploadRepository:
    """The tenant's uploads, loaded with their files and, once complete, their checkpoint."""

    def __init__(self, session: Session, tenant: Tenant) -> None:
        self.session = session
        self.tenant = tenant

    def _owned(self) -> ColumnElement[bool]:
        return owned_by(UploadRow.tenant_id, self.tenant)

    def add(self, kind: UploadKind) -> UploadRow:
        """Insert an open upload without files."""
        upload = UploadRow(
            id=new_id("upl"),
            tenant_id=owner_of(self.tenant),
            kind=kind,
            files=[],
            checkpoint=None,
        )
        self.session.add(upload)
        self.session.flush()
        return upload

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

    def put_file(self, upload: UploadRow, file: UploadFileRow) -> None:
        """Add `file` to a locked upload, replacing one with the same path."""
        file.upload_id = upload.id
        self.session.merge(file)
        upload.updated_at = database_now(self.session)
        self.session.flush()

    def has_calibration(self, digest: str) -> bool:
        """Whether a complete upload is the calibration text with this SHA-256."""
        return bool(
            self.session.scalar(
                select(
                    exists().where(
                        self._owned(),
                        UploadRow.calibration_digest == digest,
                        UploadRow.state == UploadState.COMPLETE,
                    )
                )
            )
        )

    def calibration_path(self, digest: str) -> str | None:
        """The file name of the first upload of the calibration text with this SHA-256."""
        return self.session.scalar(
            select(UploadFileRow.path)
            .join(UploadRow, UploadRow.id == UploadFileRow.upload_id)
            .where(
                self._owned(),
                UploadRow.calibration_digest == digest,
                UploadRow.state == UploadState.COMPLETE,
            )
            .order_by(UploadRow.created_at)
            .limit(1)
        )

    def abandoned(self, before: datetime) -> Sequence[UploadRow]:
        """Open uploads last updated before `before`."""
        return self.session.scalars(
            select(UploadRow)
            .options(selectinload(UploadRow.files))
            .where(
                self._owned(), UploadRow.state == UploadState.OPEN, UploadRow.updated_at < before
            )
        ).all()

    def complete(self, upload: UploadRow) -> None:
        """Mark a locked upload as complete."""
        self._close(upload, UploadState.COMPLETE)

    def abort(self, upload: UploadRow) -> None:
        """Abort a locked open upload and delete its file rows; any other is unchanged."""
        if upload.state is UploadState.OPEN:
            for file in upload.files:
                self.session.delete(file)
            self._close(upload, UploadState.ABORTED)

    def _close(self, upload: UploadRow, state: UploadState) -> None:
        upload.state = state
        upload.updated_at = database_now(self.session)
        self.session.flush()
