"""The node on a CPU: eight deltas in one batch, beside the bare base and plain transformers.

    python -m benchmarks.node [--rounds 5]

A random Llama of 31 million parameters in float32 answers eight prompts with 64 tokens each, in
turns by (1) transformers' batched `generate`, (2) the node's engine on the base alone and (3) the
engine with each prompt on a delta of its own, of one bit a weight. Throughput is of generated
tokens, prefill included. Ratios are of figures of the same round; their median is printed. Then
all prompts on one delta, packed and merged; and the time to the first token of a prompt that the
prefix cache holds, against one that it does not.
`--tiny` proves the script on a small model.
"""

import argparse
import statistics
import time
from collections.abc import Sequence
from functools import partial
from itertools import count
from typing import Any

import torch

from benchmarks.machine import describe
from benchmarks.serving import (
    Request,
    copied,
    prompt,
    random_changes,
    random_model,
    run,
    shapes_of,
    taken_over,
)
from deltadock.inference.deltas.reading import merge_delta
from deltadock.inference.engine.engine import Engine
from deltadock.inference.model.routing import DeltaLimits

SHAPE = {
    "hidden_size": 512,
    "num_hidden_layers": 8,
    "intermediate_size": 1376,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "vocab_size": 8192,
    "max_position_embeddings": 2048,
}
TINY = SHAPE | {"hidden_size": 64, "num_hidden_layers": 2, "intermediate_size": 96}
REQUESTS, TOKENS, PROMPT, LONG_PROMPT = 8, 64, 16, 768


class Contest:
    """The same weights, as transformers runs them and as the node does."""

    def __init__(self, shape: dict[str, int]) -> None:
        self.plain = random_model("llama", "cpu", torch.float32, **shape)
        other = random_model("llama", "cpu", torch.float32, **shape)
        first = random_changes(shapes_of(other), "cpu")
        model = taken_over(other, DeltaLimits(slots=REQUESTS + 1, rows=1024, cache_bytes=4 << 30))
        for slot in range(1, REQUESTS + 1):
            model.install(slot, model.prepare(copied(first)))
        self.engine = Engine(
            model, max_sequences=REQUESTS, context_tokens=1024, pass_tokens=1024, cache_slots=16
        )
        self.engine.start()
        self.merge = partial(merge_delta, model)
        self._vocabulary = shape["vocab_size"]
        self._seeds = count()

    def prompts(self, length: int) -> list[list[int]]:
        """Prompts that nobody has seen."""
        return [prompt(length, next(self._seeds), self._vocabulary) for _ in range(REQUESTS)]

    def transformers(self) -> float:
        """Tokens a second of `generate` on all prompts as one batch."""
        tokens = torch.tensor(self.prompts(PROMPT))
        options: dict[str, Any] = {
            "attention_mask": torch.ones_like(tokens),
            "max_new_tokens": TOKENS,
            "min_new_tokens": TOKENS,
            "do_sample": False,
            "pad_token_id": 0,
        }
        began = time.monotonic()
        with torch.inference_mode():
            made = self.plain.generate(tokens, **options)
        assert made.shape == (REQUESTS, PROMPT + TOKENS)
        return REQUESTS * TOKENS / (time.monotonic() - began)

    def node(self, slots: Sequence[int]) -> float:
        """Tokens a second of the engine, a prompt on each of the slots."""
        requests = [
            Request(tokens, slot, f"slot {slot}", TOKENS)
            for tokens, slot in zip(self.prompts(PROMPT), slots, strict=True)
        ]
        return REQUESTS * TOKENS / run(self.engine, requests)

    def first_token(self, tokens: list[int]) -> float:
        """Seconds to the first token of a prompt on the first delta."""
        request = Request(tokens, 1, "slot 1", 1)
        run(self.engine, [request])
        return request.first - request.sent


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tiny", action="store_true")
    options = parser.parse_args(arguments)
    contest = Contest(TINY if options.tiny else SHAPE)
    parameters = sum(tensor.numel() for tensor in contest.plain.parameters())
    base, own = [0] * REQUESTS, range(1, REQUESTS + 1)
    print(
        f"{describe()}; {parameters / 1e6:.1f}M parameters, {REQUESTS} requests x {TOKENS} tokens"
    )
    for work in (contest.transformers, lambda: contest.node(base), lambda: contest.node(own)):
        work()  # what is done once: threads, buffers, unpacking
    rounds = [
        (contest.transformers(), contest.node(base), contest.node(own))
        for _ in range(options.rounds)
    ]
    for plain, bare, deltas in rounds:
        print(f"tokens/s: transformers {plain:6.0f}  base {bare:6.0f}  8 deltas {deltas:6.0f}")
    to_plain = statistics.median(bare / plain for plain, bare, _ in rounds)
    to_base = statistics.median(deltas / bare for _, bare, deltas in rounds)
    print(f"base over transformers' batched generate: {to_plain:.2f}x")
    print(f"8 deltas over the base alone: {to_base:.1%}")
    one = [1] * REQUESTS
    contest.node(one)
    packed = statistics.median(contest.node(one) for _ in range(options.rounds))
    contest.merge(1)
    contest.node(one)
    merged = statistics.median(contest.node(one) for _ in range(options.rounds))
    print(f"one delta for all: packed {packed:.0f}, merged {merged:.0f} tokens/s")
    print(f"merged over packed: {merged / packed:.2f}x")
    pairs = [
        (contest.first_token(tokens), contest.first_token(tokens))
        for tokens in contest.prompts(LONG_PROMPT)[: options.rounds]
    ]
    saved = statistics.median(first / again for first, again in pairs)
    print(f"first token of a {LONG_PROMPT}-token prompt, computed over cached: {saved:.1f}x")
    contest.engine.stop()


if __name__ == "__main__":
    main()
