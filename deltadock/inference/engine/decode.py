"""Decode passes on buffers that stay in place, so that a GPU can replay them as CUDA graphs.

A decode step of a large model is thousands of small launches; a graph makes them one. A graph
holds addresses and shapes, so rows are padded to a power of two, as are the cache slots and tokens
that attention looks at: a model needs some dozens of graphs, captured when first met.
"""

import logging
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Final, NamedTuple

import torch
from torch import Tensor

from deltadock.inference.model.attention import AttentionMetadata, DecodeBatch
from deltadock.inference.model.kv_cache import KVCache
from deltadock.inference.model.model import BaseModel

logger = logging.getLogger(__name__)

GRAPHS: Final = 64
"""Graphs that are kept; the least recently used goes first."""
LEAST_TOKENS: Final = 128
"""Tokens that attention looks at, at least."""


class Row(NamedTuple):
    """A sequence's newest token."""

    token: int
    position: int
    kv_slot: int
    delta_slot: int


class _Key(NamedTuple):
    """What a graph serves; `deltas` is the model's own part of the key."""

    rows: int
    slots: int
    tokens: int
    deltas: tuple[int, int]


class StaticDecode:
    """Decode passes of up to `max_rows` rows."""

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
        self._graphs: OrderedDict[_Key, Callable[[], Tensor]] = OrderedDict()
        self._pool = torch.cuda.graph_pool_handle() if device.type == "cuda" else None

    def hidden(self, rows: Sequence[Row]) -> Tensor | None:
        """Hidden states (1, rows, hidden); fills the cache.

        None if some row's delta cannot be part of a graph; nothing has been computed then.
        """
        count = _power_of_two(len(rows), 1, self._max_rows)
        padded = [*rows, *[rows[-1]] * (count - len(rows))]  # the same again does no harm
        self._model.route([row.delta_slot for row in padded])
        deltas = self._model.graph_key
        if deltas is None:
            return None
        key = _Key(
            rows=count,
            slots=_power_of_two(max(row.kv_slot for row in rows) + 1, 1, self._cache.slots),
            tokens=_power_of_two(
                max(row.position for row in rows) + 1, LEAST_TOKENS, self._cache.length
            ),
            deltas=deltas,
        )
        self._fill(padded)
        self._embedded[:, :count] = self._model.embed(self._tokens[:count])
        if key not in self._graphs:
            self._graphs[key] = self._capture(key)
            if len(self._graphs) > GRAPHS:
                self._graphs.popitem(last=False)
        self._graphs.move_to_end(key)
        return self._graphs[key]()[:, : len(rows)]

    def _fill(self, rows: Sequence[Row]) -> None:
        pinned = self._buffer.is_cuda
        source = torch.zeros(self._buffer.shape, dtype=torch.int64, pin_memory=pinned)
        values, count, slots = source.numpy(), self._max_rows, self._cache.slots
        queries, lengths = values[3 * count : 3 * count + slots], values[3 * count + slots :]
        lengths[:] = 1
        for place, row in enumerate(rows):
            values[place], values[count + place] = row.token, row.position
            values[2 * count + place] = row.kv_slot
            queries[row.kv_slot], lengths[row.kv_slot] = place, row.position + 1
        self._buffer.copy_(source, non_blocking=True)

    def _body(self, key: _Key) -> Tensor:
        """The layers, on views of the buffers; the masks are new, for a graph must compute them."""
        kv_slots = self._kv_slots[: key.rows]
        run = DecodeBatch(
            slice(0, key.slots),
            key.tokens,
            self._lengths[: key.slots],
            rows=slice(0, key.rows),
            places=kv_slots,
            queries=self._queries[: key.slots],
        )
        step = AttentionMetadata(self._cache, kv_slots, self._positions[: key.rows], runs=[run])
        return self._model.body(self._embedded[:, : key.rows], step)

    def _capture(self, key: _Key) -> Callable[[], Tensor]:
        if self._pool is None:
            return lambda: self._body(key)
        beside = torch.cuda.Stream()
        beside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(beside):  # libraries allocate at their first call
            self._body(key)
        torch.cuda.current_stream().wait_stream(beside)
        graph = torch.cuda.CUDAGraph()
        # Loads of deltas go on in other threads.
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            hidden = self._body(key)
        logger.info("Captured a decode graph: %s", key)

        def replay() -> Tensor:
            graph.replay()
            return hidden

        return replay


def _power_of_two(value: int, least: int, most: int) -> int:
    """The least power of two that is at least `value` and `least`; `most` at most."""
    return min(max(1 << (value - 1).bit_length(), least), most)
