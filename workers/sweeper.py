"""Makes up for what crashes left: lost tasks, abandoned uploads, files of jobs that have ended.

Every worker runs one; they may meet, since each step can be repeated.
"""

import threading
from collections.abc import Callable
from datetime import timedelta
from typing import Final

import structlog

from deltadock.settings import Settings
from deltadock.storage.database import database_now
from deltadock.storage.repositories import JobRepository, UploadRepository
from deltadock.workers.compress import drop_files, job_folder
from deltadock.workers.context import Context

QUEUED_SECONDS: Final = 120.0
"""A job that nobody took this long after its task was sent has probably lost it."""

ABANDONED: Final = timedelta(hours=24)
"""An upload that nothing was added to for this long is dropped."""

log = structlog.get_logger(__name__)


def resend_lost(
    context: Context,
    send: Callable[[str], None],
    queue_is_empty: Callable[[], bool],
    queued_seconds: float = QUEUED_SECONDS,
) -> list[str]:
    """Send the tasks of stale jobs again; their ids.

    Only while no message waits for a worker: otherwise a job's own message may be among them,
    and a long queue would grow by its own length at every sweep.
    """
    if not queue_is_empty():
        return []
    with context.database.session_scope() as session:
        jobs = JobRepository(session)
        stale = [job.id for job in jobs.stale(queued_seconds=queued_seconds)]
        jobs.mark_sent(stale)
    for job_id in stale:
        send(job_id)
    return stale


def drop_abandoned(context: Context) -> int:
    """Abort uploads that were left open, and drop bytes whose sender went away; how many."""
    with context.database.session_scope() as session:
        uploads = UploadRepository(session)
        before = database_now(session) - ABANDONED
        abandoned = uploads.abandoned(before)
        for upload in abandoned:
            # Once more under its lock: its sender may just have come back.
            locked = uploads.find(upload.id, lock=True)
            if locked is not None and locked.updated_at < before:
                uploads.abort(locked)
    return len(abandoned) + context.blobs.drop_staging(before)


def drop_job_folders(context: Context) -> int:
    """Remove this machine's files of jobs that have ended elsewhere; how many jobs'."""
    dropped = 0
    for folder in job_folder(context.settings, "").glob("job_*"):
        with context.database.read_scope() as session:
            job = JobRepository(session).find(folder.name)
        if job is None or job.state.is_final:
            drop_files(folder.name, context)
            dropped += 1
    return dropped


def show_alive(settings: Settings) -> None:
    """Touch the file by which others see that this worker runs."""
    settings.worker_alive.parent.mkdir(parents=True, exist_ok=True)
    settings.worker_alive.touch()


class Sweeper:
    """A thread that sweeps at every interval, from the start to the end of its worker."""

    def __init__(
        self,
        context: Context,
        send: Callable[[str], None],
        queue_is_empty: Callable[[], bool],
        interval: float,
    ) -> None:
        self._context = context
        self._send = send
        self._queue_is_empty = queue_is_empty
        self._interval = interval
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._run, name="sweeper", daemon=True)

    def start(self) -> None:
        """Sweep at once and then again and again."""
        self._thread.start()

    def stop(self) -> None:
        """Stop after the sweep that is under way."""
        self._done.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._done.is_set():
            try:
                self.sweep()
            except Exception:  # a broker or database that is away comes back
                log.exception("sweep_failed")
            self._done.wait(self._interval)

    def sweep(self) -> None:
        """Everything once."""
        for job_id in resend_lost(self._context, self._send, self._queue_is_empty):
            log.info("job_sent_again", job=job_id)
        if dropped := drop_abandoned(self._context):
            log.info("abandoned_dropped", count=dropped)
        drop_job_folders(self._context)
        # Health checks look at its age: this thread runs during a long compression, too.
        show_alive(self._context.settings)
