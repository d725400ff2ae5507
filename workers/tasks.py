"""Celery tasks, and the hooks that run at a worker's start and shutdown."""

from contextlib import ExitStack
from functools import cache, partial
from typing import Any, Final

import structlog
from celery import signals
from kombu.exceptions import ChannelError
from opentelemetry.trace import SpanKind

from deltadock.tracing import span, trace_headers
from deltadock.workers.app import GPU_QUEUE, app
from deltadock.workers.compress import Outcome, WorkerContext, compress_job, get_context, take_job
from deltadock.workers.lease import STOPPING
from deltadock.workers.metrics import serving_metrics
from deltadock.workers.sweeper import (
    QUEUED_SECONDS,
    Periodic,
    collect,
    resend_lost,
    show_alive,
    sweep,
)
from deltadock.workers.webhooks import POLL_SECONDS, deliver_due

log = structlog.get_logger(__name__)


@app.task(name="deltadock.compress", bind=True)
def compress(task: Any, job_id: str) -> None:
    """Compress the delta of the waiting job whose turn it is.

    The queue has a task for each job that waits: `job_id` is the job that this one was sent for.
    """
    context = get_context()
    taken = take_job(context)
    if taken is None:
        return
    with span(
        "compress",
        SpanKind.CONSUMER,
        attributes={"deltadock.job": taken.job.id},
        carrier=task.request.headers if taken.job.id == job_id else None,
    ):
        outcome = compress_job(taken, context)
        if outcome is Outcome.STOPPED:
            # Another worker can start at once, without waiting for the sweeper.
            compress.apply_async((taken.job.id,), headers=trace_headers())
    # A killed worker's job took the turn of one that waits: that has no task any more.
    _resend_lost(context, queued_seconds=0.0)


def send_compress(job_id: str) -> None:
    """Enqueue the job's task."""
    compress.apply_async((job_id,))


def gpu_queue_is_empty(broker_url: str | None = None) -> bool:
    """Whether no task waits for a worker, by default on the app's broker."""
    with app.connection_for_read(broker_url) as connection:
        channel: Any = connection.default_channel
        try:
            declared = channel.queue_declare(GPU_QUEUE, passive=True)
        except ChannelError:  # the queue does not exist while it is empty
            return True
        return bool(declared.message_count == 0)


def _resend_lost(context: WorkerContext, queued_seconds: float) -> None:
    try:
        resend_lost(context, send_compress, gpu_queue_is_empty, queued_seconds)
    except Exception:  # the sweeper tries again
        log.exception("lost_not_sent")


@cache
def _periodic() -> tuple[Periodic, ...]:
    context = get_context()
    return (
        Periodic(
            "sweeper",
            partial(sweep, context, send_compress, gpu_queue_is_empty),
            context.settings.lease_seconds / 2,
        ),
        Periodic("collector", partial(collect, context), context.settings.collect_seconds),
        Periodic("webhooks", partial(deliver_due, context), POLL_SECONDS),
    )


_until_shutdown: Final = ExitStack()


@signals.worker_ready.connect
def _start_sweeping(**_: object) -> None:
    context = get_context()
    context.blobs.prepare()
    _until_shutdown.enter_context(serving_metrics(context.settings))
    # Not in the sweeper's thread: this signal returns before Celery takes the first task.
    _resend_lost(context, QUEUED_SECONDS)
    for thread in _periodic():
        thread.start()
    show_alive(context.settings)


@signals.worker_shutting_down.connect
def _request_stop(**_: object) -> None:
    STOPPING.set()


@signals.worker_shutdown.connect
def _stop_sweeping(**_: object) -> None:
    for thread in _periodic():
        thread.stop()
    _until_shutdown.close()
