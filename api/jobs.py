"""Jobs: progress of compressions, listing, cancelling and retrying them."""

from collections.abc import AsyncIterable, Sequence
from datetime import UTC, datetime
from functools import partial
from typing import Annotated, Final, Self, TypeVar

import anyio
from fastapi import Depends, Path, Query
from fastapi.sse import EventSourceResponse, ServerSentEvent
from pydantic import BaseModel, Field
from sqlalchemy.orm import Session

from deltadock.api.access import CallerDep
from deltadock.api.bases import require_base
from deltadock.api.deltas.lookup import require_delta
from deltadock.api.dependencies import ReadSession, ResourcesDep, WriteUnit
from deltadock.api.paging import After, Cursor, Limit
from deltadock.api.quotas import check_job
from deltadock.api.routing import api_router
from deltadock.api.schemas import EXAMPLE_DELTA_ID, EXAMPLE_TIME, Moment
from deltadock.errors import Conflict, InvalidInput, NotFound, NotReady, error_for
from deltadock.problems import problems
from deltadock.storage.repositories import CheckpointRepository, DeltaRepository, JobRepository
from deltadock.storage.repositories.listing import JobFilter, key_of_job
from deltadock.storage.repositories.shown import ShownJob
from deltadock.storage.tables import UNSUCCESSFUL, JobLogRow, JobPriority, JobRow, JobState

router = api_router("/v1/jobs", tags=["jobs"])

EXAMPLE_JOB_ID: Final = "job_k7wq2mzv5c3xj6nhy4tbr2dfsa"
POLL_SECONDS: Final = 0.5

JobId = Annotated[str, Path(examples=[EXAMPLE_JOB_ID])]
Job = TypeVar("Job", JobRow, ShownJob)


class JobError(BaseModel):
    """Why a job failed or was cancelled."""

    code: str = Field(examples=["non_finite_weights"])
    message: str = Field(examples=["model.layers.3.mlp.up_proj.weight holds NaN."])

    @classmethod
    def of(cls, job: JobRow | ShownJob) -> Self | None:
        """Why the job did not succeed, or None."""
        if job.error_code is None:
            return None
        return cls(code=job.error_code, message=job.error_message or "")


def can_retry(job: JobRow | ShownJob) -> bool:
    """Whether the job was cancelled, or failed for a reason that can pass."""
    if job.state not in UNSUCCESSFUL:
        return False
    return not (job.error_code and error_for(job.error_code, "").permanent)


class JobOut(BaseModel):
    """State and progress of a compression."""

    id: str = Field(examples=[EXAMPLE_JOB_ID])
    delta: str = Field(description="The delta's id.", examples=[EXAMPLE_DELTA_ID])
    state: JobState = Field(examples=["compressing"])
    priority: JobPriority
    queue_position: int | None = Field(
        default=None,
        description="Its place among the jobs that wait for a worker, 1 being next, and 1001 for "
        "all behind the first thousand; null once one has started it.",
        examples=[3],
    )
    block: int = Field(
        description="Steps that are done of what `message` says, such as blocks of the model.",
        examples=[3],
    )
    blocks: int = Field(description="All of these steps.", examples=[8])
    percent: float = Field(description="Of the whole job, to one decimal.", examples=[42.5])
    message: str = Field(
        description="What is done now; blocks are counted from 1.",
        examples=["block 4 of 8, matrix 3 of 7"],
    )
    error: JobError | None = None
    can_retry: bool = Field(
        description="Whether a retry may help: the job was cancelled, or failed for a reason that "
        "can pass. Else `error` says what to change."
    )
    cancel_requested: bool
    attempt: int = Field(description="How many workers have started it.", examples=[1])
    created_at: datetime = Field(examples=[EXAMPLE_TIME])
    updated_at: datetime = Field(examples=[EXAMPLE_TIME])
    started_at: datetime | None = Field(
        default=None, description="When a worker first started it, since the last retry."
    )
    idle_seconds: float = Field(
        description="Since then without a worker, such as between two attempts.", examples=[0.0]
    )
    expected_at: datetime | None = Field(
        default=None,
        description="When it will be finished at its rate so far; null until a tenth is done, and "
        "if that time has passed.",
    )
    finished_at: datetime | None = None

    @classmethod
    def of(cls, job: JobRow | ShownJob, queue_position: int | None = None) -> Self:
        """Convert a row."""
        now, idle = datetime.now(UTC), job.idle_seconds
        if job.started_at and job.lease_owner is None and not job.state.is_final:
            idle += max(0.0, (now - job.updated_at).total_seconds())
        return cls(
            id=job.id,
            delta=job.delta_id,
            state=job.state,
            priority=job.priority,
            queue_position=queue_position,
            block=job.stage_block,
            blocks=job.stage_blocks,
            percent=round(job.percent, 1),
            message=job.message,
            error=JobError.of(job),
            can_retry=can_retry(job),
            cancel_requested=job.cancel_requested,
            attempt=job.attempt,
            created_at=job.created_at,
            updated_at=job.updated_at,
            started_at=job.started_at,
            idle_seconds=round(idle, 3),
            expected_at=job.expected_at if job.expected_at and job.expected_at > now else None,
            finished_at=job.finished_at,
        )


