"""What the node's metrics find at each scrape: queues, and the deltas in each tier."""

from collections.abc import Iterator

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from deltadock.inference.base import ServedBase
from deltadock.inference.deltas.store import Tier
from deltadock.inference.node import Node


class NodeCollector(Collector):
    """A node as it is now. Only deltas in slots have a series of their own."""

    def __init__(self, node: Node) -> None:
        self._node = node

    def collect(self) -> Iterator[Metric]:
        """The families of this moment; none of the base's while there is no base."""
        base = self._node.base
        yield _gauge("draining", "Whether no new requests are taken.", self._node.draining)
        if base is not None:
            yield from _queues(base, self._node.admitted)
            yield from _tiers(base)
            yield from _residents(base)


def _gauge(name: str, text: str, value: float) -> GaugeMetricFamily:
    return GaugeMetricFamily(f"deltadock_node_{name}", text, value=value)


def _queues(base: ServedBase, admitted: int) -> Iterator[Metric]:
    running = base.engine.running
    yield _gauge("running_sequences", "Sequences in the batch.", running)
    yield _gauge("waiting_sequences", "Sequences that are admitted but not in the batch.",
                 max(admitted - running, 0))  # fmt: skip
    yield _gauge("batch_occupancy", "Part of the batch's places that are taken.",
                 running / base.max_sequences)  # fmt: skip
    yield CounterMetricFamily(
        "deltadock_node_prefix_tokens",
        "Prompt tokens whose keys and values were found in the cache.",
        value=base.engine.reused_tokens,
    )


def _tiers(base: ServedBase) -> Iterator[Metric]:
    tiers = base.deltas
    device = [held for held in tiers.held() if held.tier == "device"]
    files, kept = tiers.disk.held(), tiers.host.held()
    sizes: dict[Tier, tuple[int, int]] = {
        "disk": (len(files), sum(files.values())),
        "host": (len(kept), sum(kept.values())),
        "device": (len(device), sum(held.bytes for held in device)),
    }
    deltas = GaugeMetricFamily("deltadock_node_deltas", "Deltas in a tier.", labels=["tier"])
    held_bytes = GaugeMetricFamily(
        "deltadock_node_delta_bytes", "Bytes of the deltas in a tier.", labels=["tier"]
    )
    for tier, (count, size) in sizes.items():
        deltas.add_metric([tier], count)
        held_bytes.add_metric([tier], size)
    yield deltas
    yield held_bytes
    yield _gauge("merged_deltas", "Deltas with merged weights.", tiers.merged is not None)
    families = {
        name: CounterMetricFamily(f"deltadock_node_tier_{name}", text, labels=["tier"])
        for name, text in (
            ("hits", "Questions for a delta that the tier had."),
            ("misses", "Questions for a delta that it had to be brought."),
            ("evictions", "Deltas that left the tier for others."),
        )
    }
    counts = {"disk": tiers.disk.counts, "host": tiers.host.counts, "device": tiers.slots.counts}
    for tier_name, told in counts.items():
        for name, family in families.items():
            family.add_metric([tier_name], getattr(told, name))
    yield from families.values()


def _residents(base: ServedBase) -> Iterator[Metric]:
    family = GaugeMetricFamily(
        "deltadock_node_resident_references",
        "Requests that run on a delta in a slot.",
        labels=["artifact"],
    )
    for held in base.deltas.held():
        if held.tier == "device":
            family.add_metric([held.digest], held.references)
    yield family
