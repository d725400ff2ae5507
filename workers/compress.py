"""One compression job, from its row to its artifact.

    acquire the lease -> bring base and fine-tune to disk -> compress -> store -> ready

Blocks are saved as they are finished, so that whoever takes the job over goes on where its
predecessor was; the artifact's bytes are the same as without the interruption.
"""

import os
import platform
import shutil
import time
import uuid
from collections.abc import Callable
from enum import Enum, auto
from pathlib import Path, PurePosixPath
from typing import Any, Final

import structlog

from deltadock.compression.options import CalibrationOptions, CompressOptions, Source
from deltadock.compression.pipeline import compress
from deltadock.compression.report import Progress
from deltadock.errors import Cancelled, DeltadockError, HashMismatch, WorkerLost
from deltadock.kernels import choose_device
from deltadock.settings import Settings
from deltadock.storage.blobs import BlobStore
from deltadock.storage.cache import FileCache
from deltadock.storage.models import DeltaRow, JobRow, JobState
from deltadock.storage.repositories import JobRepository, UploadRepository
from deltadock.workers.context import Context
from deltadock.workers.lease import Lease, LeaseLostError, WorkerStoppingError

MAX_ATTEMPTS: Final = 5
"""Workers that may be lost, or fail for a passing reason, before the job fails."""

REPORT_SECONDS: Final = 0.25
"""Progress within one block is written to the row at most this often."""

log = structlog.get_logger(__name__)


class Outcome(Enum):
    """How a task ended; the row says the rest."""

    SKIPPED = auto()
    FINISHED = auto()
    STOPPED = auto()
    LATER = auto()


def compress_job(job_id: str, context: Context) -> Outcome:
    """Do the job if nobody else does; every failure ends in the row."""
    owner = f"{platform.node()}-{os.getpid()}-{uuid.uuid4().hex[:12]}"
    seconds = context.settings.lease_seconds
    with context.database.session_scope() as session:
        job = JobRepository(session).acquire(job_id, owner, seconds)
    with structlog.contextvars.bound_contextvars(job=job_id):
        if job is None:
            log.info("job_skipped")
            return Outcome.SKIPPED
        log.info("job_acquired", attempt=job.attempt)
        with Lease(context.database, job_id, owner, seconds) as lease:
            outcome = _settle(job, lease, context)
        log.info("job_left", outcome=outcome.name.lower())
        if outcome is Outcome.FINISHED:
            drop_files(job_id, context)
    return outcome


def drop_files(job_id: str, context: Context) -> None:
    """Remove what an ended job leaves; the sweeper tries again where a store was away."""
    try:
        context.blobs.drop_work(job_id)
    except DeltadockError as error:
        log.warning("job_files_not_dropped", error=error.message)
        return
    shutil.rmtree(job_folder(context.settings, job_id), ignore_errors=True)


def _settle(job: JobRow, lease: Lease, context: Context) -> Outcome:
    """Run the job and record how it ended."""
    try:
        if job.cancel_requested or job.delta.deleted_at is not None:
            lease.finish(JobState.CANCELLED, Cancelled("Cancelled on request."))
            return Outcome.FINISHED
        if job.attempt > MAX_ATTEMPTS:
            raise WorkerLost(
                f"{MAX_ATTEMPTS} workers began this job and none could finish it. The worker's "
                "log may say why; a larger machine may help."
            )
        _run(job, lease, context)
    except LeaseLostError:
        log.warning("lease_lost")
        return Outcome.SKIPPED
    except WorkerStoppingError:
        lease.release()
        return Outcome.STOPPED
    except Cancelled as error:
        return _end(lease, JobState.CANCELLED, error)
    except DeltadockError as error:
        if error.retryable and job.attempt < MAX_ATTEMPTS:
            log.warning("job_retries", code=error.code, error=error.message)
            lease.expire()
            return Outcome.LATER
        log.warning("job_failed", code=error.code, error=error.message)
        return _end(lease, JobState.FAILED, error)
    except Exception:
        log.exception("job_failed")
        hidden = DeltadockError("The compression failed unexpectedly; the worker's log says why.")
        return _end(lease, JobState.FAILED, hidden)
    return Outcome.FINISHED