class JobPage(BaseModel):
    """Jobs, newest first. `next` is the next page's `after`; null on the last page."""

    data: list[JobOut]
    next: str | None = Field(description="Opaque.")


class LogLine(BaseModel):
    """One line of a job's log."""

    id: int = Field(description="Ascending.", examples=[17])
    at: datetime = Field(examples=[EXAMPLE_TIME])
    message: str = Field(examples=["compressing: block 3 of 8"])

    @classmethod
    def of(cls, line: JobLogRow) -> Self:
        """Convert a row."""
        return cls(id=line.id, at=line.at, message=line.message)


class JobLog(BaseModel):
    """Lines of a job's log, oldest first. `next` is the next page's `after`; null at the end."""

    data: list[LogLine]
    next: int | None = Field(examples=[17])


def describe_jobs(
    session: Session, tenant_id: str, jobs: Sequence[JobRow | ShownJob]
) -> list[JobOut]:
    """The jobs with their places in the queue."""
    places = JobRepository(session, tenant_id).positions(jobs)
    return [JobOut.of(job, places.get(job.id)) for job in jobs]


_CURSOR: Final = Cursor("jobs", datetime, str)


def page_of_jobs(
    session: Session, tenant_id: str, wanted: JobFilter, *, limit: int, after: str | None
) -> tuple[list[JobOut], str | None]:
    """A page of jobs, newest first, and the next page's `after` (None on the last page).

    Raises:
        NotFound: `after` is not a cursor of this list.
    """
    found = JobRepository(session, tenant_id).page(
        limit=limit + 1, wanted=wanted, after=_CURSOR.read(after)
    )
    page, following = _CURSOR.page(found, limit, key_of_job)
    return describe_jobs(session, tenant_id, page), following


def page_of_log(
    session: Session, tenant_id: str, job: ShownJob, *, limit: int, after: int = 0
) -> JobLog:
    """Lines of the job's log that follow `after`, oldest first."""
    lines = JobRepository(session, tenant_id).log(job.id, after=after, limit=limit + 1)
    page = lines[:limit]
    return JobLog(
        data=[LogLine.of(line) for line in page],
        next=page[-1].id if len(lines) > limit else None,
    )


def _existing(job: Job | None, job_id: str) -> Job:
    if job is None:
        raise NotFound(f"There is no job {job_id!r}.")
    return job


def show_job(session: Session, tenant_id: str, job_id: str) -> ShownJob:
    """The columns of the job that answers show.

    Raises:
        NotFound: there is none.
    """
    return _existing(JobRepository(session, tenant_id).show(job_id), job_id)


def existing_job(job_id: JobId, caller: CallerDep, resources: ResourcesDep) -> ShownJob:
    """The job; a dependency, so that an unknown id is a 404 before streaming starts."""
    with resources.database.read_scope() as session:
        return show_job(session, caller.tenant_id, job_id)


def _delta_id(session: Session, tenant_id: str, reference: str) -> str:
    if DeltaRepository(session, tenant_id).references([reference]):
        return reference  # an id, if need be of a deleted one
    return require_delta(session, tenant_id, reference).id


@router.get("", responses=problems(InvalidInput, NotFound, NotReady))
def list_jobs(
    caller: CallerDep,
    session: ReadSession,
    state: Annotated[list[JobState] | None, Query(description="Any of these states.")] = None,
    delta: Annotated[
        str | None, Query(description="A delta's id or name; a deleted one's id too.")
    ] = None,
    base: Annotated[str | None, Query(description="A base's id or name.")] = None,
    created_from: Annotated[Moment | None, Query()] = None,
    created_before: Annotated[Moment | None, Query()] = None,
    after: After = None,
    limit: Limit = 50,
) -> JobPage:
    """List the jobs, newest first; failed ones stay listed with their reason."""
    wanted = JobFilter(
        states=state or (),
        delta_id=None if delta is None else _delta_id(session, caller.tenant_id, delta),
        base_id=None if base is None else require_base(session, caller.tenant_id, base).id,
        created_from=created_from,
        created_before=created_before,
    )
    jobs, next_after = page_of_jobs(session, caller.tenant_id, wanted, limit=limit, after=after)
    return JobPage(data=jobs, next=next_after)


