"""Sampling for all rows of a pass at once, against a loop over the rows.

    python -m benchmarks.sampler [--rows 1,8,16] [--vocabularies 32000,152064] [--device cpu]

Prints milliseconds and operator calls of one decode step's sampling, and the ratio to sampling the
same rows one after the other by the same code, as an engine would that loops over its sequences.
Only the time between the model's logits and the tokens on the host counts.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any, Final

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.harness import describe_machine
from deltadock.inference.engine.sampler import (
    SampleRequest,
    SamplingParams,
    make_generator,
    sample,
)
from deltadock.inference.model.added_tokens import Logits
from deltadock.kernels import choose_device

SETTINGS: Final = {
    "greedy": SamplingParams(temperature=0),
    "temperature": SamplingParams(seed=0),
    "top-p": SamplingParams(seed=0, temperature=0.7, top_p=0.9),
    "all": SamplingParams(
        seed=0, temperature=0.7, top_k=50, top_p=0.9, repetition_penalty=1.1,
        frequency_penalty=0.1, logprobs=5,
    ),
}  # fmt: skip
CONTEXT: Final = 512
"""Tokens of each sequence."""
REPEATS: Final = 9


class Operators(TorchDispatchMode):
    """Counts operator calls."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Count one call and run it."""
        self.calls += 1
        return func(*args, **kwargs or {})


def milliseconds(call: Callable[[], object]) -> float:
    """Median of some calls after one; their results are on the host, so that a device is done."""
    call()
    times = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        call()
        times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times)


def compare(params: SamplingParams, rows: int, vocabulary: int, device: torch.device) -> str:
    """One line: time and operators of both ways."""
    logits = Logits(torch.randn(rows, vocabulary, device=device))
    tokens = torch.randint(vocabulary, (rows, CONTEXT)).tolist()
    requests = [
        SampleRequest(row, params, make_generator(params, row), tokens[row], CONTEXT // 2)
        for row in range(rows)
    ]

    def together() -> None:
        sample(logits, requests)

    def one_by_one() -> None:
        for request in requests:
            sample(logits, [request])

    counts = []
    for call in (together, one_by_one):
        with Operators() as operators:
            call()
        counts.append(operators.calls)
    times = [milliseconds(call) for call in (together, one_by_one)]
    return (
        f"{times[0]:9.2f} {times[1]:10.2f} {times[1] / times[0]:5.1f}x"
        f" {counts[0]:10d} {counts[1]:10d}"
    )


def main() -> None:
    """Read the command line and print the table."""

    def numbers(text: str) -> list[int]:
        return [int(number) for number in text.split(",")]

    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rows", type=numbers, default=[1, 8, 16])
    parser.add_argument("--vocabularies", type=numbers, default=[32_000, 152_064])
    parser.add_argument("--device", default="auto")
    arguments = parser.parse_args()
    device = choose_device(arguments.device)
    print(describe_machine(str(device)))
    print("settings     vocabulary rows  batch ms    loop ms  ratio  batch ops   loop ops")
    with torch.inference_mode():
        for name, params in SETTINGS.items():
            for vocabulary in arguments.vocabularies:
                for rows in arguments.rows:
                    line = compare(params, rows, vocabulary, device)
                    print(f"{name:12} {vocabulary:10d} {rows:4d} {line}", flush=True)


if __name__ == "__main__":
    main()
