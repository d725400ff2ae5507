"""Jobs: every state transition is a compare-and-set; workers' updates require the lease."""

from collections.abc import Iterable, Sequence
from datetime import datetime, timedelta
from typing import Any, cast

from sqlalchemy import CursorResult, and_, case, or_, select, update
from sqlalchemy.orm import Session, joinedload
from sqlalchemy.sql.elements import ColumnElement

from deltadock.storage.database import database_now
from deltadock.storage.models import (
    FINAL_STATES,
    RUNNING_ORDER,
    BaseRow,
    DeltaRow,
    JobRow,
    JobState,
)


class JobRepository:
    """Times are from the database's clock unless the caller passes `now`."""

    def __init__(self, session: Session) -> None:
        self.session = session

    def find(self, job_id: str) -> JobRow | None:
        """The job with this id, re-read from the database, or None."""
        return self.session.get(JobRow, job_id, populate_existing=True)

    def acquire(
        self, job_id: str, owner: str, lease_seconds: float, *, now: datetime | None = None
    ) -> JobRow | None:
        """Acquire the lease for `owner`; returns the job with its delta and base loaded.

        None if another owner's lease is live, the state is final or the job does not exist.
        """
        now = now or database_now(self.session)
        free = or_(
            JobRow.lease_owner.is_(None),
            JobRow.lease_owner == owner,
            JobRow.lease_expires_at <= now,
        )
        if not self._set(
            and_(JobRow.id == job_id, JobRow.state.not_in(FINAL_STATES), free),
            lease_owner=owner,
            lease_expires_at=now + timedelta(seconds=lease_seconds),
            attempt=JobRow.attempt + 1,
            updated_at=now,
        ):
            return None
        return self.session.scalars(
            select(JobRow)
            .options(
                joinedload(JobRow.delta).joinedload(DeltaRow.base).joinedload(BaseRow.checkpoint)
            )
            .where(JobRow.id == job_id)
            .execution_options(populate_existing=True)
        ).one()

    def renew(
        self, job_id: str, owner: str, lease_seconds: float, *, now: datetime | None = None
    ) -> bool:
        """Extend the lease; False if `owner` no longer holds it."""
        now = now or database_now(self.session)
        return self._set(
            _held(job_id, owner), lease_expires_at=now + timedelta(seconds=lease_seconds)
        )

    def advance(
        self,
        job_id: str,
        owner: str,
        state: JobState,
        *,
        block: int,
        blocks: int,
        percent: float,
        message: str,
        now: datetime | None = None,
    ) -> bool:
        """Record progress; False if `owner` no longer holds the lease.

        Progress only moves forward: a worker that repeats a predecessor's steps does not update
        the row until it is past them.

        Raises:
            ValueError: `state` is final; use `finish`.
        """
        if state.is_final:
            raise ValueError(f"{state} is final: use finish.")
        earlier = RUNNING_ORDER[: RUNNING_ORDER.index(state)]
        ahead = or_(
            JobRow.state.in_(earlier), and_(JobRow.state == state, JobRow.percent <= percent)
        )
        moved = self._set(
            and_(_held(job_id, owner), ahead),
            state=state,
            stage_block=block,
            stage_blocks=blocks,
            percent=case((JobRow.percent > percent, JobRow.percent), else_=percent),
            message=message,
            updated_at=now or database_now(self.session),
        )
        return moved or self._holds(job_id, owner)

    def finish(
        self,
        job_id: str,
        owner: str,
        state: JobState,
        *,
        error_code: str | None = None,
        error_message: str | None = None,
        now: datetime | None = None,
    ) -> bool:
        """Enter a final state and release the lease; False if `owner` no longer holds it.

        Raises:
            ValueError: `state` is not final.
        """
        if not state.is_final:
            raise ValueError(f"{state} is not final: use advance.")
        now = now or database_now(self.session)
        return self._set(_held(job_id, owner), **_ending(state, now, error_code, error_message))

    def release(self, job_id: str, owner: str, *, now: datetime | None = None) -> bool:
        """Release the lease of an unfinished job when its worker shuts down.

        This does not count as an attempt. False if `owner` no longer holds the lease.
        """
        return self._set(
            _held(job_id, owner),
            lease_owner=None,
            lease_expires_at=None,
            attempt=JobRow.attempt - 1,
            updated_at=now or database_now(self.session),
        )

    def request_cancel(self, job_id: str, *, now: datetime | None = None) -> JobRow | None:
        """Cancel the job: immediately if no worker holds it, else at its next progress report.

        A job in a final state is unchanged. None if the job does not exist.
        """
        now = now or database_now(self.session)
        idle = or_(JobRow.lease_owner.is_(None), JobRow.lease_expires_at <= now)
        unfinished = and_(JobRow.id == job_id, JobRow.state.not_in(FINAL_STATES))
        self._set(
            unfinished,
            cancel_requested=True,
            message="Cancellation requested; the worker stops at its next step.",
            updated_at=now,
        )
        self._set(
            and_(unfinished, idle),
            **_ending(JobState.CANCELLED, now, "cancelled", "Cancelled on request."),
        )
        return self.find(job_id)

    def stale(
        self, now: datetime | None = None, *, queued_seconds: float = 120.0, limit: int = 100
    ) -> Sequence[JobRow]:
        """Jobs whose task may be lost, oldest first, for the sweeper to re-send.

        Jobs whose lease expired, and jobs that no worker took within `queued_seconds` of their
        task being sent (after a crash or broker failure between commit and send).
        """
        now = now or database_now(self.session)
        waiting = and_(
            JobRow.lease_owner.is_(None), JobRow.sent_at <= now - timedelta(seconds=queued_seconds)
        )
        return self.session.scalars(
            select(JobRow)
            .where(JobRow.state.not_in(FINAL_STATES), or_(waiting, JobRow.lease_expires_at <= now))
            .order_by(JobRow.created_at)
            .limit(limit)
        ).all()

    def mark_sent(self, job_ids: Iterable[str], *, now: datetime | None = None) -> None:
        """Record that the tasks of these jobs are sent to the broker now."""
        now = now or database_now(self.session)
        self._set(JobRow.id.in_(list(job_ids)), sent_at=now)

    def _holds(self, job_id: str, owner: str) -> bool:
        return self.session.scalar(select(JobRow.id).where(_held(job_id, owner))) is not None

    def _set(self, condition: ColumnElement[bool], **values: Any) -> bool:
        """UPDATE ... WHERE condition; returns whether any row matched."""
        result = self.session.execute(
            update(JobRow).where(condition).values(**values),
            execution_options={"synchronize_session": False},
        )
        return cast(CursorResult[Any], result).rowcount > 0


def _held(job_id: str, owner: str) -> ColumnElement[bool]:
    # An expired lease that no other worker has acquired still belongs to its owner.
    return and_(JobRow.id == job_id, JobRow.lease_owner == owner, JobRow.state.not_in(FINAL_STATES))


def _ending(
    state: JobState, now: datetime, error_code: str | None, error_message: str | None
) -> dict[str, Any]:
    ending: dict[str, Any] = {
        "state": state,
        "error_code": error_code,
        "error_message": error_message,
        "lease_owner": None,
        "lease_expires_at": None,
        "updated_at": now,
        "finished_at": now,
    }
    if state is not JobState.FAILED:  # a failed job keeps the message of the step that failed
        ending["message"] = ""
    if state is JobState.READY:
        ending["percent"] = 100.0
    return ending
