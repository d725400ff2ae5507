"""Looking at jobs, following them and stopping them."""

from collections.abc import AsyncIterator
from typing import Final

import anyio
from sqlalchemy.orm import Session
from starlette.concurrency import run_in_threadpool

from deltadock.api.jobs.schemas import JobOut
from deltadock.errors import NotFound
from deltadock.storage.database import Database
from deltadock.storage.models import JobRow
from deltadock.storage.repositories import JobRepository

POLL_SECONDS: Final = 0.5


def get_job(session: Session, job_id: str) -> JobRow:
    """The job with this id.

    Raises:
        NotFound: there is none.
    """
    job = JobRepository(session).find(job_id)
    if job is None:
        raise NotFound(f"There is no job {job_id!r}.")
    return job


def cancel_job(session: Session, job_id: str) -> JobRow:
    """Ask a job to stop; one that has ended stays as it is.

    Raises:
        NotFound: there is none.
    """
    job = JobRepository(session).request_cancel(job_id)
    if job is None:
        raise NotFound(f"There is no job {job_id!r}.")
    return job


async def follow_job(database: Database, job_id: str) -> AsyncIterator[JobOut]:
    """The job now and after every change, until it has ended."""

    def look() -> JobOut:
        with database.read_scope() as session:
            return JobOut.of(get_job(session, job_id))

    seen: JobOut | None = None
    while seen is None or not seen.state.is_final:
        job = await run_in_threadpool(look)
        if job != seen:
            seen = job
            yield job
        if not job.state.is_final:
            await anyio.sleep(POLL_SECONDS)
