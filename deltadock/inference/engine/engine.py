"""The engine thread: receives sequences, schedules and runs passes, emits events."""

import logging
import queue
import threading
from collections.abc import Callable, Iterable
from typing import Final

import torch

from deltadock.errors import DeltadockError, InferenceFailed
from deltadock.inference.engine.model_runner import ModelRunner
from deltadock.inference.engine.sampler import sample_tokens
from deltadock.inference.engine.sampling import SampledToken, SamplingParams, SamplingRow
from deltadock.inference.engine.scheduler import ScheduledChunk, Scheduler
from deltadock.inference.engine.sequence import Event, FinishReason, Sequence
from deltadock.inference.model.added_tokens import Logits
from deltadock.inference.model.model import DeltaModel
from deltadock.inference.prompts.matching import await_masks

log = logging.getLogger(__name__)

Command = Callable[[], None]

MASK_SECONDS: Final = 0.002
"""How long a pass waits for masks: a tame grammar's are there before the logits."""
UNMASKED: Final = SamplingRow(SamplingParams(temperature=0))
"""Takes the place of a row whose mask is late; what is sampled for it is dropped."""
MAX_DEVICE_FAILURES: Final = 3
"""Consecutive failed passes after which the device did not compute either."""


class Engine:
    """Continues many sequences at once, each on its own delta slot.

    `submit` and `cancel` may be called from any thread and do not block. Sequences report through
    their `emit`; the last event follows the last pass that used the sequence's delta slot.
    """

    def __init__(
        self,
        model: DeltaModel,
        *,
        max_sequences: int,
        context_tokens: int,
        pass_tokens: int,
        cache_slots: int = 0,
    ) -> None:
        """Allocate the cache; nothing runs before `start`.

        Args:
            model: the base.
            max_sequences: sequences in a batch.
            context_tokens: tokens of a sequence, the output included.
            pass_tokens: tokens of a pass; longer prompts are prefilled in chunks.
            cache_slots: sequences whose keys and values are kept, ended ones included; at least
                `max_sequences`.
        """
        self.context_tokens = min(context_tokens, model.context_tokens)
        cache = model.make_cache(max(cache_slots, max_sequences), self.context_tokens)
        self._runner = ModelRunner(model, cache, max_sequences)
        self._scheduler = Scheduler(cache, pass_tokens, max_sequences)
        self._inbox: queue.SimpleQueue[Command] = queue.SimpleQueue()
        self._stopping = False
        self._device_failures = 0
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> None:
        """Start the step loop."""
        self._thread.start()

    def stop(self) -> None:
        """Stop after the current pass; running and waiting sequences are cancelled."""
        self._inbox.put(self._stop)
        self._thread.join()

    @property
    def alive(self) -> bool:
        """Whether the step loop runs, on a device that computes."""
        return self._thread.is_alive() and not self.device_lost

    @property
    def device_lost(self) -> bool:
        """Whether the device has failed; every sequence fails from then on."""
        return self._device_failures >= MAX_DEVICE_FAILURES

    @property
    def running(self) -> int:
        """Sequences in the batch."""
        return len(self._scheduler.running)

    @property
    def waiting(self) -> int:
        """Sequences waiting to enter the batch."""
        return len(self._scheduler.waiting)

    @property
    def reused_tokens(self) -> int:
        """Prompt tokens found in the prefix cache, since the start."""
        return self._scheduler.slots.reused_tokens

    def submit(self, sequence: Sequence) -> None:
        """Queue a sequence; its tokens must fit the context."""
        self._inbox.put(lambda: self._scheduler.add(sequence))

    def cancel(self, sequence: Sequence) -> None:
        """Cancel a sequence; no effect once it has ended."""
        self._inbox.put(lambda: self._cancel(sequence))

    def _cancel(self, sequence: Sequence) -> None:
        try:
            self._finish(sequence, "cancelled")
        except Exception as error:
            log.exception("A sequence could not be cancelled")
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
                    if self.device_lost:
                        raise RuntimeError("The device does not compute any more.")
                    if chunks := self._scheduler.schedule():
                        self._compute(chunks)
                    else:  # every sequence in the batch waits for its mask, if there is one
                        self._await_masks(self._scheduler.running)
                except Exception as error:
                    log.exception("The step loop failed")  # clients must not wait for ever
                    if not self.device_lost:
                        self._device_computes()
                    for sequence in (*self._scheduler.running, *self._scheduler.waiting):
                        self._fail(sequence, error)

    def _receive(self) -> None:
        """Run the commands that have arrived; block for one if there is nothing to compute."""
        if not self._scheduler.busy:
            self._inbox.get()()
        while True:
            try:
                command = self._inbox.get_nowait()
            except queue.Empty:
                return
            command()

    def _compute(self, chunks: list[ScheduledChunk]) -> None:
        """Run one pass. If it fails, bisect until only the failing sequences have failed.

        Keys and values depend only on a pass's tokens, so recomputing a token is harmless.
        """
        try:
            logits = self._runner.logits(chunks)
        except Exception as error:
            log.exception("A pass of %d sequences failed", len(chunks))
            failure = error.with_traceback(None)  # which references the pass's tensors
        else:
            self._sample(chunks, logits)
            return
        if not self._device_computes() or len(chunks) == 1:
            for chunk in chunks:
                self._fail(chunk.sequence, failure)
            return
        middle = len(chunks) // 2
        self._compute(chunks[:middle])
        self._compute(chunks[middle:])

    def _device_computes(self) -> bool:
        """Check the device after a failed pass, which may be a delta's fault; counts failures."""
        try:
            self._runner.check_device()
        except Exception:
            log.exception("The device failed")
            self._device_failures += 1
            return False
        self._device_failures = 0
        return True

    def _sample(self, chunks: list[ScheduledChunk], logits: Logits) -> None:
        """Sample the next token of every chunk that samples and emit what follows from it."""
        sequences = [chunk.sequence for chunk in chunks if chunk.samples]
        for chunk in chunks:
            self._scheduler.computed(chunk)
        late = self._await_masks(sequences)
        rows = [UNMASKED if one in late else one.sampling_row for one in sequences]
        for sequence, token in zip(sequences, self._sampled(logits, rows), strict=True):
            if sequence in late:
                self._scheduler.delay(sequence)
            else:
                self._continue(sequence, token)

    def _await_masks(self, sequences: Iterable[Sequence]) -> set[Sequence]:
        """Wait a little for the masks of sequences with grammars; those whose is not there then."""
        matchers = {one.matcher: one for one in sequences if one.matcher is not None}
        return {matchers[matcher] for matcher in await_masks(matchers, MASK_SECONDS)}

    def _sampled(self, logits: Logits, rows: list[SamplingRow]) -> list[SampledToken | Exception]:
        """Each row's token; if sampling fails, an error for the rows that cause it alone."""
        try:
            sampled = sample_tokens(logits, rows)
        except Exception as error:
            log.exception("Sampling for %d sequences failed", len(rows))
            failure = error.with_traceback(None)  # which references the logits
        else:
            self._device_failures = 0
            return sampled
        if not self._device_computes() or len(rows) == 1:
            return [failure] * len(rows)
        return [self._sampled(logits.row(row), [rows[row]])[0] for row in range(len(rows))]

    def _continue(self, sequence: Sequence, token: SampledToken | Exception) -> None:
        """Append a sampled token to its sequence, or fail with the sequence's exception."""
        try:
            if not sequence.sampling.max_tokens:
                self._finish(sequence, "length")
                return
            if sequence.matcher is not None and sequence.matcher.complete:
                self._finish(sequence, "stop")
                return
            if isinstance(token, Exception):
                raise token
            self._scheduler.sampled(sequence)
            self._append(sequence, token)
        except Exception as error:
            if not isinstance(error, DeltadockError):
                log.exception("A sequence failed")
            self._fail(sequence, error)

    def _append(self, sequence: Sequence, token: SampledToken) -> None:
        sequence.tokens.append(token.id)
        sequence.unsent.append(token)
        ended = token.id in sequence.end_ids
        text = "" if ended else sequence.stream.push(token.id)
        if sequence.matcher is not None:
            sequence.matcher.accept(token.id)
        if ended or sequence.stream.stopped:
            self._finish(sequence, "stop", text)
        elif sequence.generated >= sequence.sampling.max_tokens:
            self._finish(sequence, "length", text)
        elif text:
            sequence.emit(self._event(sequence, text))

    def _event(self, sequence: Sequence, text: str, finish: FinishReason | None = None) -> Event:
        """An event with the tokens and prompt scores that have not been sent."""
        scores = tuple(sequence.prompt_scores[place] for place in sorted(sequence.prompt_scores))
        sequence.prompt_scores.clear()
        return Event(text, self._take_unsent(sequence), finish, prompt=scores)

    def _take_unsent(self, sequence: Sequence) -> tuple[SampledToken, ...]:
        tokens = tuple(sequence.unsent)
        sequence.unsent.clear()
        return tokens

    def _finish(self, sequence: Sequence, reason: FinishReason, text: str = "") -> None:
        text += sequence.stream.finish()
        if sequence.stream.stopped:
            reason = "stop"
        if self._drop(sequence, keep=True):
            self._emit(sequence, self._event(sequence, text, reason))

    def _fail(self, sequence: Sequence, error: Exception) -> None:
        if self._drop(sequence, keep=False):
            if not isinstance(error, DeltadockError):
                error = InferenceFailed(f"The request could not be computed: {error}")
            self._emit(sequence, Event(finish="error", error=error))

    def _drop(self, sequence: Sequence, *, keep: bool) -> bool:
        if sequence.matcher is not None:
            sequence.matcher.close()
        return self._scheduler.drop(sequence, keep=keep)

    def _emit(self, sequence: Sequence, event: Event) -> None:
        try:
            sequence.emit(event)
        except RuntimeError:
            log.warning("The event loop of an ended sequence is closed")
