"""Runs one compression job, from its row to its artifact.

    acquire the lease -> fetch base and fine-tune to disk -> compress -> store -> ready

Finished blocks are saved, so that another worker can resume an interrupted job; the artifact's
bytes are the same as without the interruption.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum, auto
from functools import cache, cached_property
from pathlib import Path
from typing import Final, NamedTuple, Self

import structlog

from deltadock import words
from deltadock.compression.options import CalibrationOptions, CompressOptions, Goal, Source
from deltadock.compression.pipeline import compress
from deltadock.compression.progress import Forecast, Progress
from deltadock.errors import Cancelled, DamagedBlob, DeltadockError, WorkerLost
from deltadock.kernels import choose_device
from deltadock.settings import Settings, get_settings
from deltadock.storage.blobs import BlobStore, make_blob_store
from deltadock.storage.cache import FileCache
from deltadock.storage.database import Database
from deltadock.storage.leases import new_owner
from deltadock.storage.repositories import JobRepository, UploadRepository
from deltadock.storage.repositories.blobs import BlobRepository
from deltadock.storage.repositories.jobs import JobProgress
from deltadock.storage.tables import DeltaRow, JobRow, JobState
from deltadock.storage.tenancy import EVERY_TENANT
from deltadock.workers.files import AttemptFiles
from deltadock.workers.lease import Lease, LeaseLostError, WorkerStoppingError
from deltadock.workers.metrics import ERRORS, JOBS, RUNNING, StageClock

MAX_ATTEMPTS: Final = 5
"""Lost workers and retryable errors after which the job fails."""

REPORT_SECONDS: Final = 0.25
"""Minimum interval between progress updates within one block."""
LOG_SECONDS: Final = 60.0
"""Maximum interval between lines of the job's log while it makes progress."""

log = structlog.get_logger(__name__)


@dataclass(frozen=True)
class WorkerContext:
    """A worker process's settings, database and blob store; they connect lazily."""

    settings: Settings
    database: Database
    blobs: BlobStore

    @classmethod
    def of(cls, settings: Settings) -> Self:
        """The context that the settings select."""
        return cls(settings, Database(settings.sqlalchemy_url), make_blob_store(settings))

    @cached_property
    def bases(self) -> FileCache:
        """The bases on this machine; another attempt goes on where fetching one was broken off."""
        return FileCache(self.blobs, self.settings.cache_folder)


@cache
def get_context() -> WorkerContext:
    """This process's context, created at first use: never before a fork."""
    return WorkerContext.of(get_settings())


class Outcome(Enum):
    """How a task ended."""

    SKIPPED = auto()
    """Another worker has taken the job over, or it had ended."""
    READY = auto()
    """The artifact is stored."""
    FINISHED = auto()
    """The job has failed or was cancelled; its saved blocks are kept for a retry."""
    STOPPED = auto()
    """The worker is shutting down."""
    LATER = auto()
    """After a retryable error, a worker takes the job again."""


class Taken(NamedTuple):
    """A job that this worker has acquired."""

    job: JobRow
    """With its delta and base."""
    owner: str
    """Of its lease."""


def take_job(context: WorkerContext) -> Taken | None:
    """Acquire the waiting job whose turn it is; None if no job waits."""
    owner = new_owner()
    with context.database.session_scope() as session:
        jobs = JobRepository(session, EVERY_TENANT)
        job = jobs.acquire_next(owner, context.settings.lease_seconds)
    return None if job is None else Taken(job, owner)


def compress_job(taken: Taken, context: WorkerContext) -> Outcome:
    """Run the job; every failure is recorded in its row."""
    job, owner = taken
    job_id, seconds = job.id, context.settings.lease_seconds
    with structlog.contextvars.bound_contextvars(job=job_id):
        log.info("job_acquired", attempt=job.attempt)
        with Lease(context.database, job_id, owner, seconds) as lease, RUNNING.track_inprogress():
            outcome = _run_and_record(job, lease, context)
        JOBS.labels(outcome.name.lower()).inc()
        log.info("job_left", outcome=outcome.name.lower())
        files = AttemptFiles(context.settings, job_id, owner)
        if outcome in {Outcome.STOPPED, Outcome.LATER}:
            files.leave()
        else:
            files.drop()
        if outcome is Outcome.READY:
            _drop_blocks(job_id, context)
    return outcome


def _note_damaged(error: DamagedBlob, context: WorkerContext) -> None:
    """Have the file sent again when its checkpoint is uploaded again."""
    if error.digest is not None:
        with context.database.session_scope() as session:
            BlobRepository(session).note_damaged(error.digest)


def _drop_blocks(job_id: str, context: WorkerContext) -> None:
    """Remove a ready job's saved blocks; collection does if the store does not answer now."""
    try:
        context.blobs.drop_work(job_id)
    except DeltadockError as error:
        log.warning("job_blocks_not_dropped", error=error.message)


