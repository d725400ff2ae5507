"""The api's Prometheus metrics: counters, and gauges read at each scrape.

Several processes behind one port count together in the files of `PROMETHEUS_MULTIPROC_DIR`, a new
folder at each start; without it a process counts for itself.
"""

import os
from collections.abc import Iterator, Mapping
from typing import Final

import structlog
from fastapi import Request, Response
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.multiprocess import MultiProcessCollector
from prometheus_client.registry import Collector

from deltadock.api.dependencies import Resources
from deltadock.api.routing import api_router
from deltadock.errors import DeltadockError
from deltadock.storage.repositories import JobRepository, UploadRepository
from deltadock.storage.tables import JobPriority, JobState, UploadState
from deltadock.storage.tenancy import EVERY_TENANT

log = structlog.get_logger(__name__)
router = api_router(include_in_schema=False)

METHODS: Final = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
OTHER: Final = "other"
"""Label of methods and paths that no route has: a client cannot add series."""


class Metrics:
    """The metrics, in a registry of their own."""

    def __init__(self, resources: Resources) -> None:
        registry = CollectorRegistry()
        self._requests = Counter(
            "deltadock_api_requests",
            "Requests by the route's path, method and status.",
            ["route", "method", "status"],
            registry=registry,
        )
        self._refusals = Counter(
            "deltadock_api_refusals",
            "Requests answered with an error, by its code.",
            ["code"],
            registry=registry,
        )
        if folder := os.environ.get("PROMETHEUS_MULTIPROC_DIR"):
            registry = CollectorRegistry()
            MultiProcessCollector(registry, folder)  # type: ignore[no-untyped-call]
        registry.register(_ServiceCollector(resources))
        self._registry = registry

    def count(self, route: str | None, method: str, status: int, code: str | None) -> None:
        """Count a request; `code` is that of its error, if any."""
        label = method if method in METHODS else OTHER
        self._requests.labels(route or OTHER, label, str(status)).inc()
        if code is not None:
            self._refusals.labels(code).inc()

    def render(self) -> bytes:
        """The metrics in Prometheus' exposition format."""
        return generate_latest(self._registry)


class _ServiceCollector(Collector):
    """What database and blob store hold at the time of the scrape, of all tenants."""

    def __init__(self, resources: Resources) -> None:
        self._resources = resources

    def describe(self) -> list[Metric]:
        """Nothing: registering must not read the database."""
        return []

    def collect(self) -> Iterator[Metric]:
        """The metric families; none while database or blob store do not answer."""
        try:
            with self._resources.database.read_scope() as session:
                jobs = JobRepository(session, EVERY_TENANT)
                states, queued = jobs.count_by_state(), jobs.count_queued()
                uploads = UploadRepository(session, EVERY_TENANT).count_unfinished()
            usage = self._resources.storage.usage()
        except DeltadockError as error:
            log.warning("metrics_incomplete", code=error.code, error=error.message)
            return
        yield _gauges(
            "jobs", "Jobs by state.", "state", {state: states.get(state, 0) for state in JobState}
        )
        yield _gauges(
            "queue_depth",
            "Jobs that wait for a worker, by priority.",
            "priority",
            {priority: queued.get(priority, 0) for priority in JobPriority},
        )
        yield _gauges(
            "uploads",
            "Unfinished uploads by state.",
            "state",
            {state: uploads.get(state, 0) for state in (UploadState.OPEN, UploadState.COMPLETING)},
        )
        yield _gauges(
            "storage_bytes",
            "Bytes in the blob store by kind.",
            "kind",
            {kind: one.bytes for kind, one in usage.items()},
        )
        yield _gauges(
            "storage_files",
            "Files in the blob store by kind.",
            "kind",
            {kind: one.files for kind, one in usage.items()},
        )


def _gauges(name: str, text: str, label: str, values: Mapping[str, int]) -> GaugeMetricFamily:
    family = GaugeMetricFamily(f"deltadock_{name}", text, labels=[label])
    for value, number in values.items():
        family.add_metric([value], number)
    return family


@router.get("/metrics")
def get_metrics(request: Request) -> Response:
    """Metrics in Prometheus' format, of all tenants; for keys of the operator's tenant."""
    metrics: Metrics = request.app.state.metrics
    return Response(metrics.render(), media_type=CONTENT_TYPE_LATEST)
