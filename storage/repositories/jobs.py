"""Jobs: every state transition is a compare-and-set; workers' updates require the lease."""

from bisect import bisect_left
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from datetime import datetime, timedelta
from typing import Any, Final, NamedTuple

from sqlalchemy import (
    Subquery,
    and_,
    case,
    delete,
    func,
    insert,
    literal,
    or_,
    select,
    union_all,
    update,
)
from sqlalchemy.orm import Session, joinedload
from sqlalchemy.sql.elements import ColumnElement

from deltadock.storage.database import changed_rows, database_now, unindexed
from deltadock.storage.repositories.audit import DONE, record
from deltadock.storage.repositories.listing import ANY_JOB, JobFilter, Key, find_jobs
from deltadock.storage.repositories.shown import JOB, SELECT_JOBS, ShownJob
from deltadock.storage.tables import (
    FINAL_STATES,
    RUNNING_ORDER,
    UNSUCCESSFUL,
    AuditAction,
    BaseRow,
    DeltaRow,
    JobLogRow,
    JobPriority,
    JobRow,
    JobState,
    TenantRow,
)
from deltadock.storage.tenancy import Tenant, owned_by, owner_of

MAX_LOG_LINES: Final = 1000
"""Lines that a job keeps, the newest."""

MAX_POSITION: Final = 1000
"""Places in the queue that are numbered."""

TRIED_AGAIN: Final = "to be tried again"
"""How the message of a job begins that an error has interrupted."""

_BEGUN: Final = and_(JobRow.started_at.is_not(None), JobRow.finished_at.is_(None))
"""Jobs that a worker has begun and none has ended; they have an index."""

_NEW: Final = and_(JobRow.started_at.is_(None), JobRow.finished_at.is_(None))
"""Jobs that no worker has begun; they have an index."""

_URGENCY: Final = {one: place for place, one in enumerate(JobPriority)}
"""The most urgent priority first."""

MAX_WALKS: Final = 200
"""Of an index, in one statement; SQLite takes up to 500."""


class JobProgress(NamedTuple):
    """How far a worker is."""

    state: JobState
    block: int
    """Steps that are done of what `message` says."""
    blocks: int
    percent: float
    """Of the whole job."""
    message: str
    seconds_left: float | None = None