def _end(lease: Lease, state: JobState, error: DeltadockError) -> Outcome:
    try:
        lease.finish(state, error)
    except LeaseLostError:
        return Outcome.SKIPPED
    return Outcome.FINISHED


def _run(job: JobRow, lease: Lease, context: Context) -> None:
    """Make and store the artifact.

    Raises:
        DeltadockError: what is wrong with the input, or that a part does not answer.
        LeaseLostError, WorkerStoppingError: the job is not ours to finish.
    """
    delta, settings, blobs = job.delta, context.settings, context.blobs
    folder = job_folder(settings, job.id)
    progress = _reporter(lease)
    progress(Progress("validating", 0, 0, 0.0, "Fetching the checkpoints"))
    base, base_manifest = FileCache(blobs, settings.cache_folder).checkpoint(
        delta.base.checkpoint_digest
    )
    # Needed once: it goes with the job, while a base is kept for the next one.
    finetuned, _ = FileCache(blobs, folder).checkpoint(delta.checkpoint_digest)
    # A predecessor that has lost the lease but not noticed yet may still write its own.
    artifact = folder / f"{lease.owner}.safetensors"
    report = compress(
        base,
        finetuned,
        artifact,
        _options(delta),
        calibration=_calibration(delta, context, folder),
        progress=progress,
        store=JobWork(blobs, job.id),
        device=str(choose_device(settings.device)),
    ).to_dict()
    if report["base_digest"] != base_manifest.weights_digest:
        raise HashMismatch("The base's files on this worker are not those that were uploaded.")
    lease.complete(blobs.put_file(artifact), artifact.stat().st_size, report)


def job_folder(settings: Settings, job_id: str) -> Path:
    """Where a worker keeps the files of one job."""
    return settings.cache_folder / "jobs" / job_id


def _options(delta: DeltaRow) -> CompressOptions:
    options = delta.options
    goals: dict[str, Any] = {"bits": None}
    if goal := options["goal"]:
        whole = goal["kind"] == "target_bytes"
        goals[goal["kind"]] = int(goal["value"]) if whole else goal["value"]
    wish = options["calibration"]
    calibration = CalibrationOptions(wish["tokens"], wish["length"]) if wish else None
    return CompressOptions(
        method=delta.method,
        seed=options["seed"],
        solver=options["solver"],
        calibration=calibration or CalibrationOptions(),
        **goals,
    )


def _calibration(delta: DeltaRow, context: Context, folder: Path) -> list[Source]:
    """The sources, their texts fetched into the job's folder."""
    wish = delta.options["calibration"]
    return [
        Source(
            None if source["digest"] is None else _text(source["digest"], context, folder),
            source["weight"],
        )
        for source in (wish["sources"] if wish else ())
    ]


def _text(digest: str, context: Context, folder: Path) -> Path:
    with context.database.read_scope() as session:
        uploaded = UploadRepository(session).calibration_path(digest)
    # Its suffix says how the text is to be read.
    path = folder / f"{digest}{PurePosixPath(uploaded or '').suffix or '.txt'}"
    context.blobs.fetch(digest, path)
    return path


def _reporter(lease: Lease) -> Callable[[Progress], None]:
    """Writes progress to the row: every new block at once, steps within one now and then.

    Whether to stop is looked up at each of them: the next one may be far away.
    """
    last_key: tuple[str, int] = ("", 0)
    last_time = 0.0

    def report(progress: Progress) -> None:
        nonlocal last_key, last_time
        key, now = (progress.stage, progress.block), time.monotonic()
        if key == last_key and now - last_time < REPORT_SECONDS:
            lease.check()
            return
        last_key, last_time = key, now
        lease.advance(
            JobState(progress.stage),
            block=progress.block,
            blocks=progress.blocks,
            percent=100 * progress.fraction,
            message=progress.message,
        )

    return report


class JobWork:
    """The saved blocks of one job, kept in the blob store until it has ended."""

    def __init__(self, blobs: BlobStore, job_id: str) -> None:
        self._blobs = blobs
        self._job_id = job_id

    def get(self, key: str) -> bytes | None:
        """What was saved under `key`, or None."""
        return self._blobs.get_work(f"{self._job_id}/{key}")

    def put(self, key: str, data: bytes) -> None:
        """Save `data` under `key`."""
        self._blobs.put_work(f"{self._job_id}/{key}", data)
