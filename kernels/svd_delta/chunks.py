"""Batch metadata of a step: rows grouped by slot, in the form that every layer's kernels share."""

from collections.abc import Iterable, Sequence
from typing import Final

import torch
from torch import Tensor

from deltadock.kernels.svd_delta.layout import TILE_RANKS, DeltaTable

CHUNK_ROWS: Final = 4
"""Rows per chunk: with two bytes a number, the smallest operand of a tensor core. It is fixed, so
that a row's result does not depend on how many other rows are in the batch."""
BLOCK_INPUTS: Final = 1024
"""Inputs with a common scale."""

RowIndex = slice | Tensor
"""Rows of a step: a slice if they are consecutive, else int64 row numbers."""


def most_chunks(rows: int, slots: int, dense_rows: int | None = None) -> int:
    """The most chunks that `rows` rows of `slots` slots, slot 0 included, can make.

    Slots with `dense_rows` rows or more make none.
    """
    used = min(rows, slots - 1)
    most = used + (rows - used) // CHUNK_ROWS
    if dense_rows is None:
        return most
    return min(most, (slots - 1) * -(-(dense_rows - 1) // CHUNK_ROWS))


class Chunks:
    """Rows sorted by slot and split into chunks of one slot each, on buffers that never move.

    Built once per step and used by all layers. Chunks past the last have slot 0, for which a
    kernel returns immediately.

    Attributes:
        rows: (max_chunks * CHUNK_ROWS,) int32, row number of each position; -1: unused.
        slots: (max_chunks,) int32, each chunk's slot.
        used: (1,) int32, the number of chunks with a slot, which come first.
        row_slots: (max_rows,) int32, each row's slot; 0 past the last row.
        fixed: (max_chunks * CHUNK_ROWS, ...) int32, scratch of one call: each linear's inputs as
            fixed-point numbers, for each width of a plane in its own order, high bytes before low.
        scales: (max_chunks * CHUNK_ROWS, ..., 2) float32, scale and sum of every `BLOCK_INPUTS` of
            them.
        projected: (max_chunks * CHUNK_ROWS, max_tiles, TILE_RANKS) float32 projections; 0 past a
            tile's last rank.
        peaks, rests: (max_chunks, max_tiles, CHUNK_ROWS), of each tile of ranks the largest
            magnitude of its projections as float32's bits, and what the zero points of U take from
            every output.
        count: chunks to launch: the number of chunks of this step rounded up to a power of two,
            at most `max_chunks`. A captured CUDA graph serves every step of the same count.
    """

    def __init__(
        self,
        max_rows: int,
        slots: int,
        tables: Iterable[DeltaTable],
        *,
        dense_rows: int | None = None,
        packed_rows: int = 0,
        device: torch.device | str = "cpu",
    ) -> None:
        """Allocate buffers for steps of up to `max_rows` rows, and scratch for calls on `tables`.

        A slot with `dense_rows` rows or more in a step uses matrix products with its unpacked
        factors instead of chunks, which would unpack the factors once per chunk. Steps of up to
        `packed_rows` rows use chunks alone.
        """
        tables = tuple(tables)
        self.max_rows, self.slot_count = max_rows, slots
        self.max_tiles = max((table.max_tiles for table in tables), default=0)
        self.width = max((table.linears * table.padded_h_in for table in tables), default=0)
        self.max_chunks = max(
            1, most_chunks(packed_rows, slots), most_chunks(max_rows, slots, dense_rows)
        )
        positions = self.max_chunks * CHUNK_ROWS
        self._buffer = torch.zeros(
            positions + self.max_chunks + 1 + max_rows, dtype=torch.int32, device=device
        )
        end = positions + self.max_chunks
        self.rows, self.slots = self._buffer[:positions], self._buffer[positions:end]
        self.used, self.row_slots = self._buffer[end : end + 1], self._buffer[end + 1 :]
        self.fixed = torch.empty(positions, 2 * self.width, dtype=torch.int32, device=device)
        self.scales = torch.empty(positions, self.width // BLOCK_INPUTS, 2, device=device)
        self.projected = torch.empty(positions, self.max_tiles, TILE_RANKS, device=device)
        tiles = (self.max_chunks, self.max_tiles, CHUNK_ROWS)
        self.peaks = torch.empty(tiles, dtype=torch.int32, device=device)
        self.rests = torch.empty(tiles, device=device)
        self._dense_rows, self._packed_rows = dense_rows, packed_rows
        self.row_count = 0
        """Rows of this step, including those of slot 0."""
        self.count = 0
        self.members: dict[int, list[int]] = {}
        """Row numbers of each slot but 0."""
        self.by_slot: dict[int, RowIndex] = {}
        """The same rows as indices into tensors."""
        self.dense: dict[int, RowIndex] = {}
        """The slots of `by_slot` that are in no chunk."""

    def assign(self, row_slots: Sequence[int]) -> None:
        """Lay out a step in which row i belongs to slot `row_slots[i]`.

        Raises:
            ValueError: there are more rows or slots than the buffers hold.
        """
        if len(row_slots) > self.max_rows:
            raise ValueError(f"The step has more than {self.max_rows} rows.")
        if not all(0 <= slot < self.slot_count for slot in row_slots):
            raise ValueError(f"A row's slot is not one of 0 to {self.slot_count - 1}.")
        members: dict[int, list[int]] = {}
        for row, slot in enumerate(row_slots):
            if slot:
                members.setdefault(slot, []).append(row)
        limit = self._dense_rows if len(row_slots) > self._packed_rows else None
        dense = [s for s, numbers in members.items() if limit is not None and len(numbers) >= limit]
        rows: list[int] = []
        slots: list[int] = []
        for slot, numbers in sorted(members.items()):
            if slot in dense:
                continue
            chunks = -(-len(numbers) // CHUNK_ROWS)
            rows += numbers + [-1] * (chunks * CHUNK_ROWS - len(numbers))
            slots += [slot] * chunks
        self.row_count = len(row_slots)
        self.count = min(1 << (len(slots) - 1).bit_length(), self.max_chunks) if slots else 0
        # The caching allocator does not reuse pinned memory before the copy has read it.
        source = torch.empty(self._buffer.shape, dtype=torch.int32, pin_memory=self._buffer.is_cuda)
        layout = source.numpy()
        positions, end = len(self.rows), len(self.rows) + self.max_chunks
        layout[:positions], layout[positions:] = -1, 0
        layout[: len(rows)] = rows
        layout[positions : positions + len(slots)] = slots
        layout[end] = len(slots)
        layout[end + 1 : end + 1 + len(row_slots)] = row_slots
        self._buffer.copy_(source, non_blocking=True)
        self.members = members
        self.by_slot = {slot: self._index(numbers) for slot, numbers in members.items()}
        self.dense = {slot: self.by_slot[slot] for slot in dense}

    def _index(self, numbers: list[int]) -> RowIndex:
        """Consecutive rows as a slice, which indexes without a copy."""
        first, last = numbers[0], numbers[-1]
        if last - first + 1 == len(numbers):
            return slice(first, last + 1)
        return torch.tensor(numbers, device=self._buffer.device)