class JobRepository:
    """Jobs of the tenant's deltas; workers, which hold a lease, serve every tenant."""

    def __init__(self, session: Session, tenant: Tenant) -> None:
        self.session = session
        self.tenant = tenant

    def _owned(self) -> ColumnElement[bool]:
        return owned_by(JobRow.tenant_id, self.tenant)

    def find(self, job_id: str) -> JobRow | None:
        """The job with this id, re-read from the database, or None."""
        return self.session.scalars(
            select(JobRow)
            .where(JobRow.id == job_id, self._owned())
            .execution_options(populate_existing=True)
        ).one_or_none()

    def show(self, job_id: str) -> ShownJob | None:
        """The columns of the job with this id, or None."""
        own = {"id": job_id, "tenant": owner_of(self.tenant)}
        row = self.session.execute(JOB, own).one_or_none()
        return None if row is None else ShownJob(*row)

    def show_all(self, job_ids: Collection[str]) -> list[ShownJob]:
        """The columns of those of the jobs that exist."""
        own = owned_by(unindexed(JobRow.tenant_id), self.tenant)
        query = SELECT_JOBS.where(JobRow.id.in_(job_ids), own)
        return [ShownJob(*row) for row in self.session.execute(query)]

    def page(
        self, *, limit: int, wanted: JobFilter = ANY_JOB, after: Key | None = None
    ) -> Sequence[ShownJob]:
        """Up to `limit` jobs that follow the place `after`, newest first."""
        ids = find_jobs(
            self.session, owner_of(self.tenant), wanted=wanted, after=after, limit=limit
        )
        by_id = {job.id: job for job in self.show_all(ids)}
        return [by_id[job_id] for job_id in ids]

    def count_by_state(self) -> dict[JobState, int]:
        """The number of jobs in each state that any has; reads only an index."""
        number = func.count().label("number")
        query = select(JobRow.state, number).where(self._owned()).group_by(JobRow.state)
        return {row.state: row.number for row in self.session.execute(query)}

    def count_queued(self) -> dict[JobPriority, int]:
        """The number of jobs that wait for a worker, by priority."""
        query = (
            select(JobRow.priority, func.count().label("number"))
            .where(self._owned(), JobRow.state == JobState.QUEUED)
            .group_by(JobRow.priority)
        )
        return {row.priority: row.number for row in self.session.execute(query)}

    def positions(self, jobs: Iterable[JobRow | ShownJob]) -> dict[str, int]:
        """Places in the queue of all tenants, 1 being next, by the ids of the jobs that wait.

        All behind the first `MAX_POSITION` have the place after these.
        """
        waiting = {job.id for job in jobs if job.state in RUNNING_ORDER and job.lease_owner is None}
        queue = self._queue(MAX_POSITION) if waiting else []
        places = {job_id: place for place, job_id in enumerate(queue, start=1)}
        return {job_id: places.get(job_id, MAX_POSITION + 1) for job_id in waiting}

    def _queue(self, limit: int) -> Sequence[str]:
        """Ids of the first waiting jobs, in the order in which workers take them.

        Jobs that a worker has begun and left are first. The others' tenants take turns: the one
        with the fewest jobs at work is next, then the one whose last job started longest ago. A
        tenant's own jobs go by priority, then by when they were sent.
        """
        now = database_now(self.session)
        begun = self.session.scalars(
            select(JobRow.id)
            .where(_BEGUN, _free(now))
            .order_by(JobRow.sent_at, JobRow.id)
            .limit(limit)
        ).all()
        if len(begun) == limit:
            return begun
        working = Counter(self.session.scalars(select(JobRow.tenant_id).where(_at_work(now))))
        limit -= len(begun)
        while True:
            new, wanted = self._first_new(limit, working)
            own = (case(_URGENCY, value=new.c.priority), new.c.sent_at, new.c.id)
            place = func.row_number().over(partition_by=new.c.tenant_id, order_by=own)
            ahead = case(working, value=new.c.tenant_id, else_=0) if working else literal(0)
            turn = (place + ahead, TenantRow.served_at.nulls_first(), new.c.sent_at, new.c.id)
            queue = self.session.scalars(
                select(new.c.id)
                .join(TenantRow, TenantRow.id == new.c.tenant_id)
                .order_by(*turn)
                .limit(limit)
            ).all()
            if len(queue) >= wanted:  # else workers have taken some since they were counted
                return [*begun, *queue]

    def _first_new(self, limit: int, working: Counter[str]) -> tuple[Subquery, int]:
        """Jobs that no worker has begun, among them the first `limit`; and how many these are.

        Their tenants take turns, each after its jobs that are at work. How many of a tenant and
        priority are among the first follows from their numbers: no others are read, if that saves
        anything.
        """
        of = (JobRow.tenant_id, JobRow.priority)
        groups = self.session.execute(
            select(*of, func.count().label("number")).where(_NEW).group_by(*of)
        ).all()
        waiting: Counter[str] = Counter()
        for group in groups:
            waiting[group.tenant_id] += group.number

        def first(turns: int) -> dict[str, int]:
            """The numbers of those that come in so many turns."""
            return {
                one: min(max(turns - working[one], 0), number) for one, number in waiting.items()
            }

        every = waiting.total()
        wanted = min(limit, every)
        longest = wanted + max(working.values(), default=0)
        turns = bisect_left(range(longest), wanted, key=lambda n: sum(first(n).values()))
        left, walks = first(turns), []
        jobs = select(JobRow.id, *of, JobRow.sent_at).where(_NEW)
        if 2 * sum(left.values()) >= every:
            return jobs.subquery(), wanted
        for group in sorted(groups, key=lambda group: _URGENCY[group.priority]):
            number = min(left[group.tenant_id], group.number)
            left[group.tenant_id] -= number
            if number:
                walks.append(
                    jobs.where(JobRow.tenant_id == group.tenant_id)
                    .where(JobRow.priority == group.priority)
                    .order_by(JobRow.sent_at, JobRow.id)
                    .limit(number)
                    .subquery()
                )
        if len(walks) > MAX_WALKS:
            return jobs.subquery(), wanted
        return union_all(*map(select, walks)).subquery(), wanted

    def retry(self, job_id: str) -> bool:
        """Queue a failed or cancelled job again; False if it is in another state."""
        now = database_now(self.session)
        queued = self._set(
            and_(JobRow.id == job_id, self._owned(), JobRow.state.in_(UNSUCCESSFUL)),
            state=JobState.QUEUED,
            stage_block=0,
            stage_blocks=0,
            percent=0.0,
            message="",
            error_code=None,
            error_message=None,
            cancel_requested=False,
            attempt=0,
            sent_at=now,
            updated_at=now,
            started_at=None,
            idle_seconds=0.0,
            finished_at=None,
        )
        if queued:
            self.write_log(job_id, "Queued again on request.")
            self._record(AuditAction.JOB_RETRY, job_id)
        return queued

    def _record(self, action: AuditAction, job_id: str, *, outcome: str = DONE) -> None:
        job = self.session.execute(
            select(JobRow.tenant_id, JobRow.delta_id).where(JobRow.id == job_id)
        ).one()
        record(self.session, job.tenant_id, action, job_id, outcome=outcome, delta=job.delta_id)

    def write_log(self, job_id: str, message: str) -> None:
        """Add a line to the job's log; beyond `MAX_LOG_LINES` the oldest is dropped."""
        at = database_now(self.session)
        self.session.execute(insert(JobLogRow).values(job_id=job_id, at=at, message=message))
        kept = (
            select(JobLogRow.id)
            .where(JobLogRow.job_id == job_id)
            .order_by(JobLogRow.id.desc())
            .offset(MAX_LOG_LINES)
            .limit(1)
        )
        self.session.execute(
            delete(JobLogRow).where(
                JobLogRow.job_id == job_id, JobLogRow.id <= kept.scalar_subquery()
            ),
            execution_options={"synchronize_session": False},
        )

    def log(self, job_id: str, *, after: int, limit: int) -> Sequence[JobLogRow]:
        """Up to `limit` lines of the job's log that follow the line `after`, oldest first."""
        return self.session.scalars(
            select(JobLogRow)
            .where(JobLogRow.job_id == job_id, JobLogRow.id > after)
            .order_by(JobLogRow.id)
            .limit(limit)
        ).all()

    def acquire_next(self, owner: str, lease_seconds: float) -> JobRow | None:
        """As `acquire`, of the waiting job whose turn it is; None if no job waits."""
        while queue := self._queue(1):
            if (job := self.acquire(queue[0], owner, lease_seconds)) is not None:
                return job  # else another worker was faster
        return None

    def acquire(self, job_id: str, owner: str, lease_seconds: float) -> JobRow | None:
        """Acquire the lease for `owner`; returns the job with its delta and base loaded.

        None if another owner's lease is live, the state is final or the job does not exist.
        """
        now = database_now(self.session)
        before = self.session.execute(
            select(JobRow.started_at, JobRow.lease_owner, JobRow.message).where(JobRow.id == job_id)
        ).one_or_none()
        does, message, why = "starts", "", ""
        if before is not None and before.started_at is not None:
            does, message = "continues", "repeating unsaved steps"
            if before.message.startswith(TRIED_AGAIN):
                why = before.message.removeprefix(TRIED_AGAIN)
            elif before.lease_owner not in (None, owner):
                why = f", as {before.lease_owner} has died"
        free = or_(JobRow.lease_owner == owner, _free(now))
        if not self._set(
            and_(JobRow.id == job_id, JobRow.state.not_in(FINAL_STATES), free),
            lease_owner=owner,
            lease_expires_at=now + timedelta(seconds=lease_seconds),
            attempt=JobRow.attempt + 1,
            # Until it is past them: `advance` only moves forward.
            message=message + why,
            updated_at=now,
            started_at=func.coalesce(JobRow.started_at, now),
            idle_seconds=JobRow.idle_seconds + self._idle_for(job_id, now),
            expected_at=None,
        ):
            return None
        job = self.session.scalars(
            select(JobRow)
            .options(
                joinedload(JobRow.delta).joinedload(DeltaRow.base).joinedload(BaseRow.checkpoint)
            )
            .where(JobRow.id == job_id)
            .execution_options(populate_existing=True)
        ).one()
        if does == "starts":
            served = update(TenantRow).where(TenantRow.id == job.tenant_id).values(served_at=now)
            self.session.execute(served, execution_options={"synchronize_session": False})
        self.write_log(job_id, f"Attempt {job.attempt} {does} on {owner}{why.rstrip('.')}.")
        return job

    def _idle_for(self, job_id: str, now: datetime) -> float:
        """Seconds since the job's last worker left it, or recorded progress before it died."""
        left_at = self.session.scalar(
            select(JobRow.updated_at).where(JobRow.id == job_id, JobRow.started_at.is_not(None))
        )
        return 0.0 if left_at is None else max(0.0, (now - left_at).total_seconds())

    def renew(self, job_id: str, owner: str, lease_seconds: float) -> bool:
        """Extend the lease; False if `owner` no longer holds it."""
        expires = database_now(self.session) + timedelta(seconds=lease_seconds)
        return self._set(_held(job_id, owner), lease_expires_at=expires)

    def advance(self, job_id: str, owner: str, progress: JobProgress) -> bool:
        """Record progress; False if `owner` no longer holds the lease.

        Progress only moves forward: a worker that repeats a predecessor's steps updates only the
        expected end until it is past them. A search for a goal may return to an earlier state.

        Raises:
            ValueError: the state is final; use `finish`.
        """
        if progress.state.is_final:
            raise ValueError(f"{progress.state} is final: use finish.")
        now, seconds = database_now(self.session), progress.seconds_left
        ends = None if seconds is None else now + timedelta(seconds=seconds)
        held = _held(job_id, owner)
        return self._set(
            and_(held, JobRow.percent <= progress.percent),
            state=progress.state,
            stage_block=progress.block,
            stage_blocks=progress.blocks,
            percent=progress.percent,
            message=progress.message,
            updated_at=now,
            expected_at=ends,
        ) or self._set(held, updated_at=now, expected_at=ends)

    def finish(
        self,
        job_id: str,
        owner: str,
        state: JobState,
        *,
        error_code: str | None = None,
        error_message: str | None = None,
    ) -> bool:
        """Enter a final state and release the lease; False if `owner` no longer holds it.

        Raises:
            ValueError: `state` is not final.
        """
        if not state.is_final:
            raise ValueError(f"{state} is not final: use advance.")
        now = database_now(self.session)
        ended = self._set(_held(job_id, owner), **_ending(state, now, error_code, error_message))
        if ended:
            line = f"{state.capitalize()} ({error_code}): {error_message}"
            if error_message is None:
                line = f"{state.capitalize()}."
            elif state is JobState.CANCELLED:  # whose message says so
                line = error_message
            self.write_log(job_id, line)
            self._record(AuditAction.JOB_END, job_id, outcome=error_code or DONE)
        return ended

    def release(self, job_id: str, owner: str) -> bool:
        """Release the lease of an unfinished job when its worker shuts down.

        This does not count as an attempt. False if `owner` no longer holds the lease.
        """
        now = database_now(self.session)
        released = self._set(
            _held(job_id, owner),
            lease_owner=None,
            lease_expires_at=None,
            attempt=JobRow.attempt - 1,
            message="waiting for a worker to continue",
            updated_at=now,
            expected_at=None,
        )
        if released:
            self.write_log(job_id, f"{owner} shuts down; another worker continues.")
        return released

    def leases(self) -> dict[str, str]:
        """Owners of the live leases, by their jobs' ids."""
        now = database_now(self.session)
        query = select(JobRow.id, JobRow.lease_owner).where(_at_work(now))
        return {row.id: row.lease_owner for row in self.session.execute(query)}

    def expire(
        self, job_id: str, owner: str, error: str | None = None, *, wait_seconds: float = 0.0
    ) -> bool:
        """End the lease of a worker that has died, or met an error; False if it does not hold it.

        Unlike a release this counts as an attempt: the job may be what kills its workers. After an
        error the next attempt may have to wait, until what caused it has ended.
        """
        now = database_now(self.session)
        expired = self._set(
            _held(job_id, owner),
            lease_owner=None if error else owner,
            lease_expires_at=now + timedelta(seconds=wait_seconds),
            message=f"{TRIED_AGAIN} after an error: {error}"
            if error
            else "waiting for a worker to continue",
            updated_at=now,
            expected_at=None,
        )
        if expired:
            self.write_log(
                job_id,
                f"{TRIED_AGAIN.capitalize()} after an error: {error}"
                if error
                else f"{owner} has died; another worker continues.",
            )
        return expired

    def request_cancel(self, job_id: str) -> JobRow | None:
        """Cancel the job: immediately if no worker holds it, else at its next progress report.

        A job in a final state is unchanged. None if the job does not exist.
        """
        now = database_now(self.session)
        idle_for = self._idle_for(job_id, now)
        idle = or_(JobRow.lease_owner.is_(None), JobRow.lease_expires_at <= now)
        unfinished = and_(JobRow.id == job_id, self._owned(), JobRow.state.not_in(FINAL_STATES))
        if self._set(
            unfinished,
            cancel_requested=True,
            message="Cancellation requested, ends at its next step",
            updated_at=now,
            expected_at=None,
        ):
            self._record(AuditAction.JOB_CANCEL, job_id)
        if self._set(
            and_(unfinished, idle),
            **_ending(JobState.CANCELLED, now, "cancelled", "Cancelled on request."),
            idle_seconds=JobRow.idle_seconds + idle_for,
        ):
            self.write_log(job_id, "Cancelled on request.")
        return self.find(job_id)

    def stale(self, *, queued_seconds: float = 120.0, limit: int = 100) -> Sequence[str]:
        """Ids of jobs whose task may be lost, oldest first, for the sweeper to re-send.

        Jobs whose lease expired, and jobs that no worker took within `queued_seconds` of their
        task being sent (after a crash or broker failure between commit and send).
        """
        now = database_now(self.session)
        waiting = and_(
            JobRow.lease_expires_at.is_(None),
            JobRow.sent_at <= now - timedelta(seconds=queued_seconds),
        )
        return self.session.scalars(
            select(JobRow.id)
            .where(JobRow.state.in_(RUNNING_ORDER), or_(waiting, JobRow.lease_expires_at <= now))
            .order_by(JobRow.created_at)
            .limit(limit)
        ).all()

    def _set(self, condition: ColumnElement[bool], **values: Any) -> bool:
        """UPDATE ... WHERE condition; returns whether any row matched."""
        result = self.session.execute(
            update(JobRow).where(condition).values(**values),
            execution_options={"synchronize_session": False},
        )
        return changed_rows(result)


def _at_work(now: datetime) -> ColumnElement[bool]:
    """Whether a worker holds the job's lease."""
    return and_(_BEGUN, JobRow.lease_owner.is_not(None), JobRow.lease_expires_at > now)


def _free(now: datetime) -> ColumnElement[bool]:
    """Whether a worker may take the job: a time without an owner is when its wait ends."""
    return or_(JobRow.lease_expires_at.is_(None), JobRow.lease_expires_at <= now)


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
        "expected_at": None,
        "finished_at": now,
    }
    if state is not JobState.FAILED:  # a failed job keeps the message of the step that failed
        ending["message"] = ""
    if state is JobState.READY:
        ending["percent"] = 100.0
    return ending
