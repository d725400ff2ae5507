"""Uploads and their files."""

from collections.abc import Sequence
from datetime import datetime

from sqlalchemy import exists, select
from sqlalchemy.orm import Session, joinedload, selectinload

from deltadock.storage.ids import new_id
from deltadock.storage.models import UploadFileRow, UploadKind, UploadRow, UploadState
from deltadock.storage.types import database_now


class UploadRepository:
    """Uploads come with their files and, once complete, their checkpoint."""

    def __init__(self, session: Session) -> None:
        self.session = session

    def add(self, kind: UploadKind) -> UploadRow:
        """A new, open upload without files."""
        upload = UploadRow(id=new_id("upl"), kind=kind, files=[], checkpoint=None)
        self.session.add(upload)
        self.session.flush()
        return upload

    def find(self, upload_id: str, *, lock: bool = False) -> UploadRow | None:
        """The upload with this id; with `lock`, others that want to change it wait."""
        mine = UploadRow.id == upload_id
        if lock:
            # On its own: a row that is locked together with others, after a wait, comes as it is
            # now, but they come as they were when the statement began.
            self.session.execute(select(UploadRow.id).where(mine).with_for_update())
        return self.session.scalars(
            select(UploadRow)
            .options(selectinload(UploadRow.files), joinedload(UploadRow.checkpoint))
            .where(mine)
            .execution_options(populate_existing=lock)
        ).one_or_none()

    def put_file(self, upload: UploadRow, file: UploadFileRow) -> None:
        """Add `file` to a locked upload; one with the same path is replaced."""
        file.upload_id = upload.id
        self.session.merge(file)
        upload.updated_at = database_now(self.session)
        self.session.flush()

    def has_calibration(self, digest: str) -> bool:
        """Whether some complete upload is the calibration text with this SHA-256."""
        return bool(
            self.session.scalar(
                select(
                    exists().where(
                        UploadRow.calibration_digest == digest,
                        UploadRow.state == UploadState.COMPLETE,
                    )
                )
            )
        )

    def calibration_path(self, digest: str) -> str | None:
        """The file name under which the calibration text with this SHA-256 was first uploaded."""
        return self.session.scalar(
            select(UploadFileRow.path)
            .join(UploadRow, UploadRow.id == UploadFileRow.upload_id)
            .where(UploadRow.calibration_digest == digest, UploadRow.state == UploadState.COMPLETE)
            .order_by(UploadRow.created_at)
            .limit(1)
        )

    def abandoned(self, before: datetime) -> Sequence[UploadRow]:
        """Open uploads that nothing has been added to since `before`."""
        return self.session.scalars(
            select(UploadRow)
            .options(selectinload(UploadRow.files))
            .where(UploadRow.state == UploadState.OPEN, UploadRow.updated_at < before)
        ).all()

    def complete(self, upload: UploadRow) -> None:
        """Close a locked upload that has become a checkpoint or a calibration text."""
        self._close(upload, UploadState.COMPLETE)

    def abort(self, upload: UploadRow) -> None:
        """Close a locked upload for good and forget its files; a complete one stays as it is."""
        if upload.state is UploadState.OPEN:
            for file in upload.files:
                self.session.delete(file)
            self._close(upload, UploadState.ABORTED)

    def _close(self, upload: UploadRow, state: UploadState) -> None:
        upload.state = state
        upload.updated_at = database_now(self.session)
        self.session.flush()
