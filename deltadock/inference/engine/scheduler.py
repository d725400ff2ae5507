"""Schedules passes: continuous batching, chunked prefill, fairness between queues."""

from collections import Counter, deque
from typing import Final, NamedTuple

from deltadock.inference.engine.fairness import VirtualTokenCounters
from deltadock.inference.engine.prefix_cache import CacheSlots, common_prefix
from deltadock.inference.engine.sequence import Sequence
from deltadock.inference.model.kv_cache import KVCache

MIN_SHARED_TOKENS: Final = 32
"""A sequence waits for another's prefill only if they share at least this many tokens."""


class ScheduledChunk(NamedTuple):
    """Tokens `[begin, end)` of a sequence, to be computed in the next pass."""

    sequence: Sequence
    begin: int
    end: int

    @property
    def samples(self) -> bool:
        """Whether the chunk includes the sequence's last token, so that the next is sampled."""
        return self.end == len(self.sequence.tokens)

    @property
    def scored(self) -> int:
        """How many of the chunk's rows come before a prompt token whose score is asked for."""
        if not self.sequence.scores_prompt:
            return 0
        return max(min(self.end, self.sequence.prompt_length - 1) - self.begin, 0)


class Scheduler:
    """Fair between queues, each a tenant's use of a delta; first come first served within one.

    Every decoding sequence advances in every pass; prompts fill the rest of the budget of
    `pass_tokens`, so that a long prompt does not stall decoding. The queue with the lowest virtual
    token counter is admitted first and prefilled first. When the batch is full, a queue with less
    than its share preempts the one with most sequences: that one's last admitted sequence returns
    to its head with the tokens it generated, and is recomputed, where the prefix cache no longer
    holds it, when it is admitted again.
    """

    def __init__(self, cache: KVCache, pass_tokens: int, max_running: int) -> None:
        """Schedule up to `max_running` sequences."""
        self._pass_tokens = pass_tokens
        self._max_running = min(max_running, cache.slots)
        self._queues: dict[str, deque[Sequence]] = {}
        self.slots = CacheSlots(cache)
        self.counters = VirtualTokenCounters()
        self.running: list[Sequence] = []
        """In order of admission."""

    @property
    def waiting(self) -> list[Sequence]:
        """Sequences that are queued."""
        return [sequence for queue in self._queues.values() for sequence in queue]

    @property
    def busy(self) -> bool:
        """Whether there is anything to compute."""
        return bool(self.running or self._queues)

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence."""
        self.counters.add_sequence(sequence.queue_key)
        self._queues.setdefault(sequence.queue_key, deque()).append(sequence)

    def drop(self, sequence: Sequence, *, keep: bool) -> bool:
        """Remove a sequence and free its cache slot; False if it had already been removed.

        Its prefix stays in the cache for later sequences if `keep`.
        """
        if sequence in self.running:
            self._stop(sequence, keep=keep)
        elif sequence in self._queues.get(sequence.queue_key, ()):
            queue = self._queues[sequence.queue_key]
            queue.remove(sequence)
            if not queue:
                del self._queues[sequence.queue_key]
        else:
            return False
        self.counters.remove_sequence(sequence.queue_key)
        return True

    def computed(self, chunk: ScheduledChunk) -> None:
        """Record that a pass has computed a chunk, and charge its prompt tokens."""
        sequence = chunk.sequence
        sequence.computed = chunk.end
        uncharged = min(chunk.end, sequence.prompt_length) - sequence.charged
        if uncharged > 0:
            self.counters.charge_prompt(sequence.queue_key, uncharged)
            sequence.charged += uncharged

    def sampled(self, sequence: Sequence) -> None:
        """Record a token sampled from finite logits: all tokens before it may be shared."""
        self.slots.confirm(sequence.kv_slot, sequence.computed)
        self.counters.charge_output(sequence.queue_key)

    def delay(self, sequence: Sequence) -> None:
        """Sample a sequence's next token in a later pass, once its mask is there."""
        sequence.computed = len(sequence.tokens) - 1
        sequence.late = True

    def schedule(self) -> list[ScheduledChunk]:
        """The next pass's chunks, ordered by delta slot, so that a slot's rows are adjacent."""
        self._admit()
        chunks: list[ScheduledChunk] = []
        prompts: list[Sequence] = []
        for sequence in self.running:
            sequence.late = sequence.late and not sequence.has_mask
            if sequence.late:
                continue
            if len(sequence.tokens) - sequence.computed == 1:
                chunks.append(ScheduledChunk(sequence, sequence.computed, sequence.computed + 1))
            else:
                prompts.append(sequence)
        budget = max(self._pass_tokens - len(chunks), 1)
        for sequence in sorted(prompts, key=lambda prompt: self.counters.served(prompt.queue_key)):
            end = min(len(sequence.tokens), sequence.computed + budget)
            budget -= end - sequence.computed
            chunks.append(ScheduledChunk(sequence, sequence.computed, end))
            if budget == 0:
                break
        return sorted(chunks, key=lambda chunk: chunk.sequence.delta_slot)

    def _admit(self) -> None:
        while (queue_key := self._next()) is not None:
            queue = self._queues[queue_key]
            self._start(queue[0])  # if it raises, the sequence is still queued
            queue.popleft()
            if not queue:
                del self._queues[queue_key]

    def _next(self) -> str | None:
        """The least served queue with a sequence that can start now; may preempt another."""
        running = Counter(sequence.queue_key for sequence in self.running)
        richest = None
        if len(self.running) == self._max_running:
            richest = max(running, key=lambda key: (running[key], self.counters.level(key)))
            if running[richest] < 2:
                return None
        for queue_key in sorted(
            self._queues, key=lambda key: (self.counters.level(key), running[key])
        ):
            if richest is not None and (
                running[richest] - running[queue_key] < 2
                or self.counters.level(richest) < self.counters.level(queue_key)
            ):
                continue
            if not self._awaits_prefix(self._queues[queue_key][0]):
                if richest is not None:
                    self._preempt(richest)
                return queue_key
        return None

    def _start(self, sequence: Sequence) -> None:
        sequence.kv_slot, sequence.computed = self.slots.take(
            sequence.queue_key, sequence.tokens, reuse=not sequence.scores_prompt
        )
        cached = min(sequence.computed, sequence.prompt_length)
        sequence.charged = max(sequence.charged, cached)
        self.counters.reserve(sequence.queue_key, sequence.prompt_length - sequence.charged)
        self.running.append(sequence)
        if sequence.matcher is not None:
            sequence.matcher.start()

    def _stop(self, sequence: Sequence, *, keep: bool) -> None:
        self.running.remove(sequence)
        self.counters.reserve(sequence.queue_key, sequence.charged - sequence.prompt_length)
        self.slots.release(sequence.kv_slot, len(sequence.tokens), keep=keep)
        sequence.kv_slot, sequence.computed = -1, 0

    def _preempt(self, queue_key: str) -> None:
        """Return a queue's last admitted sequence to its head."""
        last = next(item for item in reversed(self.running) if item.queue_key == queue_key)
        self._stop(last, keep=True)
        self._queues.setdefault(queue_key, deque()).appendleft(last)

    def _awaits_prefix(self, sequence: Sequence) -> bool:
        """Whether a running prefill will soon provide a long enough prefix of this sequence."""
        others = [
            other
            for other in self.running
            if other.queue_key == sequence.queue_key and not other.generated
        ]
        if sequence.scores_prompt or not others:
            return False
        _, cached = self.slots.find(sequence.queue_key, sequence.tokens)
        for other in others:
            shared = common_prefix(other.tokens, sequence.tokens, len(sequence.tokens) - 1)
            gain = shared - cached
            if gain >= MIN_SHARED_TOKENS and 2 * gain >= len(other.tokens) - other.computed:
                return True
        return False
