"""Deltas by id, by name and version, and by fingerprint."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from sqlalchemy import ColumnElement, Select, func, select, tuple_
from sqlalchemy.orm import Session, joinedload

from deltadock.storage.database import database_now, lock_key
from deltadock.storage.ids import new_id
from deltadock.storage.models import BaseRow, CheckpointRow, DeltaRow, JobPriority, JobRow, JobState
from deltadock.storage.tenancy import Tenant, owned_by, owner_of

UNSUCCESSFUL = (JobState.FAILED, JobState.CANCELLED)


class DeltaTotals(NamedTuple):
    """Totals over ready deltas; shared artifacts and checkpoints are counted once."""

    deltas: int
    artifact_bytes: int
    checkpoint_bytes: int


class DeltaRepository:
    """The tenant's deltas, loaded with their base and job; deleted ones are excluded."""

    def __init__(self, session: Session, tenant: Tenant) -> None:
        self.session = session
        self.tenant = tenant

    def _owned(self) -> ColumnElement[bool]:
        return owned_by(DeltaRow.tenant_id, self.tenant)

    def _not_deleted(self) -> Select[DeltaRow]:
        return (
            select(DeltaRow)
            .join(DeltaRow.job)
            .options(
                joinedload(DeltaRow.base).joinedload(BaseRow.checkpoint), joinedload(DeltaRow.job)
            )
            .where(DeltaRow.deleted_at.is_(None), self._owned())
        )

    def find(self, delta_id: str) -> DeltaRow | None:
        """The delta with this id, or None."""
        return self.session.scalars(
            self._not_deleted().where(DeltaRow.id == delta_id)
        ).one_or_none()

    def find_version(self, name: str, version: int) -> DeltaRow | None:
        """One version of a name, or None."""
        return self.session.scalars(
            self._not_deleted().where(DeltaRow.name == name, DeltaRow.version == version)
        ).one_or_none()

    def find_latest(self, name: str) -> DeltaRow | None:
        """The highest ready version of a name; if none is ready, the highest version."""
        return self.session.scalars(
            self._not_deleted()
            .where(DeltaRow.name == name)
            .order_by((JobRow.state == JobState.READY).desc(), DeltaRow.version.desc())
            .limit(1)
        ).one_or_none()

    def find_same(self, fingerprint: str) -> Sequence[DeltaRow]:
        """Ready or unfinished deltas with this fingerprint, of any name, highest version first.

        Locks the fingerprint until the transaction ends.
        """
        lock_key(self.session, "fingerprint", str(self.tenant), fingerprint)
        return self.session.scalars(
            self._not_deleted()
            .where(
                DeltaRow.fingerprint == fingerprint,
                JobRow.state.not_in(UNSUCCESSFUL),
                JobRow.cancel_requested.is_(False),
            )
            .order_by(DeltaRow.version.desc())
        ).all()

    def page(self, *, limit: int, after: DeltaRow | None = None) -> Sequence[DeltaRow]:
        """Up to `limit` deltas, newest first, starting after `after`."""
        query = (
            self._not_deleted()
            .order_by(DeltaRow.created_at.desc(), DeltaRow.id.desc())
            .limit(limit)
        )
        if after is not None:
            query = query.where(
                tuple_(DeltaRow.created_at, DeltaRow.id) < (after.created_at, after.id)
            )
        return self.session.scalars(query).all()

    def cursor(self, delta_id: str) -> DeltaRow | None:
        """The last delta of the previous page, even if it has been deleted since."""
        return self.session.scalars(
            select(DeltaRow).where(DeltaRow.id == delta_id, self._owned())
        ).one_or_none()

    def ready(self) -> Sequence[DeltaRow]:
        """All deltas that can be served, newest first."""
        return self.session.scalars(
            self._not_deleted()
            .where(JobRow.state == JobState.READY)
            .order_by(DeltaRow.created_at.desc(), DeltaRow.id.desc())
        ).all()

    def totals(self) -> DeltaTotals:
        """Count, artifact bytes and full-checkpoint bytes of the ready deltas."""
        ready = (
            select(DeltaRow.artifact_digest, DeltaRow.artifact_bytes, DeltaRow.checkpoint_digest)
            .join(DeltaRow.job)
            .where(DeltaRow.deleted_at.is_(None), self._owned(), JobRow.state == JobState.READY)
            .cte("ready")
        )
        artifacts = select(ready.c.artifact_digest, ready.c.artifact_bytes).distinct().subquery()
        checkpoints = CheckpointRow.digest.in_(select(ready.c.checkpoint_digest))
        found = self.session.execute(
            select(
                select(func.count()).select_from(ready).scalar_subquery(),
                select(func.sum(artifacts.c.artifact_bytes)).scalar_subquery(),
                select(func.sum(CheckpointRow.total_bytes)).where(checkpoints).scalar_subquery(),
            )
        ).one()
        # Postgres sums BIGINT as NUMERIC, and an empty set as NULL.
        return DeltaTotals(*(int(value or 0) for value in found))

    def add(
        self,
        *,
        name: str,
        base: BaseRow,
        checkpoint_digest: str,
        method: str,
        bits: float | None,
        options: dict[str, Any],
        fingerprint: str,
        priority: JobPriority = JobPriority.NORMAL,
    ) -> DeltaRow:
        """Insert a delta as the next version of `name`, with a queued job.

        Versions of deleted deltas count too, since they are never reused.
        """
        owner = owner_of(self.tenant)
        lock_key(self.session, "name", owner, name)
        latest = self.session.scalar(
            select(func.max(DeltaRow.version)).where(self._owned(), DeltaRow.name == name)
        )
        now = database_now(self.session)
        delta = DeltaRow(
            id=new_id("dlt"),
            tenant_id=owner,
            name=name,
            version=(latest or 0) + 1,
            base=base,
            checkpoint_digest=checkpoint_digest,
            method=method,
            bits=bits,
            options=options,
            fingerprint=fingerprint,
            created_at=now,
            job=JobRow(
                id=new_id("job"), priority=priority, created_at=now, updated_at=now, sent_at=now
            ),
        )
        self.session.add(delta)
        self.session.flush()
        return delta

    def set_result(
        self, delta: DeltaRow, *, artifact_digest: str, artifact_bytes: int, report: dict[str, Any]
    ) -> None:
        """Record the artifact and report; call it in the transaction of the job's `finish`."""
        delta.artifact_digest = artifact_digest
        delta.artifact_bytes = artifact_bytes
        delta.report = report
        self.session.flush()

    def share_result(self, delta: DeltaRow, twin: DeltaRow) -> None:
        """Make a new delta ready with the artifact of `twin`, which has the same fingerprint."""
        delta.artifact_digest = twin.artifact_digest
        delta.artifact_bytes = twin.artifact_bytes
        delta.report = twin.report
        delta.job.state = JobState.READY
        delta.job.percent = 100.0
        delta.job.finished_at = delta.created_at
        self.session.flush()

    def restore(self, delta_id: str) -> bool:
        """Undo the deletion of a delta; False if there is none, or its bytes were given up."""
        found = self.session.scalars(
            select(DeltaRow)
            .where(
                DeltaRow.id == delta_id,
                self._owned(),
                DeltaRow.deleted_at.is_not(None),
                DeltaRow.collected_at.is_(None),
            )
            .with_for_update()
        ).one_or_none()
        if found is None:
            return False
        found.deleted_at = None
        self.session.flush()
        return True

    def delete(self, delta: DeltaRow) -> None:
        """Mark the delta as deleted; its row keeps name and version, and its bytes for a while."""
        delta.deleted_at = database_now(self.session)
        self.session.flush()
