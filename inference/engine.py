"""The step loop: requests in, tokens out, all in one thread."""

import logging
import queue
import threading
from collections.abc import Callable

import torch

from deltadock.errors import InferenceFailed
from inference.attention import Span, make_step
from inference.layers import to_groups
from inference.model import BaseModel
from inference.sampler import SampledToken, Scores
from inference.scheduler import Event, FinishReason, Scheduler, Sequence, Work

logger = logging.getLogger(__name__)

Command = Callable[[], None]


class Engine:
    """Continues many sequences at once, each on its own delta slot.

    `submit` and `cancel` may be called from any thread and return at once. What a sequence does
    is told through its `emit`; its last event comes after the last pass that used its slot.
    """

    def __init__(
        self, model: BaseModel, *, max_sequences: int, context_tokens: int, pass_tokens: int
    ) -> None:
        self._model = model
        self.context_tokens = min(context_tokens, model.context_tokens)
        self._cache = model.make_cache(max_sequences, self.context_tokens)
        self._scheduler = Scheduler(self._cache, pass_tokens)
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
        """Sequences that wait for a cache slot."""
        return len(self._scheduler.waiting)

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

    def _compute(self, work: list[Work]) -> None:
        """One pass. If it fails, halves are tried, until only the sequences at fault have failed.

        A pass writes keys and values to places that its tokens alone determine, so computing
        a token again does no harm.
        """
        try:
            logits = self._forward(work)
        except Exception as error:
            if len(work) > 1:
                middle = len(work) // 2
                self._compute(work[:middle])
                self._compute(work[middle:])
            else:
                logger.exception("A pass failed")
                self._fail(work[0].sequence, error)
            return
        scores, row = Scores(logits), 0
        for item in work:
            samples = item.samples
            item.sequence.computed = item.end
            if samples:
                self._advance(item.sequence, scores, row)
                row += 1

    def _forward(self, work: list[Work]) -> torch.Tensor:
        """Logits (rows, vocabulary) of the sequences whose next token can be drawn."""
        tokens: list[int] = []
        slots: list[int] = []
        spans: list[Span] = []
        for sequence, begin, end in work:
            spans.append(Span(sequence.kv_slot, len(tokens), len(tokens) + end - begin, begin))
            tokens += sequence.tokens[begin:end]
            slots += [sequence.delta_slot] * (end - begin)
        step = make_step(self._cache, spans)
        hidden = self._model.forward(
            torch.tensor(tokens, device=self._model.device), step, to_groups(slots)
        )
        last = [span.end - 1 for span, item in zip(spans, work, strict=True) if item.samples]
        if len(last) < len(tokens):
            hidden = hidden[:, last]
        return self._model.logits(hidden, to_groups([slots[row] for row in last]))

    def _advance(self, sequence: Sequence, scores: Scores, row: int) -> None:
        """Draw a sequence's next token and tell what came of it."""
        try:
            token = scores.sample(row, sequence.sampling, sequence.generator)
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
        if self._scheduler.drop(sequence):
            self._tell(sequence, Event(text, self._sent(sequence), reason))

    def _fail(self, sequence: Sequence, error: Exception) -> None:
        if self._scheduler.drop(sequence):
            failure = InferenceFailed(f"The request could not be computed: {error}")
            self._tell(sequence, Event(finish="error", error=failure))

    def _tell(self, sequence: Sequence, event: Event) -> None:
        try:
            sequence.emit(event)
        except RuntimeError:
            logger.warning("Nobody listens to a sequence that has ended")
