"""Runs the model on scheduled chunks: packed passes, and decode passes as CUDA graphs.

A decode step of a large model is thousands of small kernel launches; a CUDA graph replays them as
one. A graph records addresses and shapes, so decode runs on static buffers, and the batch, the
cache slots and the tokens seen by attention are padded to powers of two: a model needs some dozens
of graphs, captured on first use.
"""

import logging
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Final, NamedTuple

import torch
from torch import Tensor

from deltadock.inference.engine.sampler import score_tokens
from deltadock.inference.engine.scheduler import ScheduledChunk
from deltadock.inference.model.added_tokens import Logits
from deltadock.inference.model.attention import (
    AttentionMetadata,
    DecodeBatch,
    Span,
    make_attention_metadata,
)
from deltadock.inference.model.kv_cache import KVCache
from deltadock.inference.model.model import BaseModel

logger = logging.getLogger(__name__)

MAX_GRAPHS: Final = 64
"""Captured graphs kept; the least recently used is evicted."""
SCORED_ROWS: Final = 64
"""Prompt tokens scored at a time: their logits are float32 over the whole vocabulary."""
MIN_TOKENS: Final = 128
"""Smallest padded length that attention sees."""


class ModelRunner:
    """Runs passes of a model over a key/value cache."""

    def __init__(
        self, model: BaseModel, cache: KVCache, max_rows: int, *, static: bool | None = None
    ) -> None:
        """Allocate buffers for up to `max_rows` decoding sequences.

        `static` decodes on static buffers; by default only on a GPU, where CUDA graphs need them.
        """
        self._model = model
        self._cache = cache
        self._decode: GraphDecoder | None = None
        if model.device.type == "cuda" if static is None else static:
            self._decode = GraphDecoder(model, cache, max_rows)

    @property
    def static(self) -> bool:
        """Whether passes that only decode run on static buffers, and read all slots up to the
        highest in use."""
        return self._decode is not None

    def check_device(self) -> None:
        """Compute and read back a number; raises what the device raises, if it is lost."""
        torch.ones(1, device=self._model.device).add_(1).item()

    def logits(self, chunks: list[ScheduledChunk]) -> Logits:
        """Compute the chunks; returns a row of logits for each one that samples.

        Writes the keys and values of every chunk's tokens to the cache, and the scores of prompt
        tokens to the sequences that ask for them.
        """
        if self._decode is not None and all(
            chunk.end - chunk.begin == 1 and not chunk.scored for chunk in chunks
        ):
            rows = [
                DecodeRow(sequence.tokens[begin], begin, sequence.kv_slot, sequence.delta_slot)
                for sequence, begin, _ in chunks
            ]
            hidden = self._decode.hidden(rows)
            if hidden is not None:
                return self._sampled_logits(hidden, chunks, list(range(len(chunks))))
        return self._packed(chunks)

    def _packed(self, chunks: list[ScheduledChunk]) -> Logits:
        tokens: list[int] = []
        slots: list[int] = []
        spans: list[Span] = []
        for sequence, begin, end in chunks:
            spans.append(Span(sequence.kv_slot, len(tokens), len(tokens) + end - begin, begin))
            tokens += sequence.tokens[begin:end]
            slots += [sequence.delta_slot] * (end - begin)
        metadata = make_attention_metadata(self._cache, spans)
        packed = torch.tensor(tokens, device=self._model.device)
        hidden = self._model.forward(packed, metadata, slots)
        for span, chunk in zip(spans, chunks, strict=True):
            self._score(hidden[:, span.begin : span.begin + chunk.scored], chunk)
        return self._sampled_logits(hidden, chunks, [span.end - 1 for span in spans])

    def _score(self, hidden: Tensor, chunk: ScheduledChunk) -> None:
        """Score the prompt tokens that follow the rows of `hidden`."""
        sequence = chunk.sequence
        for begin in range(0, hidden.shape[1], SCORED_ROWS):
            rows = hidden[:, begin : begin + SCORED_ROWS]
            count, first = rows.shape[1], chunk.begin + begin + 1
            logits = self._model.logits(rows, [sequence.delta_slot] * count)
            tokens = sequence.tokens[first : first + count]
            scores = score_tokens(logits, tokens, sequence.sampling.logprobs or 0)
            sequence.prompt_scores.update(enumerate(scores, start=first))

    def _sampled_logits(
        self, hidden: Tensor, chunks: list[ScheduledChunk], last_rows: list[int]
    ) -> Logits:
        rows = [row for row, chunk in zip(last_rows, chunks, strict=True) if chunk.samples]
        slots = [chunk.sequence.delta_slot for chunk in chunks if chunk.samples]
        if len(rows) < hidden.shape[1]:
            hidden = hidden[:, rows]
        return self._model.logits(hidden, slots)


