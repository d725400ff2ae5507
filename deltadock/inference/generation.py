"""One request being answered."""

import asyncio
import time
from collections.abc import AsyncGenerator, Callable
from functools import partial
from typing import TypeVar

from deltadock.inference.base import ServedBase
from deltadock.inference.engine.sampling import SamplingParams, make_draws
from deltadock.inference.engine.sequence import Event, Sequence
from deltadock.inference.metrics import Metrics
from deltadock.inference.prompts.matching import TokenGrammar
from deltadock.inference.prompts.request_threads import RequestThreads
from deltadock.inference.prompts.tokenizer import TextStream, Tokenizer
from deltadock.model_target import ModelTarget
from deltadock.openai.fields import Usage

Result = TypeVar("Result")


class Generation:
    """The sequences of one request and their events. Belongs to the node's event loop."""

    def __init__(
        self,
        base: ServedBase,
        target: ModelTarget,
        tokenizer: Tokenizer,
        metrics: Metrics,
        threads: RequestThreads,
        *,
        on_finish: Callable[[], None],
        started_at: float,
    ) -> None:
        """Prepare a request.

        Args:
            base: the base, entered for this request.
            target: the weights; a delta's slot is acquired for this request.
            tokenizer: of these weights.
            metrics: receives counts and latencies.
            threads: for work on the answer that would hold up others.
            on_finish: called as each sequence ends.
            started_at: when the request arrived, in monotonic seconds.
        """
        self.tokenizer = tokenizer
        self.prompts: list[list[int]] = []
        self.prompt_tokens = 0
        self._base, self._target, self._metrics = base, target, metrics
        self._threads = threads
        self._on_finish = on_finish
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[tuple[int, Event]] = asyncio.Queue()
        self._sequences: list[Sequence] = []
        self._running = 0
        self._generated_tokens = 0
        self._started_at = started_at
        self._last_token_at: dict[int, float] = {}
        """Monotonic seconds of each sequence's last tokens."""

    def start(
        self,
        prompts: list[list[int]],
        n: int,
        samplings: list[SamplingParams],
        slot: int,
        grammar: TokenGrammar | None = None,
    ) -> None:
        """Submit `n` sequences per prompt to the engine, numbered in order.

        Each prompt has its own sampling parameters.
        """
        self.prompts = prompts
        self.prompt_tokens = sum(map(len, prompts))
        self._metrics.prompt_tokens.inc(self.prompt_tokens)
        for prompt, sampling in zip(prompts, samplings, strict=True):
            for choice in range(n):
                self._sequences.append(
                    Sequence(
                        tokens=list(prompt),
                        sampling=sampling,
                        delta_slot=slot,
                        queue_key=self._target.queue_key,
                        end_ids=sampling.end_ids(self.tokenizer.eos_ids),
                        stream=TextStream(
                            self.tokenizer,
                            prompt,
                            sampling.stop,
                            skip_special_tokens=sampling.skip_special_tokens,
                        ),
                        emit=partial(self._emit, len(self._sequences)),
                        draws=make_draws(sampling, choice),
                        matcher=None if grammar is None else grammar.matcher(),
                    )
                )
        self._running = len(self._sequences)
        for sequence in self._sequences:
            self._base.engine.submit(sequence)

    @property
    def usage(self) -> Usage:
        """The tokens so far."""
        return Usage.of(self.prompt_tokens, self._generated_tokens)

    async def in_thread(self, work: Callable[[], Result]) -> Result:
        """The result of `work`, in turn with other requests' of its tenant and delta."""
        return await self._threads.run(self._target, work)

    def cancel(self) -> None:
        """Cancel the sequences that still run."""
        if self._running:
            for sequence in self._sequences:
                self._base.engine.cancel(sequence)

    async def events(self) -> AsyncGenerator[tuple[int, Event]]:
        """(sequence number, event) until all have ended; leaving early cancels the rest.

        Raises:
            DeltadockError: a sequence failed.
        """
        unfinished = len(self._sequences)
        try:
            while unfinished:
                index, event = await self._events.get()
                if event.error is not None:
                    raise event.error
                unfinished -= event.finish is not None
                yield index, event
        finally:
            self.cancel()

    def _emit(self, index: int, event: Event) -> None:
        """Pass an event on; called from the engine thread."""
        self._loop.call_soon_threadsafe(self._receive, index, event)

    def _receive(self, index: int, event: Event) -> None:
        if event.tokens:
            self._observe_latency(index, len(event.tokens))
        self._metrics.generated_tokens.inc(len(event.tokens))
        self._generated_tokens += len(event.tokens)
        self._events.put_nowait((index, event))
        if event.finish is not None:
            self._metrics.sequences.labels(event.finish).inc()
            self._running -= 1
            self._on_finish()
            if self._running == 0:
                self._release()

    def _observe_latency(self, index: int, tokens: int) -> None:
        now, before = time.monotonic(), self._last_token_at.get(index)
        if before is not None:
            self._metrics.inter_token_seconds.observe((now - before) / tokens)
        elif not self._last_token_at:
            self._metrics.first_token_seconds.observe(now - self._started_at)
        self._last_token_at[index] = now

    def _release(self) -> None:
        if self._target.artifact_digest is not None:
            self._base.deltas.release(self._target.artifact_digest, self._target.tenant)
        self._base.record_traffic(self._target.model_key, self.usage.total_tokens)
        self._base.leave()
