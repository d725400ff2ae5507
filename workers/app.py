"""The Celery app: `celery -A workers.app worker -P solo -Q gpu,default`.

The job row, not the broker, is the truth. A message only says "look at this job": it may come
twice, late or not at all, and the lease in the row and the sweeper make up for it.
"""

from typing import Final

from celery import Celery, signals

from deltadock.logs import configure_logging
from deltadock.settings import Settings, get_settings

GPU_QUEUE: Final = "gpu"
DEFAULT_QUEUE: Final = "default"


def make_app(settings: Settings) -> Celery:
    """A Celery app on the broker that the settings name."""
    app = Celery("deltadock", broker=settings.broker_url, include=["deltadock.workers.tasks"])
    app.conf.update(
        accept_content=["json"],
        task_serializer="json",
        task_ignore_result=True,
        task_default_queue=DEFAULT_QUEUE,
        task_routes={"deltadock.compress": {"queue": GPU_QUEUE}},
        # A message is held until its task has ended, so that a killed worker's comes again.
        task_acks_late=True,
        task_reject_on_worker_lost=True,
        worker_prefetch_multiplier=1,
        broker_connection_retry_on_startup=True,
        worker_cancel_long_running_tasks_on_connection_loss=False,  # the lease decides
        broker_transport_options={
            # When a killed worker's message comes again, its lease has run out.
            "visibility_timeout": 2 * settings.lease_seconds,
            "unacked_restore_interval": 1,
            "unacked_restore_throttle": 1,
        },
    )
    return app


@signals.setup_logging.connect
def _use_our_logs(**_: object) -> None:
    configure_logging(get_settings(), process="worker")


app = make_app(get_settings())
