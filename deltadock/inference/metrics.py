"""The node's Prometheus metrics: counters and histograms, and gauges read at each scrape."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Final

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

if TYPE_CHECKING:
    from deltadock.inference.base import ServedBase
    from deltadock.inference.node import InferenceNode

TOKEN_SECONDS: Final = (
    0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0,
)  # fmt: skip


class Metrics:
    """One node's metrics, in their own registry."""

    def __init__(self) -> None:
        self._registry = registry = CollectorRegistry()
        self.requests = Counter(
            "deltadock_node_requests",
            "Requests accepted (ok), or the error code they were rejected with.",
            ["outcome"],
            registry=registry,
        )
        self.sequences = Counter(
            "deltadock_node_sequences", "Sequences that ended.", ["finish"], registry=registry
        )
        self.prompt_tokens = Counter(
            "deltadock_node_prompt_tokens", "Prompt tokens accepted.", registry=registry
        )
        self.generated_tokens = Counter(
            "deltadock_node_generated_tokens", "Tokens generated.", registry=registry
        )
        self.first_token_seconds = Histogram(
            "deltadock_node_first_token_seconds",
            "From a request's arrival to its first token.",
            buckets=TOKEN_SECONDS,
            registry=registry,
        )
        self.inter_token_seconds = Histogram(
            "deltadock_node_inter_token_seconds",
            "Between two tokens of an answer.",
            buckets=TOKEN_SECONDS,
            registry=registry,
        )
        self.load_seconds = Histogram(
            "deltadock_node_load_seconds",
            "Loading a delta into a tier: host is fetching, hashing and reading it, device is "
            "installing it in a slot.",
            ["tier"],
            buckets=TOKEN_SECONDS,
            registry=registry,
        )

    def register(self, collector: Collector) -> None:
        """Add a collector that is read at each scrape."""
        self._registry.register(collector)

    def value(self, name: str) -> float:
        """A counter's value, or a histogram's sum or count, by its name after the prefix."""
        return self._registry.get_sample_value(f"deltadock_node_{name}") or 0.0

    def render(self) -> bytes:
        """The metrics in Prometheus' exposition format."""
        return generate_latest(self._registry)


class NodeCollector(Collector):
    """A node's queues and tiers at the time of the scrape. Only deltas in slots are labelled."""

    def __init__(self, node: "InferenceNode") -> None:
        self._node = node

    def collect(self) -> Iterator[Metric]:
        """The metric families; those of the base only while there is one."""
        base = self._node.base
        yield _gauge("draining", "Whether new requests are rejected.", self._node.draining)
        if base is not None:
            yield from _queues(base, self._node.admitted)
            yield from _tiers(base)


def _gauge(name: str, text: str, value: float) -> GaugeMetricFamily:
    return GaugeMetricFamily(f"deltadock_node_{name}", text, value=value)


def _queues(base: "ServedBase", admitted: int) -> Iterator[Metric]:
    running = base.engine.running
    yield _gauge("running_sequences", "Sequences in the batch.", running)
    yield _gauge(
        "waiting_sequences",
        "Sequences admitted but not in the batch.",
        max(admitted - running, 0),
    )
    yield _gauge(
        "batch_occupancy", "Fraction of the batch that is occupied.", running / base.max_sequences
    )
    yield CounterMetricFamily(
        "deltadock_node_prefix_tokens",
        "Prompt tokens found in the prefix cache.",
        value=base.engine.reused_tokens,
    )


def _tiers(base: "ServedBase") -> Iterator[Metric]:
    store = base.deltas
    device = [delta for delta in store.held() if delta.tier == "device"]
    sizes = {
        "disk": store.disk.held().values(),
        "host": store.host.held().values(),
        "device": [delta.bytes for delta in device],
    }
    counts = {"disk": store.disk.counts, "host": store.host.counts, "device": store.slots.counts}
    yield _gauge("merged_deltas", "Deltas with merged weights.", store.merged is not None)
    deltas = GaugeMetricFamily("deltadock_node_deltas", "Deltas in a tier.", labels=["tier"])
    delta_bytes = GaugeMetricFamily(
        "deltadock_node_delta_bytes", "Bytes of the deltas in a tier.", labels=["tier"]
    )
    lookups = {
        name: CounterMetricFamily(f"deltadock_node_tier_{name}", text, labels=["tier"])
        for name, text in (
            ("hits", "Lookups of a delta that the tier had."),
            ("misses", "Lookups of a delta that had to be loaded."),
            ("evictions", "Deltas evicted from the tier."),
        )
    }
    for tier, held in sizes.items():
        deltas.add_metric([tier], len(held))
        delta_bytes.add_metric([tier], sum(held))
        for name, family in lookups.items():
            family.add_metric([tier], getattr(counts[tier], name))
    references = GaugeMetricFamily(
        "deltadock_node_resident_references",
        "Requests that use a delta in a slot.",
        labels=["artifact"],
    )
    for delta in device:
        references.add_metric([delta.digest], delta.references)
    yield from (deltas, delta_bytes, *lookups.values(), references)
