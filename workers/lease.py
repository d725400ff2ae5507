"""The lease on a job: renewed by a heartbeat thread, checked at every progress report."""

import threading
from types import TracebackType
from typing import Any, Final, Self

import structlog

from deltadock.errors import Cancelled, DeltadockError, Unavailable
from deltadock.storage.blobs import BlobStore
from deltadock.storage.database import Database
from deltadock.storage.leases import died_here
from deltadock.storage.repositories import DeltaRepository, JobRepository, WebhookRepository
from deltadock.storage.repositories.blobs import lock_blobs
from deltadock.storage.repositories.jobs import JobProgress
from deltadock.storage.tables import JobState
from deltadock.storage.tenancy import EVERY_TENANT

STOPPING: Final = threading.Event()
"""Set once this worker process has been asked to stop."""

RENEWALS: Final = 6
"""Of a lease until it expires: all but the last may fail."""

log = structlog.get_logger(__name__)


def expire_leases_of_dead(database: Database) -> None:
    """End the leases of this machine's workers that have died, for others to go on at once.

    Only for a supervisor that sees the process ids of all workers with this machine's name.
    """
    with database.session_scope() as session:
        jobs = JobRepository(session, EVERY_TENANT)
        for job_id, owner in jobs.leases().items():
            if died_here(owner):
                jobs.expire(job_id, owner)


class LeaseLostError(Exception):
    """Another worker holds the job, or it has ended: this worker must not update it."""


class WorkerStoppingError(Exception):
    """This worker was asked to stop; another one resumes the job from its saved blocks."""


class Lease:
    """A lease acquired by `owner`; a thread renews it within the `with` block."""

    def __init__(self, database: Database, job_id: str, owner: str, seconds: float) -> None:
        self.job_id = job_id
        self.owner = owner
        self._database = database
        self._seconds = seconds
        self._lost = threading.Event()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._renew, name="lease", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._done.set()
        self._thread.join()

    @property
    def held(self) -> bool:
        """Whether every renewal so far found the lease still held."""
        return not self._lost.is_set()

    def _renew(self) -> None:
        while not self._done.wait(self._seconds / RENEWALS):
            try:
                with self._database.session_scope() as session:
                    held = JobRepository(session, EVERY_TENANT).renew(
                        self.job_id, self.owner, self._seconds
                    )
            except Exception:  # the next renewal may succeed before the lease expires
                log.exception("lease_not_renewed", job=self.job_id)
                continue
            if not held:
                self._lost.set()
                return

    def check(self) -> None:
        """Raise if this worker must stop.

        Raises:
            Cancelled: cancellation was requested.
            LeaseLostError: another worker holds the job.
            WorkerStoppingError: this process was asked to stop.
        """
        if STOPPING.is_set():
            raise WorkerStoppingError
        with self._database.read_scope() as session:
            job = JobRepository(session, EVERY_TENANT).find(self.job_id)
        if not self.held or job is None or job.lease_owner != self.owner:
            raise LeaseLostError
        if job.cancel_requested:
            raise Cancelled("Cancelled on request.")

    def advance(self, progress: JobProgress, log_line: str | None = None) -> None:
        """Record progress, and a line in the job's log if there is one.

        Raises:
            Cancelled, LeaseLostError, WorkerStoppingError: as `check`.
        """
        self.check()
        with self._database.session_scope() as session:
            jobs = JobRepository(session, EVERY_TENANT)
            held = jobs.advance(self.job_id, self.owner, progress)
            if held and log_line is not None:
                jobs.write_log(self.job_id, log_line)
        if not held:
            raise LeaseLostError

    def finish(self, state: JobState, error: DeltadockError | None = None) -> None:
        """Enter a final state; a failure is told to the tenant's webhooks.

        Raises:
            LeaseLostError: another worker holds the job.
        """
        with self._database.session_scope() as session:
            jobs = JobRepository(session, EVERY_TENANT)
            finished = jobs.finish(
                self.job_id,
                self.owner,
                state,
                error_code=error.code if error else None,
                error_message=error.message if error else None,
            )
            if finished and error is not None and state is JobState.FAILED:
                job = jobs.find(self.job_id)
                delta = DeltaRepository(session, EVERY_TENANT).find(job.delta_id) if job else None
                if delta is not None:
                    WebhookRepository(session, delta.tenant_id).publish_outcome(delta, error)
        if not finished:
            raise LeaseLostError

    def complete(
        self, blobs: BlobStore, artifact_digest: str, artifact_bytes: int, report: dict[str, Any]
    ) -> None:
        """Record the stored artifact and make the job ready, in one transaction.

        Raises:
            Unavailable: an equal artifact was stored before, and collected just now.
            Cancelled: the delta was deleted meanwhile.
            LeaseLostError: another worker holds the job.
        """
        with self._database.session_scope() as session:
            jobs = JobRepository(session, EVERY_TENANT)
            job = jobs.find(self.job_id)
            delta = DeltaRepository(session, EVERY_TENANT).find(job.delta_id) if job else None
            if delta is None:
                raise Cancelled("The delta was deleted.")
            lock_blobs(session, artifact_digest)
            if not blobs.exists(artifact_digest):
                raise Unavailable("The artifact was collected just now; it is stored again.")
            DeltaRepository(session, EVERY_TENANT).set_result(
                delta,
                artifact_digest=artifact_digest,
                artifact_bytes=artifact_bytes,
                report=report,
            )
            if not jobs.finish(self.job_id, self.owner, JobState.READY):
                raise LeaseLostError
            WebhookRepository(session, delta.tenant_id).publish_outcome(delta)

    def release(self) -> None:
        """Release the lease, so that another worker can resume the job at once."""
        with self._database.session_scope() as session:
            JobRepository(session, EVERY_TENANT).release(self.job_id, self.owner)

    def expire(self, error: DeltadockError) -> None:
        """Let the lease expire soon after `error`, so that a worker begins the next attempt."""
        with self._database.session_scope() as session:
            JobRepository(session, EVERY_TENANT).expire(
                self.job_id, self.owner, error.message, wait_seconds=self._seconds / 2
            )
