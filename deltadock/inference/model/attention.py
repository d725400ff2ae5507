"""Attention over the slotted cache.

The rows of a pass are tokens of many sequences, packed as (1, rows). Each sequence is either
decoding (one row) or prefilling a chunk of its prompt (many rows). On a GPU one kernel attends to
exactly the tokens of all decoding sequences. On the CPU those in nearby cache slots are batched:
one attention call on a view of the cache.
"""

from dataclasses import dataclass, field
from typing import Final, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from deltadock.inference.model.kv_cache import KVCache
from deltadock.kernels.decode_attention import decode_attention
from deltadock.kernels.decode_attention.reference import attention

MAX_GAP: Final = 2
"""Idle cache slots that a decode batch may span: wasted attention is cheaper than another call."""


class AttentionForm(NamedTuple):
    """How a layer attends."""

    scale: float
    """Factor of the scores."""
    window: int | None = None
    """Only the last so many tokens are attended to."""
    cap: float | None = None
    """Scores s become `cap * tanh(s / cap)`."""


@dataclass(slots=True)
class Span:
    """Rows `[begin, end)` of the pass: one sequence's tokens from position `start` on."""

    slot: int
    begin: int
    end: int
    start: int

    @property
    def length(self) -> int:
        """Tokens in the cache after this pass."""
        return self.start + self.end - self.begin


class PrefillChunk:
    """One sequence's prefill chunk."""

    def __init__(self, span: Span, device: torch.device) -> None:
        self.rows = slice(span.begin, span.end)
        self.slots = slice(span.slot, span.slot + 1)
        self.length = span.length
        self._start = span.start
        self._device = device
        self._masks: dict[int | None, Tensor] = {}

    def attend(self, query: Tensor, keys: Tensor, values: Tensor, form: AttentionForm) -> Tensor:
        """(1, heads, n, d) queries over (1, kv_heads, length, d), to (1, heads, n, d)."""
        scale, window, cap = form
        if cap is not None:
            own = query.unflatten(1, (keys.shape[1], -1))
            shared = keys[:, :, None], values[:, :, None]
            return attention(own, *shared, self._mask(window), scale=scale, cap=cap).flatten(1, 2)
        grouped = query.shape[1] != keys.shape[1]
        if self._start == 0 and (window is None or self.length <= window):
            return F.scaled_dot_product_attention(
                query, keys, values, is_causal=True, enable_gqa=grouped, scale=scale
            )
        return F.scaled_dot_product_attention(
            query, keys, values, attn_mask=self._mask(window), enable_gqa=grouped, scale=scale
        )

    def _mask(self, window: int | None) -> Tensor:
        if window not in self._masks:
            queries = torch.arange(self._start, self.length, device=self._device)[:, None]
            keys = torch.arange(self.length, device=self._device)[None]
            mask = keys <= queries
            self._masks[window] = mask if window is None else mask & (keys > queries - window)
        return self._masks[window]


