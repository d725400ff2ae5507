"""Milliseconds of sampling a pass: all rows at once, against one row after the other.

    python -m benchmarks.sampler [--device cuda] [--vocabularies 32000 152064] [--rows 1 8 16]

Both sample the same random logits after a prompt of 512 tokens; `row by row` is what the node did
before it sampled in batches. Operators are those that launch something on a device.
"""

import argparse
from collections.abc import Callable, Sequence
from typing import Final

import torch
from torch import Tensor

from benchmarks.harness import describe_machine, wall_seconds
from benchmarks.operators import OperatorCounter
from deltadock.inference.engine.sampler import sample_tokens
from deltadock.inference.engine.sampling import SamplingParams, SamplingRow, make_draws
from deltadock.inference.model.added_tokens import Logits

PROMPT, REPEATS = 512, 15
SETTINGS: Final = {
    "greedy": SamplingParams(temperature=0),
    "temperature": SamplingParams(temperature=0.7, seed=0),
    "top_k, top_p, repetition": SamplingParams(
        temperature=0.7, top_k=20, top_p=0.8, repetition_penalty=1.05, seed=0
    ),
    "top_p": SamplingParams(temperature=0.6, top_p=0.9, seed=0),
    "greedy, 5 log-probabilities": SamplingParams(temperature=0, logprobs=5),
}


def row_by_row(logits: Tensor, rows: Sequence[SamplingRow], generator: torch.Generator) -> None:
    """Sample (rows, vocabulary) as the node did before."""
    finite, best = torch.isfinite(logits).all(-1).tolist(), logits.argmax(-1).tolist()
    for row, values in enumerate(logits):
        params, penalized = rows[row].params, values
        if params.repetition_penalty != 1:
            ids = torch.tensor(rows[row].tokens, device=logits.device)
            seen, penalty = values[ids], params.repetition_penalty
            changed = torch.where(seen > 0, seen / penalty, seen * penalty)
            penalized = values.scatter(0, ids, changed)
        token = best[row]
        if params.temperature:
            token = _drawn(penalized, params, generator)
        if params.logprobs is not None:
            logprobs = torch.log_softmax(values, -1)
            top, top_ids = torch.topk(logprobs, params.logprobs)
            float(logprobs[token]), top.tolist(), top_ids.tolist()
    assert all(finite)


def _drawn(values: Tensor, params: SamplingParams, generator: torch.Generator) -> int:
    scaled = values / params.temperature
    ids = None
    if params.top_k:
        scaled, ids = torch.topk(scaled, params.top_k)
    elif params.top_p < 1:
        scaled, ids = torch.sort(scaled, descending=True)
    probabilities = torch.softmax(scaled, -1)
    if params.top_p < 1:
        before = probabilities.cumsum(-1) - probabilities
        probabilities = probabilities[before < params.top_p]
        probabilities = probabilities / probabilities.sum()
    cumulative = probabilities.double().cumsum(-1)
    uniform = torch.rand((), generator=generator, dtype=torch.float64).to(values.device)
    place = torch.searchsorted(cumulative, uniform * cumulative[-1], right=True)
    place = place.clamp_max(cumulative.numel() - 1)
    return int(place if ids is None else ids[place])


def least_milliseconds(call: Callable[[], object], device: torch.device) -> float:
    """Of `REPEATS` calls, after one to warm up."""
    call()
    return 1e3 * min(wall_seconds(call, device) for _ in range(REPEATS))


def operators(call: Callable[[], object]) -> int:
    """Operators of a call that launch something on a device."""
    counter = OperatorCounter()
    with counter:
        call()
    return counter.total


def measure(params: SamplingParams, rows: int, vocabulary: int, device: torch.device) -> None:
    """Print one line of the table."""
    logits = 3 * torch.randn(rows, vocabulary, device=device)
    tokens = torch.randint(vocabulary, (PROMPT,)).tolist()
    batch = [
        SamplingRow(params, tokens, PROMPT, make_draws(params, row), params.token_counts(PROMPT))
        for row in range(rows)
    ]
    generator = torch.Generator().manual_seed(0)

    def together() -> None:
        sample_tokens(Logits(logits, [vocabulary] * rows), batch)

    def apart() -> None:
        row_by_row(logits, batch, generator)

    before, after = (least_milliseconds(call, device) for call in (apart, together))
    counts = f"{operators(apart):9,} {operators(together):6}"
    print(f"{rows:6} {counts} {before:11.2f} {after:8.2f} {before / after:6.1f}x")


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--vocabularies", type=int, nargs="+", default=[32_000, 152_064])
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 16])
    options = parser.parse_args(arguments)
    device = torch.device(options.device)
    print(describe_machine(options.device))
    for vocabulary in options.vocabularies:
        for name, params in SETTINGS.items():
            print(f"\n{name}, vocabulary {vocabulary:,}; operators and ms, before and now")
            for rows in options.rows:
                measure(params, rows, vocabulary, device)


if __name__ == "__main__":
    with torch.inference_mode():
        main()
