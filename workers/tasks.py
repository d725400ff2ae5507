"""Celery tasks, and the hooks that run at a worker's start and shutdown."""

from functools import cache

import redis
from celery import signals

from deltadock.settings import get_settings
from deltadock.workers.app import GPU_QUEUE, app
from deltadock.workers.compress import Outcome, compress_job, get_context
from deltadock.workers.lease import STOPPING
from deltadock.workers.sweeper import Sweeper, show_alive


@app.task(name="deltadock.compress")
def compress(job_id: str) -> None:
    """Compress the delta of this job, unless another worker does or it has ended."""
    if compress_job(job_id, get_context()) is Outcome.STOPPED:
        # Another worker can start at once, without waiting for the sweeper.
        send_compress(job_id)


def send_compress(job_id: str) -> None:
    """Enqueue the job's task."""
    compress.apply_async((job_id,))


def gpu_queue_is_empty() -> bool:
    """Whether no message is waiting for a worker."""
    with redis.Redis.from_url(get_settings().broker_url) as connection:
        return bool(connection.llen(GPU_QUEUE) == 0)


@cache
def _sweeper() -> Sweeper:
    interval = get_settings().lease_seconds / 2
    return Sweeper(get_context(), send_compress, gpu_queue_is_empty, interval)


@signals.worker_ready.connect
def _start_sweeping(**_: object) -> None:
    context = get_context()
    context.blobs.prepare()
    _sweeper().start()
    # Not in the sweeper's thread: this signal returns before Celery takes the first task.
    show_alive(context.settings)


@signals.worker_shutting_down.connect
def _request_stop(**_: object) -> None:
    STOPPING.set()


@signals.worker_shutdown.connect
def _stop_sweeping(**_: object) -> None:
    _sweeper().stop()
