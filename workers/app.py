"""The Celery app: `celery -A deltadock.workers.app worker -P solo -Q gpu,default`.

The job row, not the broker, is authoritative. Messages may be duplicated, late or lost: the row's
lease and the sweeper handle that.
"""

from typing import Final

from celery import Celery, signals

from deltadock.logs import configure_logging
from deltadock.settings import Settings, get_settings
from deltadock.tracing import configure_tracing

GPU_QUEUE: Final = "gpu"
DEFAULT_QUEUE: Final = "default"


def make_app(settings: Settings) -> Celery:
    """A Celery app on the settings' broker."""
    app = Celery("deltadock", broker=settings.broker_url, include=["deltadock.workers.tasks"])
    app.conf.update(
        accept_content=["json"],
        task_serializer="json",
        task_ignore_result=True,
        task_default_queue=DEFAULT_QUEUE,
        task_routes={"deltadock.compress": {"queue": GPU_QUEUE}},
        # Messages are acknowledged when their task ends, so that a killed worker's is redelivered.
        task_acks_late=True,
        task_reject_on_worker_lost=True,
        worker_prefetch_multiplier=1,
        # Jobs, sweeper and metrics share one process; several workers run several jobs at once.
        worker_pool="solo",
        broker_connection_retry_on_startup=True,
        worker_cancel_long_running_tasks_on_connection_loss=False,  # the lease decides
        broker_transport_options={
            # Longer than a lease: on redelivery the killed worker's lease has expired.
            "visibility_timeout": 2 * settings.lease_seconds,
            "unacked_restore_interval": 1,
            "unacked_restore_throttle": 1,
        },
    )
    return app


@signals.setup_logging.connect
def _configure_logging(**_: object) -> None:
    configure_logging(get_settings(), process="worker")
    configure_tracing(get_settings(), "worker")


app = make_app(get_settings())