def _run_and_record(job: JobRow, lease: Lease, context: WorkerContext) -> Outcome:
    """Run the job and record its outcome."""
    try:
        if job.cancel_requested or job.delta.deleted_at is not None:
            lease.finish(JobState.CANCELLED, Cancelled("Cancelled on request."))
            return Outcome.FINISHED
        if job.attempt > MAX_ATTEMPTS:
            raise WorkerLost(
                f"{MAX_ATTEMPTS} workers started this job and none finished it. See the workers' "
                "logs; a machine with more memory may help."
            )
        with StageClock() as clock:
            _run(job, lease, clock, context)
    except LeaseLostError:
        log.warning("lease_lost")
        return Outcome.SKIPPED
    except WorkerStoppingError:
        lease.release()
        return Outcome.STOPPED
    except Cancelled as error:
        return _end(lease, JobState.CANCELLED, error)
    except DeltadockError as error:
        ERRORS.labels(error.code).inc()
        if error.retryable and job.attempt < MAX_ATTEMPTS:
            log.warning("job_retries", code=error.code, error=error.message)
            lease.expire(error)
            return Outcome.LATER
        log.warning("job_failed", code=error.code, error=error.message)
        if isinstance(error, DamagedBlob):
            _note_damaged(error, context)
        return _end(lease, JobState.FAILED, error)
    except Exception:
        log.exception("job_failed")
        ERRORS.labels(DeltadockError.code).inc()
        hidden = DeltadockError("The compression failed unexpectedly; see the worker's log.")
        return _end(lease, JobState.FAILED, hidden)
    return Outcome.READY


def _end(lease: Lease, state: JobState, error: DeltadockError) -> Outcome:
    try:
        lease.finish(state, error)
    except LeaseLostError:
        return Outcome.SKIPPED
    return Outcome.FINISHED


def _run(job: JobRow, lease: Lease, clock: StageClock, context: WorkerContext) -> None:
    """Compress and store the artifact.

    Raises:
        DeltadockError: the input is invalid, or a service does not answer.
        LeaseLostError, WorkerStoppingError: this worker must not finish the job.
    """
    delta, settings, blobs = job.delta, context.settings, context.blobs
    folder = AttemptFiles(settings, job.id, lease.owner).enter()
    progress = _reporter(lease, clock)
    progress(Progress("reading", 0, 0, 0.0, 0.0, "fetching the checkpoints"))
    limit = settings.checkpoint_cache_bytes
    with context.bases.held_checkpoint(delta.base.checkpoint_digest, limit) as (
        base,
        base_manifest,
    ):
        # In the attempt's folder, since it is needed only once; bases are cached for later jobs.
        finetuned, _ = FileCache(blobs, folder).checkpoint(delta.checkpoint_digest)
        artifact = folder / "delta.safetensors"
        report = compress(
            base,
            finetuned,
            artifact,
            _options(delta),
            calibration=_calibration(delta, context, folder),
            progress=progress,
            store=JobBlocks(blobs, job.id),
            device=str(choose_device(settings.device)),
            base_name=delta.base.name,
            scratch_folder=folder,
        ).to_dict()
    if report["base_digest"] != base_manifest.weights_digest:
        raise DamagedBlob("The base's files on this worker differ from the uploaded ones.")
    lease.complete(blobs, blobs.put_file(artifact), artifact.stat().st_size, report)


def _options(delta: DeltaRow) -> CompressOptions:
    options = delta.options
    requested = options["calibration"]
    calibration = (
        CalibrationOptions(requested["tokens"], requested["length"]) if requested else None
    )
    return CompressOptions(
        method=delta.method,
        goal=Goal(**options["goal"]) if options["goal"] else None,
        seed=options["seed"],
        solver=options["solver"],
        calibration=calibration or CalibrationOptions(),
    )


def _calibration(delta: DeltaRow, context: WorkerContext, folder: Path) -> list[Source]:
    """The calibration sources, with their texts fetched into `folder`."""
    requested = delta.options["calibration"]
    return [
        Source(
            _text(delta, digest, source.get("suffix"), context, folder)
            if (digest := source["digest"])
            else None,
            source["weight"],
        )
        for source in (requested["sources"] if requested else ())
    ]


def _text(
    delta: DeltaRow, digest: str, suffix: str | None, context: WorkerContext, folder: Path
) -> Path:
    if suffix is None:  # a release without it wrote the row
        with context.database.read_scope() as session:
            suffix = UploadRepository(session, delta.tenant_id).calibration_suffix(digest)
    path = folder / f"{digest}{suffix or '.txt'}"  # selects the text's parser
    context.blobs.fetch(digest, path)
    return path


def _reporter(lease: Lease, clock: StageClock) -> Callable[[Progress], None]:
    """A callback that writes progress to the row, and a line to the log for each new block.

    It checks at every step whether to stop, since the next one may be minutes away.
    """
    last_part = ("", "")
    last_time = last_line = 0.0
    forecast = Forecast()

    def report(progress: Progress) -> None:
        nonlocal last_part, last_time, last_line
        clock.enter(progress.stage)
        seconds_left = forecast.seconds_left(progress)
        part, now = (progress.phase, progress.message.partition(", ")[0]), time.monotonic()
        if part == last_part and now - last_time < REPORT_SECONDS:
            lease.check()
            return
        percent = 100 * progress.fraction
        log_line = None
        if part != last_part or now - last_line >= LOG_SECONDS:
            done = words.progress(percent)
            log_line, last_line = f"{progress.stage}: {progress.message} ({done})", now
        last_part, last_time = part, now
        state, message = JobState(progress.stage), progress.message
        step = JobProgress(state, progress.block, progress.blocks, percent, message, seconds_left)
        lease.advance(step, log_line)

    return report


class JobBlocks:
    """Saved blocks of one job, kept in the blob store until it ends."""

    def __init__(self, blobs: BlobStore, job_id: str) -> None:
        self._blobs = blobs
        self._job_id = job_id

    def get(self, key: str) -> bytes | None:
        """The block saved under `key`, or None."""
        return self._blobs.get_work(f"{self._job_id}/{key}")

    def put(self, key: str, data: bytes) -> None:
        """Save the block `data` under `key`."""
        self._blobs.put_work(f"{self._job_id}/{key}", data)
