"""Sends tasks to the workers by name, without importing their code."""

from typing import Any, Final

import structlog
from celery import Celery
from kombu.exceptions import OperationalError

from deltadock.errors import Unavailable
from deltadock.tracing import trace_headers

log = structlog.get_logger(__name__)

COMPRESS_TASK: Final = "deltadock.compress"
GPU_QUEUE: Final = "gpu"
TIMEOUT_SECONDS: Final = 3
RETRY: Final[dict[str, Any]] = {"max_retries": 1, "interval_start": 0, "interval_step": 0}
"""One immediate retry, for a stale pooled connection; the client's request waits for this."""


class TaskSender:
    """A Celery producer."""

    def __init__(self, broker_url: str) -> None:
        self._celery = Celery("deltadock", broker=broker_url, set_as_current=False)
        self._celery.conf.update(
            task_ignore_result=True,
            broker_connection_timeout=TIMEOUT_SECONDS,
            broker_transport_options={
                **RETRY,
                "socket_connect_timeout": TIMEOUT_SECONDS,
                "socket_timeout": TIMEOUT_SECONDS,
            },
        )

    def send_compress(self, job_id: str) -> None:
        """Send the job's task; call this only after the job's row is committed.

        Raises nothing if the broker does not answer: the job stays queued and the sweeper re-sends
        its task.
        """
        try:
            self._celery.send_task(
                COMPRESS_TASK,
                args=[job_id],
                queue=GPU_QUEUE,
                headers=trace_headers(),
                retry=True,
                retry_policy=RETRY,
            )
        except OperationalError as error:
            log.warning("task_not_sent", job=job_id, error=str(error))

    def ping(self) -> None:
        """Check that the broker answers.

        Raises:
            Unavailable: it does not.
        """
        try:
            with self._celery.connection_for_write() as connection:
                connection.ensure_connection(timeout=TIMEOUT_SECONDS, **RETRY)
        except OperationalError as error:
            raise Unavailable("The broker does not answer.") from error

    def close(self) -> None:
        """Close the connections to the broker."""
        self._celery.close()
