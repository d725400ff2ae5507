"""Routes of jobs."""

from collections.abc import AsyncIterable
from typing import Annotated

from fastapi import APIRouter, Depends, Path
from fastapi.sse import EventSourceResponse, ServerSentEvent

from deltadock.api.dependencies import ReadSession, ResourcesDep, WriteUnit
from deltadock.api.jobs import service
from deltadock.api.jobs.schemas import EXAMPLE_JOB_ID, JobOut
from deltadock.api.problems import problems
from deltadock.errors import NotFound
from deltadock.storage.models import JobRow

router = APIRouter(prefix="/v1/jobs", tags=["jobs"])

JobId = Annotated[str, Path(examples=[EXAMPLE_JOB_ID])]


def existing_job(job_id: JobId, session: ReadSession) -> JobRow:
    """The job, so that an unknown id is a 404 before anything is streamed."""
    return service.get_job(session, job_id)


ExistingJob = Annotated[JobRow, Depends(existing_job, scope="function")]


@router.get("/{job_id}", responses=problems(NotFound))
def get_job(job: ExistingJob) -> JobOut:
    """How far the job is."""
    return JobOut.of(job)


@router.get("/{job_id}/events", response_class=EventSourceResponse, responses=problems(NotFound))
async def follow_job(job: ExistingJob, resources: ResourcesDep) -> AsyncIterable[ServerSentEvent]:
    """The job now and after every change, as server-sent events; ends when the job has ended."""
    async for state in service.follow_job(resources.database, job.id):
        yield ServerSentEvent(event="job", data=state)


@router.post("/{job_id}/cancel", responses=problems(NotFound))
def cancel_job(job_id: JobId, unit: WriteUnit) -> JobOut:
    """Stop the job: at once if no worker has it, else within moments. One that ended stays."""
    return JobOut.of(service.cancel_job(unit.session, job_id))
