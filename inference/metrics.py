"""The node's Prometheus metrics."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest


class Metrics:
    """One node's metrics, in a registry of their own."""

    def __init__(self) -> None:
        self._registry = registry = CollectorRegistry()
        self.requests = Counter(
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
            registry=registry,
        )
        self.load_seconds = Histogram(
            "deltadock_node_load_seconds",
            "Fetching, verifying and placing a delta.",
            registry=registry,
        )
        self.running = Gauge(
            "deltadock_node_running_sequences", "Sequences in the batch.", registry=registry
        )
        self.waiting = Gauge(
            "deltadock_node_waiting_sequences", "Admitted but not running.", registry=registry
        )
        self.deltas = Gauge(
            "deltadock_node_resident_deltas", "Deltas in device slots.", registry=registry
        )
        self.evictions = Gauge(
            "deltadock_node_evictions", "Deltas evicted since the base came.", registry=registry
        )

    def render(self) -> bytes:
        """The exposition format."""
        return generate_latest(self._registry)