class DecodeRow(NamedTuple):
    """A sequence's newest token."""

    token: int
    position: int
    kv_slot: int
    delta_slot: int


class _GraphKey(NamedTuple):
    """The padded shapes of a graph; `deltas` is the model's part of the key."""

    rows: int
    slots: int
    tokens: int
    deltas: tuple[int, int]


class GraphDecoder:
    """Decodes up to `max_rows` sequences per pass on static buffers."""

    def __init__(self, model: BaseModel, cache: KVCache, max_rows: int) -> None:
        self._model, self._cache = model, cache
        self._max_rows = max_rows
        device = model.device
        sizes = (max_rows, max_rows, max_rows, cache.slots, cache.slots)
        self._buffer = torch.zeros(sum(sizes), dtype=torch.int64, device=device)
        self._tokens, self._positions, self._kv_slots, self._queries, self._lengths = (
            self._buffer.split(sizes)
        )
        shape = (1, max_rows, model.config.hidden_size)
        self._embedded = torch.zeros(shape, dtype=model.dtype, device=device)
        self._graphs: OrderedDict[_GraphKey, Callable[[], Tensor]] = OrderedDict()
        self._pool = torch.cuda.graph_pool_handle() if device.type == "cuda" else None

    def hidden(self, rows: Sequence[DecodeRow]) -> Tensor | None:
        """Hidden states (1, rows, hidden); writes keys and values to the cache.

        Returns None, having computed nothing, if a row's delta cannot be part of a graph.
        """
        count = _power_of_two(len(rows), 1, self._max_rows)
        padded = [*rows, *[rows[-1]] * (count - len(rows))]  # recomputing a row is harmless
        self._model.route([row.delta_slot for row in padded])
        deltas = self._model.graph_key
        if deltas is None:
            return None
        key = _GraphKey(
            rows=count,
            slots=_power_of_two(max(row.kv_slot for row in rows) + 1, 1, self._cache.slots),
            tokens=_power_of_two(
                max(row.position for row in rows) + 1, MIN_TOKENS, self._cache.length
            ),
            deltas=deltas,
        )
        self._fill_buffers(padded)
        self._embedded[:, :count] = self._model.embed(self._tokens[:count])
        if key not in self._graphs:
            self._graphs[key] = self._capture(key)
            if len(self._graphs) > MAX_GRAPHS:
                self._graphs.popitem(last=False)
        self._graphs.move_to_end(key)
        return self._graphs[key]()[:, : len(rows)]

    def _fill_buffers(self, rows: Sequence[DecodeRow]) -> None:
        source = torch.zeros(self._buffer.shape, dtype=torch.int64, pin_memory=self._buffer.is_cuda)
        values, count, slots = source.numpy(), self._max_rows, self._cache.slots
        queries, lengths = values[3 * count : 3 * count + slots], values[3 * count + slots :]
        lengths[:] = 1
        for index, row in enumerate(rows):
            values[index], values[count + index] = row.token, row.position
            values[2 * count + index] = row.kv_slot
            queries[row.kv_slot], lengths[row.kv_slot] = index, row.position + 1
        self._buffer.copy_(source, non_blocking=True)

    def _body(self, key: _GraphKey) -> Tensor:
        """Run the layers on views of the buffers; masks are rebuilt, so that a graph holds them."""
        kv_slots = self._kv_slots[: key.rows]
        batch = DecodeBatch(
            slice(0, key.slots),
            key.tokens,
            self._lengths[: key.slots],
            rows=slice(0, key.rows),
            places=kv_slots,
            queries=self._queries[: key.slots],
        )
        metadata = AttentionMetadata(
            self._cache, kv_slots, self._positions[: key.rows], decode_batches=[batch]
        )
        return self._model.body(self._embedded[:, : key.rows], metadata)

    def _capture(self, key: _GraphKey) -> Callable[[], Tensor]:
        if self._pool is None:
            return lambda: self._body(key)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # warm up: libraries allocate on their first call
            self._body(key)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        # Other threads keep loading deltas during the capture.
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            hidden = self._body(key)
        logger.info("Captured a decode graph: %s", key)

        def replay() -> Tensor:
            graph.replay()
            return hidden

        return replay


def _power_of_two(value: int, lowest: int, highest: int) -> int:
    """Round `value` up to a power of two, clamped to [lowest, highest]."""
    return min(max(1 << (value - 1).bit_length(), lowest), highest)
