"""Progress of the jobs that clients follow, read for all of them at once."""

import time
from collections import Counter
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Final, NamedTuple

import anyio
from starlette.concurrency import run_in_threadpool

from deltadock.storage.database import Database
from deltadock.storage.repositories import JobRepository
from deltadock.storage.repositories.shown import ShownJob
from deltadock.storage.tenancy import EVERY_TENANT

CACHE_SECONDS: Final = 0.3


class WatchedJob(NamedTuple):
    """A job, and its place in the queue if it waits."""

    row: ShownJob
    place: int | None


class JobWatch:
    """The followed jobs, at most `CACHE_SECONDS` old; for one event loop.

    However many streams there are, the database is asked three times a second.
    """

    def __init__(self, database: Database) -> None:
        self._database = database
        self._followed: Counter[str] = Counter()
        self._jobs: dict[str, WatchedJob] = {}
        self._read_at = float("-inf")
        self._reading = anyio.Lock()

    @contextmanager
    def following(self, job_id: str) -> Iterator[None]:
        """Read the job together with the others while the block runs."""
        self._followed[job_id] += 1
        try:
            yield
        finally:
            self._followed[job_id] -= 1
            if not self._followed[job_id]:
                del self._followed[job_id]
                self._jobs.pop(job_id, None)

    async def read(self, job_id: str) -> WatchedJob | None:
        """The followed job; None: there is none any more.

        Raises:
            Unavailable: the database does not answer.
        """
        async with self._reading:
            if job_id not in self._jobs or time.monotonic() - self._read_at > CACHE_SECONDS:
                self._jobs = await run_in_threadpool(self._read, list(self._followed))
                self._read_at = time.monotonic()
            return self._jobs.get(job_id)

    def _read(self, job_ids: Collection[str]) -> dict[str, WatchedJob]:
        with self._database.read_scope() as session:
            jobs = JobRepository(session, EVERY_TENANT)
            rows = jobs.show_all(job_ids)
            places = jobs.positions(rows)
        return {row.id: WatchedJob(row, places.get(row.id)) for row in rows}
