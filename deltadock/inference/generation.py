"""One request being answered."""

import asyncio
import time
from collections.abc import AsyncGenerator, Callable
from functools import partial

from deltadock.inference.base import ServedBase
from deltadock.inference.engine.sampler import SamplingParams, make_generator
from deltadock.inference.engine.sequence import Event, Sequence
from deltadock.inference.metrics import Metrics
from deltadock.inference.prompts.tokenizer import TextStream


class Generation:
    """The answers to one request as they come. Belongs to the node's event loop."""

    def __init__(
        self,
        base: ServedBase,
        artifact: str | None,
        metrics: Metrics,
        ended: Callable[[int], None],
    ) -> None:
        self._metrics = metrics
        self._ended = ended
        self._base = base
        self._artifact = artifact
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[tuple[int, Event]] = asyncio.Queue()
        self._sequences: list[Sequence] = []
        self._open = 0
        self._generated = 0
        self._began = time.monotonic()
        self._told_at: dict[int, float] = {}
        """When each answer last had a token."""
        self.tokenizer = base.tokenizer
        self.prompt_tokens = 0

    def start(self, prompts: list[list[int]], n: int, sampling: SamplingParams, slot: int) -> None:
        """Hand `n` sequences for each prompt to the engine; the answers are numbered in order."""
        self.prompt_tokens = sum(map(len, prompts))
        self._metrics.prompt_tokens.inc(self.prompt_tokens)
        for prompt in prompts:
            for choice in range(n):
                self._sequences.append(
                    Sequence(
                        tokens=list(prompt),
                        sampling=sampling,
                        delta_slot=slot,
                        model_key=self._artifact or self._base.digest,
                        eos_ids=self.tokenizer.eos_ids,
                        stream=TextStream(self.tokenizer, prompt, sampling.stop),
                        emit=partial(self._relay, len(self._sequences)),
                        generator=make_generator(sampling, choice),
                    )
                )
        self._open = len(self._sequences)
        for sequence in self._sequences:
            self._base.engine.submit(sequence)

    def cancel(self) -> None:
        """End what still runs."""
        if self._open:
            for sequence in self._sequences:
                self._base.engine.cancel(sequence)

    async def events(self) -> AsyncGenerator[tuple[int, Event]]:
        """(answer's number, event) until every answer has ended; cancelled if left early.

        Raises:
            DeltadockError: one of the answers failed.
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

    def _relay(self, index: int, event: Event) -> None:
        """Called from the engine's thread."""
        self._loop.call_soon_threadsafe(self._receive, index, event)

    def _receive(self, index: int, event: Event) -> None:
        if event.tokens:
            self._observe(index, len(event.tokens))
        self._metrics.generated_tokens.inc(len(event.tokens))
        self._generated += len(event.tokens)
        self._events.put_nowait((index, event))
        if event.finish is not None:
            self._metrics.sequences.labels(event.finish).inc()
            self._open -= 1
            self._ended(1)
            if self._open == 0:
                self._leave()

    def _observe(self, index: int, tokens: int) -> None:
        now, before = time.monotonic(), self._told_at.get(index)
        if before is not None:
            self._metrics.inter_token_seconds.observe((now - before) / tokens)
        elif not self._told_at:
            self._metrics.first_token_seconds.observe(now - self._began)
        self._told_at[index] = now

    def _leave(self) -> None:
        if self._artifact is not None:
            self._base.deltas.release(self._artifact)
        weights = self._artifact or self._base.digest
        self._base.served(weights, self.prompt_tokens + self._generated)
        self._base.users -= 1
