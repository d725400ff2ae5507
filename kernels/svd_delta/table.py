"""The deltas of the linears that share an input, by slot, behind addresses that never change."""

from collections.abc import Sequence
from typing import Final

import torch

from deltadock.errors import TooLarge
from deltadock.kernels.svd_delta.layout import PLANES, PackedDelta
from deltadock.kernels.svd_delta.plan import BagPlan

ENTRY_FIELDS: Final = 16
"""int32 fields of a slot and linear in `DeltaTable.entries`; the kernels read them in this order:
0 rank, 1 first rank among those of the slot's linears, 2 tiles; then where in the delta's words
each part begins, or -1: 3 tiles, 4 s, 5 v_offset, 6 u_offset, 7 row_scale, 8 column_scale, 9 bias,
10 blocks; 11 to 15 `PackedDelta.block_bounds`."""
OUTPUT_FIELDS: Final = 4
"""int32 fields of a tile in `DeltaTable.outputs`: linear, number of the tile in it, where the
linear's columns begin in y, the linear's columns."""
TILE_COLUMNS: Final = 256
"""Outputs of a program of the expand kernel."""
PADDING: Final = 4096
"""Inputs that a step of the shrink kernel reads at most: WARPS * 2 * WORDS words of single bits."""

_PARTS: Final = (
    "tiles",
    "s",
    "v_offset",
    "u_offset",
    "row_scale",
    "column_scale",
    "bias",
    "blocks",
)
_EMPTY: Final = (0, 0, 0, *[-1] * len(_PARTS), *[0] * (len(PLANES) + 1))


class DeltaTable:
    """The deltas of one linear, or of several that share their input (q, k, v; gate, up).

    Slot 0 is the bare base and stays empty. A delta's words stay where `install` found them: the
    table keeps their address, so that deltas of any size share a table without padding.

    Attributes:
        addresses: (slots, linears) int64, where each delta's words begin.
        entries: (slots, linears, ENTRY_FIELDS) int32.
        outputs: (tiles, OUTPUT_FIELDS) int32, the outputs of all linears in tiles.
        padded: inputs, up to a multiple of `PADDING`.
    """

    def __init__(
        self,
        slots: int,
        h_in: int,
        h_outs: Sequence[int],
        *,
        max_rank: int,
        device: torch.device | str = "cpu",
    ) -> None:
        """Make an empty table.

        Args:
            slots: slots, the base's included.
            h_in: inputs of the linears.
            h_outs: outputs of each linear; in y they are side by side, in this order.
            max_rank: ranks that the deltas of a slot's linears may have together.
            device: where the deltas will lie.
        """
        self.h_in, self.h_outs, self.max_rank = h_in, tuple(h_outs), max_rank
        self.linears, self.slot_count = len(self.h_outs), slots
        self.padded = -(-h_in // PADDING) * PADDING
        self.addresses = torch.zeros(slots, self.linears, dtype=torch.int64, device=device)
        empty = torch.tensor(_EMPTY, dtype=torch.int32, device=device)
        self.entries = empty.repeat(slots, self.linears, 1)
        self.outputs = torch.tensor(self._tiles(), dtype=torch.int32, device=device)
        self.plan: BagPlan | None = None
        """Of the latest step without a GPU."""
        self.deltas: dict[int, tuple[PackedDelta | None, ...]] = {}
        """The deltas of each slot that is not empty, one a linear; None for an unchanged linear."""

    def _tiles(self) -> list[tuple[int, int, int, int]]:
        begins = [sum(self.h_outs[:linear]) for linear in range(self.linears)]
        return [
            (linear, tile, begins[linear], h_out)
            for linear, h_out in enumerate(self.h_outs)
            for tile in range(-(-h_out // TILE_COLUMNS))
        ]

    @property
    def h_out(self) -> int:
        """Outputs of all linears."""
        return sum(self.h_outs)

    def install(self, slot: int, *deltas: PackedDelta | None) -> None:
        """Let the rows of `slot` use `deltas`, one a linear, which lie on the table's device.

        The table keeps the deltas in memory as long as they are installed.

        Raises:
            TooLarge: they have more ranks than the table was made for.
            ValueError: they are of other shapes or another device, or the slot is not a delta's.
        """
        if not 0 < slot < self.slot_count:
            raise ValueError(f"Slot {slot} is not one of 1 to {self.slot_count - 1}.")
        if len(deltas) != self.linears:
            raise ValueError(f"The table is of {self.linears} linears.")
        entries, addresses, rank = [], [], 0
        for delta, h_out in zip(deltas, self.h_outs, strict=True):
            if delta is None:
                entries.append(_EMPTY)
                addresses.append(0)
                continue
            if (delta.h_out, delta.h_in) != (h_out, self.h_in):
                raise ValueError("The delta belongs to a linear of another shape.")
            if delta.words.device != self.addresses.device:
                raise ValueError("Move the delta to the table's device first.")
            entries.append(_entry(delta, rank))
            addresses.append(delta.words.data_ptr())
            rank += delta.rank
        if rank > self.max_rank:
            raise TooLarge("The delta has more ranks than this table holds.")
        self.entries[slot].copy_(torch.tensor(entries, dtype=torch.int32))
        self.addresses[slot].copy_(torch.tensor(addresses, dtype=torch.int64))
        self.deltas[slot] = deltas

    def remove(self, slot: int) -> None:
        """Empty a slot; no kernel that reads it may still be running."""
        self.entries[slot].copy_(torch.tensor(_EMPTY, dtype=torch.int32))
        self.deltas.pop(slot, None)
        self.plan = None


def _entry(delta: PackedDelta, first_rank: int) -> tuple[int, ...]:
    begins = [delta.regions[part].begin if part in delta.regions else -1 for part in _PARTS]
    return (delta.rank, first_rank, delta.tile_count, *begins, *delta.block_bounds)
