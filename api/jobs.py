"""Jobs: progress of compressions, and cancelling them."""

from collections.abc import AsyncIterable
from datetime import datetime
from typing import Annotated, Final, Self

import anyio
from fastapi import APIRouter, Depends, Path
from fastapi.sse import EventSourceResponse, ServerSentEvent
from pydantic import BaseModel, Field
from starlette.concurrency import run_in_threadpool

from deltadock.api.dependencies import ReadSession, ResourcesDep, WriteUnit
from deltadock.api.problems import problems
from deltadock.api.schemas import EXAMPLE_DELTA_ID, EXAMPLE_TIME
from deltadock.errors import NotFound
from deltadock.storage.models import JobRow, JobState
from deltadock.storage.repositories import JobRepository

router = APIRouter(prefix="/v1/jobs", tags=["jobs"])

EXAMPLE_JOB_ID: Final = "job_k7wq2mzv5c3xj6nhy4tbr2dfsa"
POLL_SECONDS: Final = 0.5

JobId = Annotated[str, Path(examples=[EXAMPLE_JOB_ID])]


class JobError(BaseModel):
    """Why a job failed or was cancelled."""

    code: str = Field(examples=["non_finite_weights"])
    message: str = Field(examples=["model.layers.3.mlp.up_proj.weight holds NaN."])


class JobOut(BaseModel):
    """State and progress of a compression."""

    id: str = Field(examples=[EXAMPLE_JOB_ID])
    delta: str = Field(description="The delta's id.", examples=[EXAMPLE_DELTA_ID])
    state: JobState = Field(examples=["compressing"])
    block: int = Field(description="Current block of the stage.", examples=[3])
    blocks: int = Field(description="Blocks of the stage.", examples=[8])
    percent: float = Field(description="Of the whole job, to one decimal.", examples=[42.5])
    message: str = Field(examples=["model.layers.3"])
    error: JobError | None = None
    cancel_requested: bool
    attempt: int = Field(description="How many workers have started it.", examples=[1])
    created_at: datetime = Field(examples=[EXAMPLE_TIME])
    updated_at: datetime = Field(examples=[EXAMPLE_TIME])
    finished_at: datetime | None = None

    @classmethod
    def of(cls, job: JobRow) -> Self:
        """Convert a row."""
        error = None
        if job.error_code is not None:
            error = JobError(code=job.error_code, message=job.error_message or "")
        return cls(
            id=job.id,
            delta=job.delta_id,
            state=job.state,
            block=job.stage_block,
            blocks=job.stage_blocks,
            percent=round(job.percent, 1),
            message=job.message,
            error=error,
            cancel_requested=job.cancel_requested,
            attempt=job.attempt,
            created_at=job.created_at,
            updated_at=job.updated_at,
            finished_at=job.finished_at,
        )


def _existing(job: JobRow | None, job_id: str) -> JobRow:
    if job is None:
        raise NotFound(f"There is no job {job_id!r}.")
    return job


def existing_job(job_id: JobId, session: ReadSession) -> JobRow:
    """The job; a dependency, so that an unknown id is a 404 before streaming starts."""
    return _existing(JobRepository(session).find(job_id), job_id)


ExistingJob = Annotated[JobRow, Depends(existing_job, scope="function")]


@router.get("/{job_id}", responses=problems(NotFound))
def get_job(job: ExistingJob) -> JobOut:
    """Get a job's state and progress."""
    return JobOut.of(job)


@router.get("/{job_id}/events", response_class=EventSourceResponse, responses=problems(NotFound))
async def follow_job(job: ExistingJob, resources: ResourcesDep) -> AsyncIterable[ServerSentEvent]:
    """Stream the job now and after every change, as server-sent events, until it has ended."""

    def read() -> JobOut:
        with resources.database.read_scope() as session:
            return JobOut.of(_existing(JobRepository(session).find(job.id), job.id))

    last: JobOut | None = None
    while last is None or not last.state.is_final:
        current = await run_in_threadpool(read)
        if current != last:
            last = current
            yield ServerSentEvent(event="job", data=current)
        if not current.state.is_final:
            await anyio.sleep(POLL_SECONDS)


@router.post("/{job_id}/cancel", responses=problems(NotFound))
def cancel_job(job_id: JobId, unit: WriteUnit) -> JobOut:
    """Cancel the job: immediately if no worker holds it, else at its next step.

    A job that has ended is unchanged.
    """
    return JobOut.of(_existing(JobRepository(unit.session).request_cancel(job_id), job_id))
