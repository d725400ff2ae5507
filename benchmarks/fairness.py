"""What a tenant that floods does to another's time to first token, on the node's engine.

    python -m benchmarks.fairness [--requests 20]

On the CPU, with the model of `benchmarks.node`. Two deltas first have a request each at the same
moments, together about as much as the engine can carry; then the second sends ten at each of these
moments. Printed are the first delta's times to first token, and the ratio of their means, which is
to be at most 2. Last, what the flood does to the first delta's own requests where they wait in one
queue with it, as without fairness they would.
"""

import argparse
import statistics
import time
from collections.abc import Sequence

import torch

from benchmarks.machine import describe
from benchmarks.node import SHAPE, TINY, Contest
from benchmarks.serving import Request, prompt, run

PROMPT, TOKENS, FLOOD = 48, 16, 10


class Tenants:
    """Two deltas on one engine."""

    def __init__(self, shape: dict[str, int]) -> None:
        self._engine = Contest(shape).engine
        self._vocabulary = shape["vocab_size"]
        self._seed = 0

    def _request(self, slot: int, weights: str) -> Request:
        self._seed += 1
        return Request(prompt(PROMPT, self._seed, self._vocabulary), slot, weights, TOKENS)

    def seconds_each(self) -> float:
        """Seconds a request where eight at a time are answered."""
        for _ in range(2):  # the first unpacks
            seconds = run(self._engine, [self._request(1 + n % 2, f"{n % 2}") for n in range(8)])
        return seconds / 8

    def first_tokens(self, every: float, count: int, flood: int, sender: str) -> list[float]:
        """The first delta's seconds to first token, of a request every so many seconds; the
        second sends `flood` each time, which are counted under `sender`."""
        quiet: list[Request] = []
        others: list[Request] = []
        begin = time.monotonic()
        for number in range(count):
            time.sleep(max(0.0, begin + number * every - time.monotonic()))
            new = [self._request(2, sender) for _ in range(flood)]
            quiet.append(self._request(1, "quiet"))
            for request in (*new, quiet[-1]):
                request.send(self._engine)
            others += new
        for request in quiet:
            request.wait()
        for request in others:
            self._engine.cancel(request.sequence)
            request.done.wait()
        return [request.first - request.sent for request in quiet]

    def stop(self) -> None:
        """End the engine."""
        self._engine.stop()


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--requests", type=int, default=20)
    parser.add_argument("--tiny", action="store_true")
    options = parser.parse_args(arguments)
    print(f"{describe()}; prompts of {PROMPT} tokens, answers of {TOKENS}")
    tenants = Tenants(TINY if options.tiny else SHAPE)
    every = 2 * tenants.seconds_each()
    means = []
    for name, flood, sender in (
        ("both have a request at a time", 1, "other"),
        (f"the other has {FLOOD}", FLOOD, "other"),
        ("the same in one queue", FLOOD, "quiet"),
    ):
        found = sorted(tenants.first_tokens(every, options.requests, flood, sender))
        means.append(statistics.mean(found))
        print(
            f"{name}: mean {means[-1] * 1e3:.0f} ms, p90 {found[int(0.9 * len(found))] * 1e3:.0f}"
        )
    print(f"the flood raises the time to first token {means[1] / means[0]:.2f}x")
    print(f"in one queue it would {means[2] / means[0]:.2f}x")
    tenants.stop()


if __name__ == "__main__":
    with torch.inference_mode():
        main()
