"""Sending tasks."""

import json
from pathlib import Path

import pytest
import redis

from deltadock.api.tasks import COMPRESS_TASK, TaskSender
from deltadock.cli import services
from deltadock.cli.processes import free_ports
from deltadock.errors import Unavailable


def waiting(url: str) -> list[str]:
    with redis.Redis.from_url(url, decode_responses=True) as connection:
        messages = connection.lrange("gpu", 0, -1)
    assert isinstance(messages, list)
    return [json.loads(message)["headers"]["task"] for message in messages]


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
        assert waiting(url) == [COMPRESS_TASK]
    with services.valkey(tmp_path / "second", port):
        sender.send_compress("job_b")
        assert waiting(url) == [COMPRESS_TASK]
    sender.close()
