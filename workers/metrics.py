"""A worker's Prometheus metrics, in a registry and on a port of its own."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Final, Self
from wsgiref.simple_server import WSGIServer

import structlog
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, start_http_server
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from deltadock.settings import Settings
from deltadock.storage.cache import disk_bytes

log = structlog.get_logger(__name__)

SECONDS: Final = (1, 5, 15, 60, 300, 900, 3600, 4 * 3600)
"""Buckets: a stage of a tiny model takes a second, of a large one hours."""

registry: Final = CollectorRegistry()
JOBS: Final = Counter(
    "deltadock_worker_jobs", "Tasks of jobs, by how they ended.", ["outcome"], registry=registry
)
ERRORS: Final = Counter(
    "deltadock_worker_errors",
    "Errors that ended a job or made it start again, by their code.",
    ["code"],
    registry=registry,
)
STAGES: Final = Histogram(
    "deltadock_worker_stage_seconds",
    "Time that jobs spent in a stage.",
    ["stage"],
    buckets=SECONDS,
    registry=registry,
)
RUNNING: Final = Gauge("deltadock_worker_running_jobs", "Jobs now.", registry=registry)
COLLECTED: Final = Counter(
    "deltadock_worker_collected_bytes",
    "Bytes that this worker's collections removed from the blob store, by kind.",
    ["kind"],
    registry=registry,
)
WEBHOOKS: Final = Counter(
    "deltadock_worker_webhooks",
    "Attempts to send a message to a webhook, by outcome.",
    ["outcome"],
    registry=registry,
)


class StageClock:
    """Measures how long a job is in each stage, within the `with` block."""

    def __init__(self) -> None:
        self._stage: str | None = None
        self._since = 0.0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.enter(None)

    def enter(self, stage: str | None) -> None:
        """Note the stage that begins now, if it is another one."""
        if stage == self._stage:
            return
        now = time.monotonic()
        if self._stage is not None:
            STAGES.labels(self._stage).observe(now - self._since)
        self._stage, self._since = stage, now


class _DiskCollector(Collector):
    """The bytes of this worker's files, by kind."""

    def __init__(self, settings: Settings) -> None:
        self._folder = settings.cache_folder

    def describe(self) -> list[Metric]:
        """Nothing: registering reads no files."""
        return []

    def collect(self) -> Iterator[Metric]:
        """One gauge."""
        family = GaugeMetricFamily(
            "deltadock_worker_disk_bytes",
            "Bytes of this worker's files: cached bases (checkpoints), files of jobs.",
            labels=["kind"],
        )
        for kind in ("checkpoints", "attempts"):
            family.add_metric([kind], disk_bytes(self._folder / kind))
        yield family


@contextmanager
def serving_metrics(settings: Settings) -> Iterator[WSGIServer | None]:
    """Serve the metrics at the settings' port within the block, if they have one."""
    if settings.worker_metrics_port is None:
        yield None
        return
    collector = _DiskCollector(settings)
    registry.register(collector)
    try:
        server, thread = start_http_server(
            settings.worker_metrics_port, settings.worker_metrics_host, registry
        )
    except OSError as error:
        registry.unregister(collector)
        log.warning("metrics_not_served", port=settings.worker_metrics_port, error=str(error))
        yield None
        return
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
        registry.unregister(collector)