@router.get("/{job_id}", responses=problems(NotFound))
def get_job(job_id: JobId, caller: CallerDep, session: ReadSession) -> JobOut:
    """Get a job's state and progress."""
    job = show_job(session, caller.tenant_id, job_id)
    return describe_jobs(session, caller.tenant_id, [job])[0]


@router.get("/{job_id}/log", responses=problems(NotFound))
def get_job_log(
    job_id: JobId,
    caller: CallerDep,
    session: ReadSession,
    after: Annotated[int, Query(ge=0, lt=2**63, description="The last line that was seen.")] = 0,
    limit: Annotated[int, Query(ge=1, le=1000)] = 100,
) -> JobLog:
    """Get the lines of a job's log, oldest first; its newest thousand are kept."""
    job = show_job(session, caller.tenant_id, job_id)
    return page_of_log(session, caller.tenant_id, job, limit=limit, after=after)


@router.get("/{job_id}/events", response_class=EventSourceResponse, responses=problems(NotFound))
async def follow_job(
    job: Annotated[ShownJob, Depends(existing_job)], resources: ResourcesDep
) -> AsyncIterable[ServerSentEvent]:
    """Stream the job now and after every change, as server-sent events, until it has ended."""
    last: JobOut | None = None
    with resources.jobs.following(job.id):
        while last is None or not last.state.is_final:
            watched = await resources.jobs.read(job.id)
            if watched is None:
                raise NotFound(f"There is no job {job.id!r} any more.")
            current = JobOut.of(watched.row, watched.place)
            if current != last:
                last = current
                yield ServerSentEvent(event="job", data=current)
            if not current.state.is_final:
                await anyio.sleep(POLL_SECONDS)


@router.post("/{job_id}/cancel", responses=problems(NotFound))
def cancel_job(job_id: JobId, caller: CallerDep, unit: WriteUnit) -> JobOut:
    """Cancel the job: immediately if no worker holds it, else at its next step.

    A job that has ended is unchanged.
    """
    jobs = JobRepository(unit.session, caller.tenant_id)
    job = _existing(jobs.request_cancel(job_id), job_id)
    return describe_jobs(unit.session, caller.tenant_id, [job])[0]


@router.post("/{job_id}/retry", status_code=202, responses=problems(NotFound, Conflict))
def retry_job(job_id: JobId, caller: CallerDep, unit: WriteUnit, resources: ResourcesDep) -> JobOut:
    """Queue a failed or cancelled job again; it continues after its last finished block.

    A job whose inputs are at fault (`can_retry` is false) would end the same way, and is refused.
    """
    jobs = JobRepository(unit.session, caller.tenant_id)
    job = _existing(jobs.find(job_id), job_id)
    delta = DeltaRepository(unit.session, caller.tenant_id).find(job.delta_id)
    if delta is None:
        raise Conflict(f"The delta of job {job_id} was deleted. Restore it, or ask for it again.")
    if job.state in UNSUCCESSFUL:
        if not can_retry(job):
            raise Conflict(
                f"Job {job_id} failed for a reason that no retry mends ({job.error_code}): "
                f"{job.error_message}"
            )
        checkpoints = CheckpointRepository(unit.session, caller.tenant_id)
        if checkpoints.find(delta.checkpoint_digest) is None:
            raise Conflict(
                f"The fine-tune of {delta.name}:{delta.version} is not stored any more. "
                "Push it again."
            )
        check_job(unit.session, caller.tenant_id, more=1)
    if not jobs.retry(job_id):
        if job.cancel_requested:
            raise Conflict(f"Job {job_id} is being cancelled. Retry it once it has ended.")
        raise Conflict(
            f"Job {job_id} is {job.state}: only a failed or cancelled job can be retried."
        )
    unit.after_commit.append(partial(resources.tasks.send_compress, job_id))
    return describe_jobs(unit.session, caller.tenant_id, [_existing(jobs.find(job_id), job_id)])[0]
