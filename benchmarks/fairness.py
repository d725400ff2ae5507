"""What one tenant's flood does to another's time to first token, on the node's engine.

    python -m benchmarks.fairness [--requests 20]

On the CPU, with the model of `benchmarks.node`. First two deltas each send one request at the same
moments, at about the engine's capacity; then the second sends ten at each of these moments. Printed
are the first delta's times to first token and the ratio of their means, which should be at most 2;
last, what the flood does to the first delta's requests where they share a queue with it, as they
would without fairness.
"""

import argparse
import statistics
import time
from collections.abc import Sequence

import torch

from benchmarks.harness import describe_machine
from benchmarks.node import LLAMA_31M, TINY_LLAMA, DeltaEngine, TimedRequest, llama_engine

PROMPT, TOKENS, FLOOD = 48, 16, 10


def request_seconds(bench: DeltaEngine) -> float:
    """Seconds per request when eight run at a time."""
    for _ in range(2):  # the first unpacks the deltas
        requests = [bench.request(1 + n % 2, PROMPT, TOKENS) for n in range(8)]
        seconds = bench.run(requests)
    return seconds / len(requests)


def first_tokens(
    bench: DeltaEngine, interval: float, requests: int, flood: int, sender: str
) -> list[float]:
    """The first delta's seconds to first token, one request every `interval` seconds.

    At each of these moments the second delta sends `flood` requests under the key `sender`.
    """
    quiet: list[TimedRequest] = []
    others: list[TimedRequest] = []
    start = time.monotonic()
    for number in range(requests):
        time.sleep(max(0.0, start + number * interval - time.monotonic()))
        batch = [bench.request(2, PROMPT, TOKENS, sender) for _ in range(flood)]
        quiet.append(bench.request(1, PROMPT, TOKENS, "quiet"))
        for request in (*batch, quiet[-1]):
            request.send(bench.engine)
        others += batch
    for request in quiet:
        request.wait()
    for request in others:
        bench.engine.cancel(request.sequence)
        request.done.wait()
    return [request.first - request.sent for request in quiet]


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--requests", type=int, default=20)
    parser.add_argument("--tiny", action="store_true", help="a smoke run on a small model")
    options = parser.parse_args(arguments)
    print(f"{describe_machine()}; prompts of {PROMPT} tokens, answers of {TOKENS}")
    bench = llama_engine(TINY_LLAMA if options.tiny else LLAMA_31M, 2)
    interval = 2 * request_seconds(bench)
    means = []
    for name, flood, sender in (
        ("one request each at a time", 1, "other"),
        (f"the other sends {FLOOD}", FLOOD, "other"),
        ("the same in one queue", FLOOD, "quiet"),
    ):
        waits = sorted(first_tokens(bench, interval, options.requests, flood, sender))
        means.append(statistics.mean(waits))
        p90 = waits[int(0.9 * len(waits))]
        print(f"{name}: mean {means[-1] * 1e3:.0f} ms, p90 {p90 * 1e3:.0f} ms")
    print(f"time to first token under the flood: {means[1] / means[0]:.2f}x")
    print(f"in one queue: {means[2] / means[0]:.2f}x")
    bench.stop()


if __name__ == "__main__":
    with torch.inference_mode():
        main()