class DecodeBatch:
    """Decoding sequences in a range of cache slots, one row each."""

    def __init__(
        self,
        slots: slice,
        length: int,
        lengths: Tensor,
        *,
        rows: Tensor | slice,
        places: Tensor | slice,
        queries: Tensor | slice,
        equal_lengths: bool = False,
    ) -> None:
        """Describe a batch; masks are built on first use.

        Args:
            slots: the range of cache slots.
            length: tokens per slot that attention reads.
            lengths: (slots,) int64, tokens of each slot's sequence; 1 for idle slots.
            rows: the pass's rows of these sequences.
            places: for each of the rows, its slot's index in the range.
            queries: for each slot of the range, its row; any row for an idle slot.
            equal_lengths: whether all lengths equal `length`.
        """
        self.slots, self.length = slots, length
        self.rows, self.places, self.queries = rows, places, queries
        self._lengths, self._equal_lengths = lengths, equal_lengths
        self._masks: dict[int | None, Tensor | None] = {}

    def attend(self, query: Tensor, keys: Tensor, values: Tensor, form: AttentionForm) -> Tensor:
        """(n, heads, d) queries over (n, kv_heads, length, d), to (n, heads, d).

        Query heads that share a key head are laid out as that head's queries.
        """
        count, heads, width = query.shape
        kv_heads = keys.shape[1]
        out = attention(
            query.reshape(count, kv_heads, heads // kv_heads, width),
            keys,
            values,
            self._mask(form.window, query.dtype),
            scale=form.scale,
            cap=form.cap,
        )
        return out.reshape(count, heads, width)

    def _mask(self, window: int | None, dtype: torch.dtype) -> Tensor | None:
        if window is not None and self.length <= window:
            window = None
        if window not in self._masks:
            self._masks[window] = self._build(window, dtype)
        return self._masks[window]

    def _build(self, window: int | None, dtype: torch.dtype) -> Tensor | None:
        if self._equal_lengths and window is None:
            return None
        seen = torch.arange(self.length, device=self._lengths.device)[None]
        hidden = seen >= self._lengths[:, None]
        if window is not None:
            hidden |= seen < self._lengths[:, None] - window
        mask = torch.zeros(hidden.shape, dtype=dtype, device=hidden.device)
        return mask.masked_fill_(hidden, float("-inf"))[:, None, None]


class DecodeRows(NamedTuple):
    """Decoding sequences in any cache slots, one row each, for the GPU's kernel.

    Slots and lengths are copied from the host: launches that overlap read them early.
    """

    rows: Tensor | slice
    """The pass's rows of these sequences."""
    slots: Tensor
    """(n,) int64: the cache slot of each of the rows."""
    lengths: Tensor
    """(n,) int64: tokens of each sequence, its row included."""


@dataclass(slots=True)
class AttentionMetadata:
    """Layout of a pass's rows for attention; masks are built once for all layers."""

    cache: KVCache
    slots: Tensor
    """(rows,) int64: each row's cache slot."""
    positions: Tensor
    """(rows,) int64: each row's position in its sequence."""
    decode_rows: DecodeRows | None = None
    decode_batches: list[DecodeBatch] = field(default_factory=list)
    prefill_chunks: list[PrefillChunk] = field(default_factory=list)


def make_attention_metadata(cache: KVCache, spans: list[Span]) -> AttentionMetadata:
    """Lay out a pass over `spans`, which cover its rows in order."""
    device = cache.keys[0].device
    slots = [span.slot for span in spans for _ in range(span.begin, span.end)]
    positions = [position for span in spans for position in range(span.start, span.length)]
    metadata = AttentionMetadata(
        cache, torch.tensor(slots, device=device), torch.tensor(positions, device=device)
    )
    decoding = [span for span in spans if span.end - span.begin == 1]
    metadata.prefill_chunks = [
        PrefillChunk(span, device) for span in spans if span.end - span.begin > 1
    ]
    if decoding and device.type == "cuda":
        metadata.decode_rows = DecodeRows(
            _index([span.begin for span in decoding], device),
            torch.tensor([span.slot for span in decoding], device=device),
            torch.tensor([span.length for span in decoding], device=device),
        )
    else:
        metadata.decode_batches = [
            _decode_batch(batch, device) for batch in _in_nearby_slots(decoding)
        ]
    return metadata


def _in_nearby_slots(spans: list[Span]) -> list[list[Span]]:
    """Split decoding sequences at gaps of more than `MAX_GAP` idle slots."""
    batches: list[list[Span]] = []
    for span in sorted(spans, key=lambda span: span.slot):
        if not batches or span.slot > batches[-1][-1].slot + 1 + MAX_GAP:
            batches.append([])
        batches[-1].append(span)
    return batches


def _decode_batch(spans: list[Span], device: torch.device) -> DecodeBatch:
    """Batch decoding sequences, given in the order of their cache slots."""
    first, last = spans[0].slot, spans[-1].slot
    rows = [span.begin for span in spans]
    by_slot = {span.slot: span for span in spans}
    padded = [by_slot.get(slot, spans[0]) for slot in range(first, last + 1)]
    length = max(span.length for span in spans)
    return DecodeBatch(
        slice(first, last + 1),
        length,
        torch.tensor([span.length for span in padded], device=device),
        rows=_index(rows, device),
        places=_index([span.slot - first for span in spans], device),
        queries=_index([span.begin for span in padded], device),
        equal_lengths=all(span.length == length for span in padded),
    )


def _index(rows: list[int], device: torch.device) -> Tensor | slice:
    """An index of these rows: a slice, which copies nothing, if they are consecutive."""
    if rows == list(range(rows[0], rows[0] + len(rows))):
        return slice(rows[0], rows[0] + len(rows))
    return torch.tensor(rows, device=device)


def attend(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    metadata: AttentionMetadata,
    form: AttentionForm,
) -> Tensor:
    """Attend to each row's sequence in a layer's cache, this pass's keys and values included.

    `query` (rows, heads, d), `keys` and `values` (slots, kv_heads, length, d); returns
    (rows, heads, d).
    """
    decoding = metadata.decode_rows
    if decoding is not None and len(decoding.slots) == len(query):
        return decode_attention(
            query, keys, values, decoding.slots, decoding.lengths, **form._asdict()
        )
    out = torch.empty_like(query)
    if decoding is not None:
        rows, slots, lengths = decoding
        out[rows] = decode_attention(query[rows], keys, values, slots, lengths, **form._asdict())
    for batch in metadata.decode_batches:
        seen = (batch.slots, slice(None), slice(0, batch.length))
        attended = batch.attend(query[batch.queries], keys[seen], values[seen], form)
        out[batch.rows] = attended[batch.places]
    for chunk in metadata.prefill_chunks:
        seen = (chunk.slots, slice(None), slice(0, chunk.length))
        own = query[chunk.rows].transpose(0, 1)[None]
        attended = chunk.attend(own, keys[seen], values[seen], form)
        out[chunk.rows] = attended[0].transpose(0, 1)
    return out
