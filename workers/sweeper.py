"""Cleans up after crashes: lost tasks, abandoned uploads, files of ended jobs.

Every worker runs a sweeper; all steps are idempotent, so they may overlap.
"""

import threading
from collections.abc import Callable
from datetime import timedelta
from typing import Final

import structlog

from deltadock.errors import DeltadockError
from deltadock.settings import Settings
from deltadock.storage.collection import DROPPED_AT_ONCE, Collector
from deltadock.storage.database import database_now
from deltadock.storage.repositories import (
    IdempotencyRepository,
    JobRepository,
    UploadRepository,
    WebhookRepository,
)
from deltadock.storage.repositories.blobs import batches
from deltadock.storage.repositories.uploads import UNFINISHED
from deltadock.storage.tenancy import EVERY_TENANT
from deltadock.workers.compress import WorkerContext
from deltadock.workers.files import drop_unneeded
from deltadock.workers.metrics import COLLECTED

QUEUED_SECONDS: Final = 120.0
"""A task not taken by any worker for this long is presumed lost."""
ABANDONED_PER_SWEEP: Final = 1000

Send = Callable[[str], None]
"""Enqueues a job's task."""

log = structlog.get_logger(__name__)


def resend_lost(
    context: WorkerContext,
    send: Send,
    queue_is_empty: Callable[[], bool],
    queued_seconds: float = QUEUED_SECONDS,
) -> list[str]:
    """Re-send the tasks of stale jobs, once no task waits; returns the jobs' ids.

    While one does, the worker that takes it takes the job whose turn it is, whichever that is.
    """
    if not queue_is_empty():
        return []
    with context.database.read_scope() as session:
        lost = JobRepository(session, EVERY_TENANT).stale(queued_seconds=queued_seconds)
    for job_id in lost:
        send(job_id)
    return list(lost)


def drop_abandoned(context: WorkerContext) -> int:
    """Abort abandoned uploads, drop their parts and other staged bytes; returns how many."""
    with context.database.read_scope() as session:
        before = database_now(session) - timedelta(seconds=context.settings.upload_ttl)
        abandoned = UploadRepository(session, EVERY_TENANT).abandoned(before, ABANDONED_PER_SWEEP)
    at_once = DROPPED_AT_ONCE if context.database.is_file else 1
    for upload_ids in batches(sorted(abandoned), at_once):
        with context.database.session_scope() as session:
            uploads = UploadRepository(session, EVERY_TENANT)
            for upload_id in upload_ids:
                # Check again under the lock: the client may just have resumed.
                locked = uploads.find(upload_id, lock=True)
                if locked is not None and locked.updated_at < before:
                    uploads.abort(locked)
    for upload_id in context.blobs.parted_uploads():
        with context.database.read_scope() as session:
            owner = UploadRepository(session, EVERY_TENANT).find(upload_id)
        if owner is None or owner.state not in UNFINISHED:
            context.blobs.drop_parts(upload_id)
    return len(abandoned) + context.blobs.drop_staging(before)


def drop_job_folders(context: WorkerContext) -> int:
    """Remove this machine's files of ended jobs and lost attempts; returns how many folders."""

    def needed(job_id: str, owner: str | None) -> bool:
        with context.database.read_scope() as session:
            job = JobRepository(session, EVERY_TENANT).find(job_id)
        if job is None or job.state.is_final:
            return False
        # An owner that has lost the lease never gets it back.
        return owner is None or owner == job.lease_owner

    return drop_unneeded(context.settings, needed)


def show_alive(settings: Settings) -> None:
    """Touch the file that health checks look at."""
    settings.worker_alive.parent.mkdir(parents=True, exist_ok=True)
    settings.worker_alive.touch()


def drop_old_rows(context: WorkerContext) -> None:
    """Delete rows that are kept for a time: first answers, messages to webhooks."""
    with context.database.session_scope() as session:
        IdempotencyRepository(session, EVERY_TENANT).drop_old()
        WebhookRepository(session, EVERY_TENANT).drop_old()


def collect(context: WorkerContext) -> None:
    """Remove stored bytes that nothing needs any more."""
    collected = Collector(context.database, context.blobs, context.settings).run()
    if collected.usage:
        log.info("collected", bytes={kind: one.bytes for kind, one in collected.usage.items()})
    for kind, one in collected.usage.items():
        COLLECTED.labels(kind).inc(one.bytes)
    for reason in collected.blocked:
        log.info("not_collected", reason=reason)


def sweep(context: WorkerContext, send: Send, queue_is_empty: Callable[[], bool]) -> None:
    """Run all steps once."""
    for job_id in resend_lost(context, send, queue_is_empty):
        log.info("job_sent_again", job=job_id)
    if dropped := drop_abandoned(context):
        log.info("abandoned_dropped", count=dropped)
    drop_job_folders(context)
    drop_old_rows(context)
    # Health checks look at the file's age; this thread runs during long compressions, too.
    show_alive(context.settings)


class Periodic:
    """A thread that repeats a step while its worker runs."""

    def __init__(self, name: str, step: Callable[[], object], interval: float) -> None:
        """Args: the thread's name, the step, and the seconds between two runs of it."""
        self._step = step
        self._interval = interval
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def start(self) -> None:
        """Start; the first step is immediate."""
        self._thread.start()

    def stop(self) -> None:
        """Stop after the current step."""
        self._done.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._done.is_set():
            try:
                self._step()
            except* DeltadockError as found:  # such as a database that is temporarily down
                reasons = [str(error) for error in found.exceptions]
                log.warning("step_failed", step=self._thread.name, errors=reasons)
            except* Exception:
                log.exception("step_failed", step=self._thread.name)
            self._done.wait(self._interval)
