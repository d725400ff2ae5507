"""Scheduling without a model: sequences and simulated passes."""

from collections import Counter
from typing import Any

import torch

from deltadock.inference.engine.sampling import SamplingParams, make_draws
from deltadock.inference.engine.scheduler import ScheduledChunk, Scheduler
from deltadock.inference.engine.sequence import Sequence
from deltadock.inference.model.kv_cache import KVCache
from deltadock.inference.prompts.tokenizer import TextStream, Tokenizer


def make_cache(slots: int, length: int = 64) -> KVCache:
    return KVCache(1, slots, 1, length, 2, dtype=torch.float32, device=torch.device("cpu"))


def make_sequence(
    tokenizer: Tokenizer,
    prompt: int | list[int],
    slot: int = 0,
    *,
    queue_key: str | None = None,
    **how: Any,
) -> Sequence:
    """A sequence with this prompt, or a unique one of this length."""
    tokens = prompt if isinstance(prompt, list) else [make_sequence.number + 300] * prompt
    make_sequence.number += 1
    sampling = SamplingParams(**how)
    return Sequence(
        tokens=list(tokens),
        sampling=sampling,
        delta_slot=slot,
        queue_key=queue_key if queue_key is not None else f"digest-{slot}",
        end_ids=frozenset(),
        stream=TextStream(tokenizer, [1], ()),
        emit=lambda _: None,
        draws=make_draws(sampling, 0),
    )


make_sequence.number = 0


def run_pass(
    scheduler: Scheduler, token: int = 2, scored: Counter[int] | None = None
) -> list[ScheduledChunk]:
    """Schedule a pass and simulate it: every chunk that samples gets `token`.

    `scored` counts the prompt tokens scored, by the `id` of their sequence.
    """
    work = scheduler.schedule()
    for item in work:
        samples = item.samples
        if scored is not None:
            scored[id(item.sequence)] += item.scored
        scheduler.computed(item)
        if samples:
            scheduler.sampled(item.sequence)
            item.sequence.tokens.append(token)
            if item.sequence.generated == item.sequence.sampling.max_tokens:
                assert scheduler.drop(item.sequence, keep=True)
    return work
