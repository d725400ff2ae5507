"""Jobs: every change of state is a compare-and-set, and a worker's changes need its lease."""

from collections.abc import Iterable, Sequence
from datetime import datetime, timedelta
from typing import Any, cast

from sqlalchemy import CursorResult, and_, case, or_, select, update
from sqlalchemy.orm import Session, joinedload
from sqlalchemy.sql.elements import ColumnElement

from deltadock.storage.models import (
    FINAL_STATES,
    RUNNING_ORDER,
    BaseRow,
    DeltaRow,
    JobRow,
    JobState,
)
from deltadock.storage.types import database_now


class JobRepository:
    """Times are the database's clock unless the caller brings a `now`."""

    def __init__(self, session: Session) -> None:
        self.session = session

    def find(self, job_id: str) -> JobRow | None:
        """The job with this id, as it is in the database now."""
        return self.session.get(JobRow, job_id, populate_existing=True)

    def acquire(
        self, job_id: str, owner: str, lease_seconds: float, *, now: datetime | None = None
    ) -> JobRow | None:
        """Take the lease for `owner`: the job, with its delta and the delta's base loaded.

        None if another's lease is live, the state is final or there is no such job.
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
        """Prolong the lease; False if `owner` no longer holds it."""
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

        Progress only moves forward: a successor that repeats what its predecessor had reported
        leaves the row as it is until it is past that point.

        Raises:
            ValueError: `state` is final; that is what `finish` is for.
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
        """Enter a final state and give the lease back; False if `owner` no longer holds it.

        Raises:
            ValueError: `state` is not final.
        """
        if not state.is_final:
            raise ValueError(f"{state} is not final: use advance.")
        now = now or database_now(self.session)
        return self._set(_held(job_id, owner), **_ending(state, now, error_code, error_message))

    def release(self, job_id: str, owner: str, *, now: datetime | None = None) -> bool:
        """Give the lease back unfinished, as a worker does that stops in good order.

        What it did was no failed attempt. False if `owner` no longer holds the lease.
        """
        return self._set(
            _held(job_id, owner),
            lease_owner=None,
            lease_expires_at=None,
            attempt=JobRow.attempt - 1,
            updated_at=now or database_now(self.session),
        )

    def request_cancel(self, job_id: str, *, now: datetime | None = None) -> JobRow | None:
        """Ask for the job to stop: at once if no worker has it, else at its next progress report.

        A job in a final state stays as it is. None if there is no such job.
        """
        now = now or database_now(self.session)
        idle = or_(JobRow.lease_owner.is_(None), JobRow.lease_expires_at <= now)
        unfinished = and_(JobRow.id == job_id, JobRow.state.not_in(FINAL_STATES))
        self._set(
            unfinished,
            cancel_requested=True,
            message="Cancelling was requested; the worker stops at its next step.",
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
        """Jobs whose task may be lost, for the sweeper to send again, oldest first.

        Those whose worker fell silent, and those that nobody has taken for `queued_seconds` after
        their task was last sent (a crash or a broken broker between commit and send).
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
        """Record that the tasks of these jobs go to the broker now."""
        now = now or database_now(self.session)
        self._set(JobRow.id.in_(list(job_ids)), sent_at=now)

    def _holds(self, job_id: str, owner: str) -> bool:
        return self.session.scalar(select(JobRow.id).where(_held(job_id, owner))) is not None

    def _set(self, condition: ColumnElement[bool], **values: Any) -> bool:
        """UPDATE ... WHERE condition; whether a row was changed."""
        result = self.session.execute(
            update(JobRow).where(condition).values(**values),
            execution_options={"synchronize_session": False},
        )
        return cast(CursorResult[Any], result).rowcount > 0


def _held(job_id: str, owner: str) -> ColumnElement[bool]:
    # An expired lease that nobody has taken over is still the owner's.
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
    if state is not JobState.FAILED:  # where a job failed is worth keeping
        ending["message"] = ""
    if state is JobState.READY:
        ending["percent"] = 100.0
    return ending
