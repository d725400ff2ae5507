"""What the next pass computes: continuous batching, chunked prefill, fair between deltas."""

from collections import Counter, deque
from typing import Final, NamedTuple

from deltadock.inference.engine.fairness import VirtualTokenCounters
from deltadock.inference.engine.prefix_cache import CacheSlots, common_prefix
from deltadock.inference.engine.sequence import Sequence
from deltadock.inference.model.kv_cache import KVCache

WORTH_WAITING: Final = 32
"""A sequence waits for another's prompt only if that spares it at least so many tokens."""


class ScheduledChunk(NamedTuple):
    """Compute the tokens `[begin, end)` of a sequence."""

    sequence: Sequence
    begin: int
    end: int

    @property
    def samples(self) -> bool:
        """Whether the pass reaches the sequence's last token, so that the next can be drawn."""
        return self.end == len(self.sequence.tokens)


class Scheduler:
    """Fair between deltas, first come first served within one.

    Every decoding sequence advances in every pass; prompts fill up what is left of the budget of
    `pass_tokens`, so that a long prompt does not hold the others up. The delta with the lowest
    virtual token counter is admitted first and has its prompts computed first. If all places are
    taken, a delta with fewer than its share of them gets one from the delta with most: the
    sequence that was admitted there last goes back to the head of its queue with what it has
    generated, and is computed again, as far as the cache does not hold it, when its turn comes.
    """

    def __init__(self, cache: KVCache, pass_tokens: int, max_running: int) -> None:
        self._pass_tokens = pass_tokens
        self._max_running = min(max_running, cache.slots)
        self._queues: dict[str, deque[Sequence]] = {}
        self.slots = CacheSlots(cache)
        self.counters = VirtualTokenCounters()
        self.running: list[Sequence] = []
        """In the order in which they were admitted."""

    @property
    def waiting(self) -> list[Sequence]:
        """The sequences that do not run."""
        return [sequence for queue in self._queues.values() for sequence in queue]

    @property
    def busy(self) -> bool:
        """Whether there is anything to compute."""
        return bool(self.running or self._queues)

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence."""
        self.counters.arrive(sequence.model_key)
        self._queues.setdefault(sequence.model_key, deque()).append(sequence)

    def drop(self, sequence: Sequence, *, keep: bool) -> bool:
        """Take a sequence out and free its cache slot; False if it was not here any more.

        What it leaves in the slot serves later ones if `keep`.
        """
        if sequence in self.running:
            self._stop(sequence, keep=keep)
        elif sequence in self._queues.get(sequence.model_key, ()):
            queue = self._queues[sequence.model_key]
            queue.remove(sequence)
            if not queue:
                del self._queues[sequence.model_key]
        else:
            return False
        self.counters.leave(sequence.model_key)
        return True

    def computed(self, work: ScheduledChunk) -> None:
        """A pass has computed these tokens."""
        sequence = work.sequence
        sequence.computed = work.end
        fresh = min(work.end, sequence.prompt_length) - sequence.charged
        if fresh > 0:
            self.counters.prompt(sequence.model_key, fresh)
            sequence.charged += fresh

    def drawn(self, sequence: Sequence) -> None:
        """A token was drawn from finite logits, which vouches for all that led to it."""
        self.slots.confirm(sequence.kv_slot, sequence.computed)
        self.counters.output(sequence.model_key)

    def plan(self) -> list[ScheduledChunk]:
        """The next pass, ordered by delta slot, so that each slot's rows lie together."""
        self._admit()
        work: list[ScheduledChunk] = []
        prompts: list[Sequence] = []
        for sequence in self.running:
            if len(sequence.tokens) - sequence.computed == 1:
                work.append(ScheduledChunk(sequence, sequence.computed, sequence.computed + 1))
            else:
                prompts.append(sequence)
        budget = max(self._pass_tokens - len(work), 1)
        for sequence in sorted(prompts, key=lambda found: self.counters.served(found.model_key)):
            end = min(len(sequence.tokens), sequence.computed + budget)
            budget -= end - sequence.computed
            work.append(ScheduledChunk(sequence, sequence.computed, end))
            if budget == 0:
                break
        return sorted(work, key=lambda item: item.sequence.delta_slot)

    def _admit(self) -> None:
        while (model_key := self._next()) is not None:
            queue = self._queues[model_key]
            sequence = queue.popleft()
            if not queue:
                del self._queues[model_key]
            self._start(sequence)

    def _next(self) -> str | None:
        """The least served delta with a sequence that can start now; makes room for it."""
        running = Counter(sequence.model_key for sequence in self.running)
        richest = None
        if len(self.running) == self._max_running:
            richest = max(running, key=lambda found: (running[found], self.counters.level(found)))
            if running[richest] < 2:
                return None
        for model_key in sorted(
            self._queues, key=lambda found: (self.counters.level(found), running[found])
        ):
            if richest is not None and (
                running[richest] - running[model_key] < 2
                or self.counters.level(richest) < self.counters.level(model_key)
            ):
                continue
            if not self._awaits_prefix(self._queues[model_key][0]):
                if richest is not None:
                    self._preempt(richest)
                return model_key
        return None

    def _start(self, sequence: Sequence) -> None:
        sequence.kv_slot, sequence.computed = self.slots.take(sequence.model_key, sequence.tokens)
        cached = min(sequence.computed, sequence.prompt_length)
        sequence.charged = max(sequence.charged, cached)
        self.counters.owe(sequence.model_key, sequence.prompt_length - sequence.charged)
        self.running.append(sequence)

    def _stop(self, sequence: Sequence, *, keep: bool) -> None:
        self.running.remove(sequence)
        self.counters.owe(sequence.model_key, sequence.charged - sequence.prompt_length)
        self.slots.give_back(sequence.kv_slot, len(sequence.tokens), keep=keep)
        sequence.kv_slot, sequence.computed = -1, 0

    def _preempt(self, model_key: str) -> None:
        """Send the sequence of a delta that was admitted last back to the head of its queue."""
        last = next(found for found in reversed(self.running) if found.model_key == model_key)
        self._stop(last, keep=True)
        self._queues.setdefault(model_key, deque()).appendleft(last)

    def _awaits_prefix(self, sequence: Sequence) -> bool:
        """Whether a prompt is being computed whose beginning is worth waiting for."""
        for other in self.running:
            if other.model_key != sequence.model_key or other.generated:
                continue
            _, cached = self.slots.find(sequence.model_key, sequence.tokens)
            shared = common_prefix(other.tokens, sequence.tokens, len(sequence.tokens) - 1)
            gain = shared - cached
            if gain >= WORTH_WAITING and 2 * gain >= len(other.tokens) - other.computed:
                return True
        return False
