"""A worker's metrics: jobs, errors by code and stages, at a port of its own on loopback."""

from collections.abc import Callable

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from deltadock.settings import Settings
from deltadock.workers.compress import MAX_ATTEMPTS, Outcome, WorkerContext
from deltadock.workers.metrics import serving_metrics
from tests.workers.conftest import take_and_compress

Samples = dict[tuple[str, ...], float]


def scrape(settings: Settings) -> Samples:
    """Samples by name and label values, from the port."""
    with serving_metrics(settings.model_copy(update={"worker_metrics_port": 0})) as server:
        assert server is not None
        host, port = server.server_address[:2]
        assert host == "127.0.0.1"
        text = httpx.get(f"http://127.0.0.1:{port}/metrics").text
    return {
        (sample.name, *(value for _, value in sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


@pytest.mark.parametrize("settings", ["sqlite"], indirect=True)
def test_jobs_stages_errors_and_collections(
    context: WorkerContext, submit: Callable[..., str], set_job: Callable[..., None]
) -> None:
    before = scrape(context.settings)
    submit()
    second = submit()
    assert take_and_compress(context) is Outcome.READY
    set_job(second, attempt=MAX_ATTEMPTS)
    assert take_and_compress(context) is Outcome.FINISHED
    assert take_and_compress(context) is None
    after = scrape(context.settings)

    def change(*sample: str) -> float:
        return after.get(sample, 0.0) - before.get(sample, 0.0)

    assert change("deltadock_worker_jobs_total", "ready") == 1
    assert change("deltadock_worker_jobs_total", "finished") == 1
    assert change("deltadock_worker_errors_total", "worker_lost") == 1
    for stage in ("validating", "assembling", "verifying"):
        assert change("deltadock_worker_stage_seconds_count", stage) == 1, stage
        assert change("deltadock_worker_stage_seconds_sum", stage) > 0, stage
    assert after["deltadock_worker_running_jobs",] == 0
    assert after["deltadock_worker_disk_bytes", "attempts"] == 0
