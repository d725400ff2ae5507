"""The node's Prometheus metrics: counters and histograms, and collectors read at each scrape."""

from typing import Final

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.registry import Collector

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
