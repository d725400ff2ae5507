"""Which tokens the next pass computes: continuous batching with chunked prefill."""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import torch

from inference.kv_cache import KVCache
from inference.sampler import SampledToken, SamplingParams
from inference.tokens import TextStream

FinishReason = Literal["stop", "length", "cancelled", "error"]


@dataclass(frozen=True, slots=True)
class Event:
    """What a sequence tells: text that is certain, the tokens since the last event, its end."""

    text: str = ""
    tokens: tuple[SampledToken, ...] = ()
    finish: FinishReason | None = None
    error: Exception | None = None


@dataclass(eq=False, slots=True)
class Sequence:
    """One prompt being continued on one delta slot."""

    tokens: list[int]
    """The prompt, then what was generated."""
    sampling: SamplingParams
    delta_slot: int
    eos_ids: frozenset[int]
    stream: TextStream
    emit: Callable[[Event], None]
    """Called from the engine's thread; the last event has `finish` set."""
    generator: torch.Generator | None = None
    prompt_length: int = field(init=False)
    computed: int = field(default=0, init=False)
    """Tokens whose keys and values are in the cache."""
    kv_slot: int = field(default=-1, init=False)
    unsent: list[SampledToken] = field(default_factory=list, init=False)

    def __post_init__(self) -> None:
        self.prompt_length = len(self.tokens)

    @property
    def generated(self) -> int:
        """How many tokens have been generated."""
        return len(self.tokens) - self.prompt_length


class Work(NamedTuple):
    """Compute the tokens `[begin, end)` of a sequence."""

    sequence: Sequence
    begin: int
    end: int

    @property
    def samples(self) -> bool:
        """Whether the pass reaches the sequence's last token, so that the next can be drawn."""
        return self.end == len(self.sequence.tokens)


class Scheduler:
    """First come, first served into the cache's slots.

    Every decoding sequence advances in every pass; prompts fill up what is left of the budget of
    `pass_tokens`, so that a long prompt does not hold the others up.
    """

    def __init__(self, cache: KVCache, pass_tokens: int) -> None:
        self._cache = cache
        self._pass_tokens = pass_tokens
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []

    @property
    def busy(self) -> bool:
        """Whether there is anything to compute."""
        return bool(self.running or self.waiting)

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence."""
        self.waiting.append(sequence)

    def drop(self, sequence: Sequence) -> bool:
        """Take a sequence out and free its cache slot; False if it was not here any more."""
        if sequence in self.running:
            self.running.remove(sequence)
            self._cache.release(sequence.kv_slot, min(len(sequence.tokens), self._cache.length))
            return True
        if sequence in self.waiting:
            self.waiting.remove(sequence)
            return True
        return False

    def plan(self) -> list[Work]:
        """The next pass, ordered by delta slot, so that each slot's rows lie together."""
        while self.waiting and self._cache.free_slots:
            sequence = self.waiting.popleft()
            sequence.kv_slot = self._cache.allocate()
            self.running.append(sequence)
        work: list[Work] = []
        prompts: list[Sequence] = []
        for sequence in self.running:
            if len(sequence.tokens) - sequence.computed == 1:
                work.append(Work(sequence, sequence.computed, sequence.computed + 1))
            else:
                prompts.append(sequence)
        budget = max(self._pass_tokens - len(work), 1)
        for sequence in prompts:
            end = min(len(sequence.tokens), sequence.computed + budget)
            budget -= end - sequence.computed
            work.append(Work(sequence, sequence.computed, end))
            if budget == 0:
                break
        return sorted(work, key=lambda item: item.sequence.delta_slot)
