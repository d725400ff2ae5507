"""Runs the model on scheduled chunks: packed passes, and decode passes as CUDA graphs.

A decode step of a large model is thousands of small kernel launches; a CUDA graph replays them as
one. A graph records addresses and shapes, so decode runs on static buffers, and the batch is padded
to a power of two or a multiple of `GRAPH_ROWS`: a model needs some dozens of graphs, captured on
first use. Attention reads on the device how long each sequence is.
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
    DecodeRows,
    Span,
    make_attention_metadata,
)
from deltadock.inference.model.kv_cache import KVCache
from deltadock.inference.model.model import DeltaModel

log = logging.getLogger(__name__)

MAX_GRAPHS: Final = 64
"""Captured graphs kept; the least recently used is evicted."""
SCORED_ROWS: Final = 64
"""Prompt tokens scored at a time: their logits are float32 over the whole vocabulary."""
GRAPH_ROWS: Final = 8
"""Larger batches are padded to a multiple of so many rows."""


class ModelRunner:
    """Runs passes of a model over a key/value cache."""

    def __init__(
        self, model: DeltaModel, cache: KVCache, max_rows: int, *, static: bool | None = None
    ) -> None:
        """Allocate buffers for up to `max_rows` decoding sequences.

        `static` decodes on static buffers; by default only on a GPU, where CUDA graphs need them.
        """
        self._model = model
        self._cache = cache
        self._decode: GraphDecoder | None = None
        if model.device.type == "cuda" if static is None else static:
            self._decode = GraphDecoder(model, cache, max_rows)

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


GraphKey = tuple[int, int]
"""`DeltaModel.graph_key`; the first is the number of rows."""


class GraphDecoder:
    """Decodes up to `max_rows` sequences per pass on static buffers."""

    def __init__(self, model: DeltaModel, cache: KVCache, max_rows: int) -> None:
        self._model, self._cache = model, cache
        self._max_rows = max_rows
        device = model.device
        self._buffer = torch.zeros(4, max_rows, dtype=torch.int64, device=device)
        self._tokens, self._positions, self._kv_slots, self._lengths = self._buffer
        shape = (1, max_rows, model.config.hidden_size)
        self._embedded = torch.zeros(shape, dtype=model.dtype, device=device)
        self._graphs: OrderedDict[GraphKey, Callable[[], Tensor]] = OrderedDict()
        self._pool = torch.cuda.graph_pool_handle() if device.type == "cuda" else None

    def hidden(self, rows: Sequence[DecodeRow]) -> Tensor | None:
        """Hidden states (1, rows, hidden); writes keys and values to the cache.

        Returns None, having computed nothing, if a row's delta cannot be part of a graph.
        """
        count = min(_padded(len(rows)), self._max_rows)
        padded = [*rows, *[rows[-1]] * (count - len(rows))]  # recomputing a row is harmless
        self._model.route([row.delta_slot for row in padded])
        key = self._model.graph_key
        if key is None:
            return None
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
        values = source.numpy()
        for index, row in enumerate(rows):
            values[:, index] = row.token, row.position, row.kv_slot, row.position + 1
        self._buffer.copy_(source, non_blocking=True)

    def _body(self, rows: int) -> Tensor:
        """Run the layers on views of the buffers."""
        slots, positions = self._kv_slots[:rows], self._positions[:rows]
        metadata = AttentionMetadata(
            self._cache,
            slots,
            positions,
            decode_rows=DecodeRows(slice(0, rows), slots, self._lengths[:rows]),
        )
        return self._model.body(self._embedded[:, :rows], metadata)

    def _capture(self, key: GraphKey) -> Callable[[], Tensor]:
        rows, _ = key
        if self._pool is None:
            return lambda: self._body(rows)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # warm up: libraries allocate on their first call
            self._body(rows)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        # Other threads keep loading deltas during the capture.
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            hidden = self._body(rows)
        log.info("Captured a decode graph: %s", key)

        def replay() -> Tensor:
            graph.replay()
            return hidden

        return replay


def _padded(rows: int) -> int:
    """Round up to a power of two, and from `GRAPH_ROWS` on to a multiple of it."""
    if rows < GRAPH_ROWS:
        return 1 << (rows - 1).bit_length()
    return -(-rows // GRAPH_ROWS) * GRAPH_ROWS
