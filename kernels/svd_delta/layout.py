"""How the kernels find a linear's deltas: the packed words as the artifact holds them, by slot.

A delta is `diag(row_scale) U_hat diag(s) V_hat diag(column_scale)`, most often without the outer
two. Its ranks lie in groups of equal widths; a group's segment on
either side holds one plane after the other, and the planes of a width are its binary digits
(3 = 2+1, 5 = 4+1, 6 = 4+2, 7 = 4+2+1). Plane `p` of a segment is (count, plane_words) 32-bit
words, row-major; segments begin at multiples of 128 bytes. Nothing is repacked on the way to the
device: both sides are one contiguous copy.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

import torch
from torch import Tensor

from deltadock.errors import InvalidArtifact, TooLarge, UnsupportedModel

ALIGNMENT_WORDS: Final = 32
TAIL_WORDS: Final = 32
"""Words after the last segment: a kernel reads whole tiles of 128 columns, up to 32 words, and
drops what it read past the end of a vector."""
GROUP_FIELDS: Final = 6
"""int32 fields of a group in `DeltaTable.groups`; the kernels read them in this order."""


class Group(NamedTuple):
    """A run of ranks whose widths are equal on each side."""

    ranks: int
    v_bits: int
    u_bits: int


def planes(bits: int) -> list[int]:
    """The planes of a width, most significant first."""
    return [plane for plane in (8, 4, 2, 1) if bits & plane]


def plane_words(columns: int, plane: int) -> int:
    """Words that one vector of `columns` codes takes in a plane."""
    return -(-columns * plane // 32)


def segment_words(count: int, columns: int, bits: int) -> int:
    """Words of a group's segment on one side, with the padding to 128 bytes."""
    words = count * sum(plane_words(columns, plane) for plane in planes(bits))
    return -(-words // ALIGNMENT_WORDS) * ALIGNMENT_WORDS


@dataclass(frozen=True, eq=False, slots=True)
class PackedDelta:
    """One linear's delta in the form that the kernels read.

    Attributes:
        h_out, h_in: shape of the linear's weight.
        groups: the ranks, in stored order.
        words: int32; the segments of V, then those of U, then `TAIL_WORDS` zeros.
        scales: (3, rank) float32: `s`, the zero points of V, the zero points of U. A value is
            `code - zero`.
        row_scale, column_scale: (h_out,) and (h_in,) float32 factors of the delta's rows and
            columns, or None. The GPU's kernels do not take them.
    """

    h_out: int
    h_in: int
    groups: tuple[Group, ...]
    words: Tensor
    scales: Tensor
    row_scale: Tensor | None = None
    column_scale: Tensor | None = None

    @property
    def rank(self) -> int:
        """Ranks of all groups together."""
        return self.scales.shape[1]

    @property
    def nbytes(self) -> int:
        """Bytes on the device."""
        tensors = (self.words, self.scales, self.row_scale, self.column_scale)
        return sum(tensor.nbytes for tensor in tensors if tensor is not None)

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> "PackedDelta":
        """The same delta on another device: a contiguous copy of each tensor."""

        def moved(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor.to(device, non_blocking=non_blocking)

        return PackedDelta(
            self.h_out,
            self.h_in,
            self.groups,
            self.words.to(device, non_blocking=non_blocking),
            self.scales.to(device, non_blocking=non_blocking),
            moved(self.row_scale),
            moved(self.column_scale),
        )

    def segments(self) -> list[tuple[int, int, int]]:
        """For each group its first rank and where its segments of V and of U begin in `words`."""
        rank, v_word = 0, 0
        u_word = sum(segment_words(count, self.h_in, bits) for count, bits, _ in self.groups)
        found = []
        for count, v_bits, u_bits in self.groups:
            found.append((rank, v_word, u_word))
            rank += count
            v_word += segment_words(count, self.h_in, v_bits)
            u_word += segment_words(count, self.h_out, u_bits)
        return found


def pack_delta(
    shape: tuple[int, int],
    groups: Sequence[Group],
    *,
    s: Tensor,
    v: Tensor,
    u: Tensor,
    v_zero: Tensor | None = None,
    u_zero: Tensor | None = None,
    gain: float = 1.0,
    row_scale: Tensor | None = None,
    column_scale: Tensor | None = None,
) -> PackedDelta:
    """Join an artifact's segments of one matrix.

    Args:
        shape: (h_out, h_in) of the linear's weight.
        groups: runs of ranks of equal widths, in stored order.
        s: (rank,) float32 or float16; times `gain`, the singular values times both grids' steps.
        v, u: 32-bit words of each side's segments.
        v_zero, u_zero: (rank,) float16 zero points; None: codes are centred, on the mid-rise grid.
        gain: factor of `s`.
        row_scale, column_scale: (h_out,) and (h_in,) factors of rows and columns, if there are any.

    Raises:
        InvalidArtifact: the sizes do not agree with the groups.
    """
    h_out, h_in = shape
    kept = tuple(Group(*group) for group in groups if group[0])
    rank = sum(group.ranks for group in kept)
    if any(not 1 <= bits <= 8 for group in kept for bits in group[1:]):
        raise InvalidArtifact("A delta has a width outside 1 to 8 bits.")
    sizes = (
        sum(segment_words(group.ranks, h_in, group.v_bits) for group in kept),
        sum(segment_words(group.ranks, h_out, group.u_bits) for group in kept),
    )
    v_zero = _centres(kept, 1) if v_zero is None else v_zero
    u_zero = _centres(kept, 2) if u_zero is None else u_zero
    wrong = (v.numel(), u.numel()) != sizes or {len(s), len(v_zero), len(u_zero)} != {rank}
    for scale, size in ((row_scale, h_out), (column_scale, h_in)):
        wrong |= scale is not None and scale.shape != (size,)
    if wrong:
        raise InvalidArtifact("The segments of a delta do not have the sizes its ranks imply.")
    tail = torch.zeros(TAIL_WORDS, dtype=torch.int32, device=v.device)
    words = torch.cat([v.view(torch.int32), u.view(torch.int32), tail])
    scales = torch.stack([s.float() * gain, *(z.float().to(s.device) for z in (v_zero, u_zero))])
    row_scale, column_scale = (
        None if scale is None else scale.float() for scale in (row_scale, column_scale)
    )
    return PackedDelta(h_out, h_in, kept, words, scales, row_scale, column_scale)


def _centres(groups: Sequence[Group], side: int) -> Tensor:
    """The mid-rise grid's zero point of each rank; `side` is the width's place in a group."""
    return torch.tensor([(2 ** group[side] - 1) / 2 for group in groups for _ in range(group[0])])


class DeltaTable:
    """The deltas of one linear, by slot, behind tensors whose addresses never change.

    Slot 0 is the bare base and stays empty. A slot's words stay where `install` found them: the
    table keeps their address, so that deltas of any size share a table without padding.

    Attributes:
        addresses: (slots,) int64, where each slot's words begin.
        sizes: (slots,) int32, groups of each slot; 0 for an empty one.
        groups: (slots, max_groups, 6) int32: ranks, first rank, v_bits, u_bits, first word of V,
            first word of U. `max_groups` is rounded up to a power of two.
        scales: (slots, 3, max_rank) float32, as in `PackedDelta`.
    """

    def __init__(
        self,
        slots: int,
        shape: tuple[int, int],
        *,
        max_rank: int,
        max_groups: int = 64,
        device: torch.device | str = "cpu",
    ) -> None:
        self.h_out, self.h_in = shape
        self.max_rank = max_rank
        self.max_groups = 1 << (max_groups - 1).bit_length()
        self.addresses = torch.zeros(slots, dtype=torch.int64, device=device)
        self.sizes = torch.zeros(slots, dtype=torch.int32, device=device)
        self.groups = torch.zeros(
            slots, self.max_groups, GROUP_FIELDS, dtype=torch.int32, device=device
        )
        self.scales = torch.zeros(slots, 3, max_rank, dtype=torch.float32, device=device)
        self.deltas: dict[int, PackedDelta] = {}

    def install(self, slot: int, delta: PackedDelta) -> None:
        """Let the rows of `slot` use `delta`, which lies on the table's device.

        Raises:
            TooLarge: it has more ranks or groups than the table was made for.
            UnsupportedModel: it has row or column scales, and the table lies on a GPU.
            ValueError: it is of another shape or device, or the slot is the base's or none.
        """
        if not 0 < slot < len(self.sizes):
            raise ValueError(f"Slot {slot} is not one of 1 to {len(self.sizes) - 1}.")
        if (delta.h_out, delta.h_in) != (self.h_out, self.h_in):
            raise ValueError("The delta belongs to a linear of another shape.")
        if delta.words.device != self.addresses.device:
            raise ValueError("Move the delta to the table's device first.")
        scaled = delta.row_scale is not None or delta.column_scale is not None
        if scaled and self.addresses.is_cuda:
            raise UnsupportedModel(
                "The GPU's kernel takes no deltas with a scale for each row or column; decode the "
                "delta to factors instead."
            )
        if delta.rank > self.max_rank or len(delta.groups) > self.max_groups:
            raise TooLarge("The delta has more ranks or groups than this table holds.")
        fields = torch.zeros(self.max_groups, GROUP_FIELDS, dtype=torch.int32)
        for index, (group, begins) in enumerate(zip(delta.groups, delta.segments(), strict=True)):
            rank, v_word, u_word = begins
            row = (group.ranks, rank, group.v_bits, group.u_bits, v_word, u_word)
            fields[index] = torch.tensor(row, dtype=torch.int32)
        self.groups[slot].copy_(fields)
        self.scales[slot, :, : delta.rank].copy_(delta.scales)
        self.addresses[slot] = delta.words.data_ptr()
        self.sizes[slot] = len(delta.groups)
        self.deltas[slot] = delta

    def remove(self, slot: int) -> None:
        """Empty a slot; no kernel that reads it may still be running."""
        self.sizes[slot] = 0
        self.groups[slot] = 0
        self.deltas.pop(slot, None)
