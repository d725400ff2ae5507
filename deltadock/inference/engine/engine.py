"""The step loop: requests in, tokens out, all in one thread."""

import logging
import queue
import threading
from collections.abc import Callable

import torch

from deltadock.errors import InferenceFailed
from deltadock.inference.engine.model_runner import ModelRunner
from deltadock.inference.engine.sampler import SampledToken, Sampler
from deltadock.inference.engine.scheduler import ScheduledChunk, Scheduler
from deltadock.inference.engine.sequence import Event, FinishReason, Sequence
from deltadock.inference.model.model import BaseModel

logger = logging.getLogger(__name__)

Command = Callable[[], None]


class Engine:
    """Continues many sequences at once, each on its own delta slot.

    `submit` and `cancel` may be called from any thread and return at once. What a sequence does
    is told through its `emit`; its last event comes after the last pass that used its slot.
    """

    def __init__(
        self,
        model: BaseModel,
        *,
        max_sequences: int,
        context_tokens: int,
        pass_tokens: int,
        cache_slots: int = 0,
    ) -> None:
        """Make the cache; nothing runs before `start`.

        Args:
            model: the base.
            max_sequences: sequences of a pass.
            context_tokens: tokens of a sequence, the answer's included.
            pass_tokens: tokens of a pass; longer prompts are taken in parts.
            cache_slots: sequences whose keys and values are kept, those of ended ones included;
                `max_sequences` at least.
        """
        self.context_tokens = min(context_tokens, model.context_tokens)
        cache = model.make_cache(max(cache_slots, max_sequences), self.context_tokens)
        self._passes = ModelRunner(model, cache, max_sequences)
        self._scheduler = Scheduler(cache, pass_tokens, max_sequences)
        self._inbox: queue.SimpleQueue[Command] = queue.SimpleQueue()
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> None:
        """Start the step loop."""
        self._thread.start()

    def stop(self) -> None:
        """End the step loop after the pass at hand; what still runs is cancelled."""
        self._inbox.put(self._stop)
        self._thread.join()

    @property
    def alive(self) -> bool:
        """Whether the step loop runs."""
        return self._thread.is_alive()

    @property
    def running(self) -> int:
        """Sequences in the batch."""
        return len(self._scheduler.running)

    @property
    def waiting(self) -> int:
        """Sequences that wait for a place in the batch."""
        return len(self._scheduler.waiting)

    @property
    def reused_tokens(self) -> int:
        """Prompt tokens whose keys and values were found in the cache, since the start."""
        return self._scheduler.slots.reused_tokens

    def submit(self, sequence: Sequence) -> None:
        """Queue a sequence; its tokens must fit the context."""
        self._inbox.put(lambda: self._scheduler.add(sequence))

    def cancel(self, sequence: Sequence) -> None:
        """End a sequence early; without effect once it has ended."""
        self._inbox.put(lambda: self._cancel(sequence))

    def _cancel(self, sequence: Sequence) -> None:
        try:
            self._finish(sequence, "cancelled")
        except Exception as error:
            logger.exception("A sequence could not be cancelled")
            self._fail(sequence, error)

    def _stop(self) -> None:
        self._stopping = True
        for sequence in (*self._scheduler.running, *self._scheduler.waiting):
            self._cancel(sequence)

    def _run(self) -> None:
        with torch.inference_mode():
            while not self._stopping:
                try:
                    self._receive()
                    if work := self._scheduler.plan():
                        self._compute(work)
                except Exception as error:
                    logger.exception("The step loop failed")  # and nobody may wait for ever
                    for sequence in (*self._scheduler.running, *self._scheduler.waiting):
                        self._fail(sequence, error)

    def _receive(self) -> None:
        """Carry out what has arrived; wait for something if there is nothing to compute."""
        if not self._scheduler.busy:
            self._inbox.get()()
        while True:
            try:
                command = self._inbox.get_nowait()
            except queue.Empty:
                return
            command()

    def _compute(self, work: list[ScheduledChunk]) -> None:
        """One pass. If it fails, halves are tried, until only the sequences at fault have failed.

        A pass writes keys and values to places that its tokens alone determine, so computing
        a token again does no harm.
        """
        try:
            logits = self._passes.logits(work)
        except Exception as error:
            logger.exception("A pass of %d sequences failed", len(work))
            failure = error.with_traceback(None)  # it holds the pass's tensors: memory ran out
        else:
            self._advance(work, Sampler(logits))
            return
        if len(work) == 1:
            self._fail(work[0].sequence, failure)
            return
        middle = len(work) // 2
        self._compute(work[:middle])
        self._compute(work[middle:])

    def _advance(self, work: list[ScheduledChunk], scores: Sampler) -> None:
        row = 0
        for item in work:
            samples = item.samples
            self._scheduler.computed(item)
            if samples:
                self._draw(item.sequence, scores, row)
                row += 1

    def _draw(self, sequence: Sequence, scores: Sampler, row: int) -> None:
        """Draw a sequence's next token and tell what came of it."""
        try:
            token = scores.sample(
                row, sequence.sampling, sequence.generator, sequence.tokens, sequence.prompt_length
            )
            self._scheduler.drawn(sequence)
            self._take(sequence, token)
        except Exception as error:
            logger.exception("A sequence failed")
            self._fail(sequence, error)

    def _take(self, sequence: Sequence, token: SampledToken) -> None:
        sequence.tokens.append(token.id)
        sequence.unsent.append(token)
        ended = token.id in sequence.eos_ids
        text = "" if ended else sequence.stream.push(token.id)
        if ended or sequence.stream.stopped:
            self._finish(sequence, "stop", text)
        elif sequence.generated >= sequence.sampling.max_tokens:
            self._finish(sequence, "length", text)
        elif text:
            sequence.emit(Event(text, self._sent(sequence)))

    def _sent(self, sequence: Sequence) -> tuple[SampledToken, ...]:
        tokens = tuple(sequence.unsent)
        sequence.unsent.clear()
        return tokens

    def _finish(self, sequence: Sequence, reason: FinishReason, text: str = "") -> None:
        text += sequence.stream.finish()
        if sequence.stream.stopped:
            reason = "stop"
        if self._scheduler.drop(sequence, keep=True):
            self._tell(sequence, Event(text, self._sent(sequence), reason))

    def _fail(self, sequence: Sequence, error: Exception) -> None:
        if self._scheduler.drop(sequence, keep=False):
            failure = InferenceFailed(f"The request could not be computed: {error}")
            self._tell(sequence, Event(finish="error", error=failure))

    def _tell(self, sequence: Sequence, event: Event) -> None:
        try:
            sequence.emit(event)
        except RuntimeError:
            logger.warning("Nobody listens to a sequence that has ended")
