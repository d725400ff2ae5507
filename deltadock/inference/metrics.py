"""The node's Prometheus metrics: what is counted where it happens."""

from typing import Final

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.registry import Collector

TOKEN_SECONDS: Final = (
    0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0,
)  # fmt: skip


class Metrics:
    """One node's metrics, in a registry of their own."""

    def __init__(self) -> None:
        self._registry = registry = CollectorRegistry()
        self.requests = Counter(
            "deltadock_node_requests",
            "Requests that were begun, or what they were refused with.",
            ["outcome"],
            registry=registry,
        )
        self.sequences = Counter(
            "deltadock_node_sequences", "Sequences that ended.", ["finish"], registry=registry
        )
        self.prompt_tokens = Counter(
            "deltadock_node_prompt_tokens", "Prompt tokens taken in.", registry=registry
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
            "Bringing a delta into a tier: host is fetching, hashing and reading it, device is "
            "the swap into a slot.",
            ["tier"],
            buckets=TOKEN_SECONDS,
            registry=registry,
        )

    def watch(self, collector: Collector) -> None:
        """Show, too, what the collector finds at each scrape."""
        self._registry.register(collector)

    def render(self) -> bytes:
        """The exposition format."""
        return generate_latest(self._registry)
