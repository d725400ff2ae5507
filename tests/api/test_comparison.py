"""Comparisons of large checkpoints hold up nothing else."""

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from deltadock.api import previews
from deltadock.api.comparison import compare
from deltadock.api.deltas import service
from deltadock.api.dependencies import COMPARISONS
from tests.api.support import Api
from tests.waiting import wait_until

MORE_THAN_THREADS = 45


class Slow:
    """Comparisons that take until they are let go."""

    def __init__(self) -> None:
        self.started = threading.Semaphore(0)
        self.go = threading.Event()
        self.running = 0

    def compare(self, *arguments: Any, **named: Any) -> Any:
        self.running += 1
        self.started.release()
        assert self.go.wait(30)
        self.running -= 1
        return compare(*arguments, **named)


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> Iterator[Slow]:
    slow = Slow()
    for module in (previews, service):
        monkeypatch.setattr(module, "compare", slow.compare)
    yield slow
    slow.go.set()


def test_previews_that_wait_take_no_threads_from_others(api: Api, slow: Slow) -> None:
    body = api.delta_body()
    body = {name: body[name] for name in ("base", "checkpoint", "method", "bits")}
    with ThreadPoolExecutor(MORE_THAN_THREADS) as threads:
        asked = [
            threads.submit(api.client.post, "/v1/previews", json=body)
            for _ in range(MORE_THAN_THREADS)
        ]
        wait_until(lambda: slow.running == COMPARISONS)
        for _ in range(3):
            assert api.client.get("/v1/deltas").status_code == 200
        assert slow.running == COMPARISONS
        slow.go.set()
        assert {each.result().status_code for each in asked} == {200}


def test_a_request_compares_before_its_transaction(api: Api, slow: Slow) -> None:
    body = api.delta_body()
    with ThreadPoolExecutor(1) as threads:
        asked = threads.submit(api.client.post, "/v1/deltas", json=body)
        assert slow.started.acquire(timeout=30)
        api.open_upload()  # SQLite has one writer at a time
        assert not asked.done()
        slow.go.set()
        assert asked.result().status_code == 202
