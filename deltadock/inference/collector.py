"""Gauges of a node that are read at each scrape: its queues and its deltas' tiers."""

from collections.abc import Iterator

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from deltadock.inference.base import ServedBase
from deltadock.inference.node import InferenceNode


class NodeCollector(Collector):
    """A node's queues and tiers at the time of the scrape. Only deltas in slots are labelled."""

    def __init__(self, node: InferenceNode) -> None:
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


def _queues(base: ServedBase, admitted: int) -> Iterator[Metric]:
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


def _tiers(base: ServedBase) -> Iterator[Metric]:
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
