"""Sending tasks."""

from contextlib import suppress
from pathlib import Path

import pytest
from celery import Celery

from deltadock.api.tasks import COMPRESS_TASK, TaskSender
from deltadock.cli import services
from deltadock.cli.processes import free_ports
from deltadock.errors import Unavailable
from deltadock.workers.tasks import gpu_queue_is_empty


def taken(url: str) -> list[str]:
    """The jobs of the waiting tasks, in the order in which a worker takes them."""
    jobs = []
    with Celery(broker=url, set_as_current=False) as celery, celery.connection() as connection:
        queue = connection.SimpleQueue("gpu")
        with suppress(queue.Empty):
            while message := queue.get(timeout=0.5):
                assert message.headers["task"] == COMPRESS_TASK
                jobs += message.payload[0]
                message.ack()
        queue.close()
    return jobs


def test_a_queue_is_empty_once_its_tasks_are_taken(broker_url: str) -> None:
    sender = TaskSender(broker_url)
    for job in ("job_a", "job_b"):
        sender.send_compress(job)
    assert not gpu_queue_is_empty(broker_url)
    assert taken(broker_url) == ["job_a", "job_b"]
    assert gpu_queue_is_empty(broker_url)
    sender.close()


def test_tasks_are_sent_when_the_broker_is_up_and_dropped_when_it_is_down(tmp_path: Path) -> None:
    port = free_ports(1)[0]
    url = f"redis://127.0.0.1:{port}/0"
    sender = TaskSender(url)
    sender.send_compress("job_lost")
    with pytest.raises(Unavailable):
        sender.ping()
    with services.valkey(tmp_path / "first", port):
        sender.ping()
        sender.send_compress("job_a")
        assert taken(url) == ["job_a"]
    with services.valkey(tmp_path / "second", port):
        sender.send_compress("job_b")
        assert taken(url) == ["job_b"]
    sender.close()
