"""Which rows of a step belong to which slot, in the form that the kernels of every layer share."""

from collections.abc import Iterable, Sequence
from typing import Final

import torch

from deltadock.kernels.svd_delta.factors import Rows
from deltadock.kernels.svd_delta.table import DeltaTable

HEIGHT: Final = 8
"""Rows of a chunk: the least that a tensor core multiplies. It is fixed, for a row's result would
otherwise depend on how many others are in the batch."""
SUM_COLUMNS: Final = 1024
"""Inputs that one number of `Chunks.sums` is the sum of."""


class Chunks:
    """Rows sorted by slot and cut into chunks of one slot each, on buffers that stay in place.

    Built once a step and used by all layers. A chunk past the last has slot 0, and a kernel
    leaves it at once.

    Attributes:
        rows: (max_chunks * HEIGHT,) int32, the row at each place of each chunk; -1 for none.
        slots: (max_chunks,) int32, each chunk's slot.
        row_slots: (max_rows,) int32, each row's slot; 0 past the last row.
        scaled, sums, projected: (max_chunks * HEIGHT, ...) scratch of one call: 16-bit inputs of
            each linear, float32 sums of `SUM_COLUMNS` of them, float32 projections on the ranks.
        count: chunks to launch: a power of two at least the number of chunks of this step, or
            `max_chunks`. A captured CUDA graph serves every step of the same count.
    """

    def __init__(
        self,
        max_rows: int,
        slots: int,
        tables: Iterable[DeltaTable],
        *,
        dense_rows: int | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        """Make the buffers for steps of up to `max_rows` rows, and scratch for calls on `tables`.

        A slot with `dense_rows` rows or more in a step is left to plain matrix products with its
        unpacked factors: worth it once those are read less often than chunks would unpack them.
        """
        tables = tuple(tables)
        self.max_rows, self.slot_count = max_rows, slots
        self.max_rank = max((table.max_rank for table in tables), default=0)
        self.width = max((table.linears * table.padded for table in tables), default=0)
        self.max_chunks = max(1, min(max_rows, max_rows // HEIGHT + slots))
        places = self.max_chunks * HEIGHT
        self._buffer = torch.zeros(
            places + self.max_chunks + max_rows, dtype=torch.int32, device=device
        )
        end = places + self.max_chunks
        self.rows, self.slots = self._buffer[:places], self._buffer[places:end]
        self.row_slots = self._buffer[end:]
        self.scaled = torch.empty(places, self.width, dtype=torch.int16, device=device)
        self.sums = torch.empty(places, self.width // SUM_COLUMNS, device=device)
        self.projected = torch.empty(places, self.max_rank, device=device)
        self._dense_rows = dense_rows
        self.row_count = 0
        """Rows of this step, those of slot 0 included."""
        self.count = 0
        self.members: dict[int, list[int]] = {}
        """Numbers of the rows of each slot but 0."""
        self.by_slot: dict[int, Rows] = {}
        """The same, to index with."""
        self.dense: dict[int, Rows] = {}
        """Of these, the slots that are in no chunk."""

    def assign(self, row_slots: Sequence[int]) -> None:
        """Lay out a step in which row i belongs to slot `row_slots[i]`.

        Raises:
            ValueError: there are more rows, or other slots, than the buffers were made for.
        """
        if len(row_slots) > self.max_rows:
            raise ValueError(f"The step has more than {self.max_rows} rows.")
        if not all(0 <= slot < self.slot_count for slot in row_slots):
            raise ValueError(f"A row's slot is not one of 0 to {self.slot_count - 1}.")
        members: dict[int, list[int]] = {}
        for row, slot in enumerate(row_slots):
            if slot:
                members.setdefault(slot, []).append(row)
        most = self._dense_rows
        dense = [s for s, found in members.items() if most is not None and len(found) >= most]
        rows: list[int] = []
        slots: list[int] = []
        for slot, found in sorted(members.items()):
            if slot in dense:
                continue
            chunks = -(-len(found) // HEIGHT)
            rows += found + [-1] * (chunks * HEIGHT - len(found))
            slots += [slot] * chunks
        self.row_count = len(row_slots)
        self.count = min(1 << (len(slots) - 1).bit_length(), self.max_chunks) if slots else 0
        # Pinned memory is not given to others before the copy has read it.
        source = torch.empty(self._buffer.shape, dtype=torch.int32, pin_memory=self._buffer.is_cuda)
        layout = source.numpy()
        places, end = len(self.rows), len(self.rows) + self.max_chunks
        layout[:places], layout[places:] = -1, 0
        layout[: len(rows)] = rows
        layout[places : places + len(slots)] = slots
        layout[end : end + len(row_slots)] = row_slots
        self._buffer.copy_(source, non_blocking=True)
        self.members = members
        self.by_slot = {slot: self._index(found) for slot, found in members.items()}
        self.dense = {slot: self.by_slot[slot] for slot in dense}

    def _index(self, rows: list[int]) -> Rows:
        """Neighbours as a slice, which copies nothing."""
        first, last = rows[0], rows[-1]
        if last - first + 1 == len(rows):
            return slice(first, last + 1)
        return torch.tensor(rows, device=self._buffer.device)
