"""Memory layout of deltas on a device: the words of one delta, and the table of a linear's slots.

A delta is `diag(row_scale) U_hat diag(s) V_hat diag(column_scale)`, plus an optional bias delta.
Its ranks are grouped by width; a group's segment on either side is a sequence of planes, the
binary digits of the width (3 = 2+1, 5 = 4+1, 6 = 4+2, 7 = 4+2+1). Plane `p` of a segment is
(count, plane_words) 32-bit words, row-major; segments are aligned to 128 bytes. Nothing is
repacked for the device: segments, scales and the kernels' descriptors form one run of words,
moved in one copy.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import reduce
from operator import or_
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import torch
from torch import Tensor

from deltadock.errors import InvalidArtifact, TooLarge

if TYPE_CHECKING:
    from deltadock.kernels.svd_delta.cpu import EmbeddingBagPlan

ALIGNMENT_WORDS: Final = 32
PLANES: Final = (8, 4, 2, 1)
TILE_RANKS: Final = 32
"""Ranks per tile: what a program of the shrink kernel takes, or of the unpacking one, and per block
of the expand kernel, which gives each warp one at a time."""
TILE_FIELDS: Final = 16
"""int32 fields of a tile: 0 v_bits, 1 first rank, 2 ranks, 3 to 6 V's first word of each of
`PLANES`; 7 u_bits, 8 to 11 U's words."""
BLOCK_FIELDS: Final = 4
"""int32 fields of a block: its tile, ranks, first word, and as a float32's bits the value of the
plane's lowest bit in the code, relative to the plane's codes at the top of the code."""
DESCRIPTOR_FIELDS: Final = 16
"""int32 fields of `DeltaTable.descriptors`, per slot and linear, in the order that the kernels
read: 0 tiles, 1 first tile among those of the slot's linears; then the word offset of each region,
or -1: 2 tiles, 3 s, 4 v_offset, 5 u_offset, 6 row_scale, 7 column_scale, 8 bias, 9 blocks; 10 to 14
`PackedDelta.block_bounds`; 15 V's planes, as bits."""
OUTPUT_TILE_FIELDS: Final = 4
"""int32 fields of `DeltaTable.output_tiles`: linear, index of the tile in it, the linear's first
column in y, the linear's columns."""
TILE_COLUMNS: Final = (64, 128, 256)
"""Outputs that a program of the expand kernel may take at a time."""
MOST_GROUPS: Final = 64
"""Groups of an artifact's matrix: their widths fall."""
WARP_INPUTS: Final = 512
"""Most inputs that a warp of the shrink kernel takes of a vector at a time."""
H_IN_ALIGNMENT: Final = 4096
"""Most inputs per step of the shrink kernel, of 8 warps."""
SLACK_WORDS: Final = 1024
"""Words that are there past V's segments, of U or none: the shrink kernel reads vectors in whole
steps, and the step after."""

_DESCRIBED_REGIONS: Final = (
    "tiles",
    "s",
    "v_offset",
    "u_offset",
    "row_scale",
    "column_scale",
    "bias",
    "blocks",
)
_EMPTY_DESCRIPTOR: Final = (0, 0, *[-1] * len(_DESCRIBED_REGIONS), *[0] * (len(PLANES) + 2))


class Group(NamedTuple):
    """Consecutive ranks of equal widths."""

    ranks: int
    v_bits: int
    u_bits: int


def planes(bits: int) -> list[int]:
    """The planes of a width, most significant first."""
    return [plane for plane in PLANES if bits & plane]


def plane_words(columns: int, plane: int) -> int:
    """Words per vector of `columns` codes in a plane."""
    return -(-columns * plane // 32)


def segment_words(count: int, columns: int, bits: int) -> int:
    """Words of a group's segment on one side, padded to 128 bytes."""
    return _aligned(count * sum(plane_words(columns, plane) for plane in planes(bits)))


def _aligned(words: int) -> int:
    return -(-words // ALIGNMENT_WORDS) * ALIGNMENT_WORDS


class Region(NamedTuple):
    """A range of a delta's words, aligned to 128 bytes."""

    begin: int
    size: int


@dataclass(frozen=True, eq=False, slots=True)
class PackedDelta:
    """One linear's delta in the layout that the kernels read.

    Attributes:
        h_out, h_in: shape of the linear's weight.
        groups: the ranks, in stored order.
        words: int32, all data of this delta.
        regions: ranges of `words`. Always present: the segments `v` and `u`; `s` (rank) float32;
            `tiles` (n, TILE_FIELDS) and `blocks` (n, BLOCK_FIELDS) int32. Optional, float32:
            `v_offset` and `u_offset` (rank), `value = code - (2**bits - 1) / 2 - offset`;
            `row_scale` (h_out); `column_scale` (h_in); `bias` (h_out).
        block_bounds: first block of each of `PLANES`, then the number of blocks.
    """

    h_out: int
    h_in: int
    groups: tuple[Group, ...]
    words: Tensor
    regions: dict[str, Region]
    block_bounds: tuple[int, ...]

    @property
    def rank(self) -> int:
        """Total ranks of all groups."""
        return self.regions["s"].size

    @property
    def tile_count(self) -> int:
        """Tiles of ranks."""
        return self.regions["tiles"].size // TILE_FIELDS

    @property
    def nbytes(self) -> int:
        """Bytes on the device."""
        return self.words.nbytes

    def integers(self, name: str) -> Tensor:
        """A view of a region, int32."""
        begin, size = self.regions[name]
        return self.words[begin : begin + size]

    def floats(self, name: str) -> Tensor | None:
        """A view of a region, float32; None if the delta lacks it."""
        return self.integers(name).view(torch.float32) if name in self.regions else None

    @property
    def s(self) -> Tensor:
        """Singular values times both sides' steps, (rank,) float32, a view."""
        return self.integers("s").view(torch.float32)

    def with_bias(self, bias: Tensor) -> "PackedDelta":
        """A copy of the delta with a bias delta, (h_out,)."""
        padding = self.words.new_zeros(_aligned(self.h_out) - self.h_out)
        words = torch.cat([self.words, bias.float().contiguous().view(torch.int32), padding])
        regions = {**self.regions, "bias": Region(len(self.words), self.h_out)}
        return replace(self, words=words, regions=regions)

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> "PackedDelta":
        """Copy the delta to a device in one transfer."""
        return replace(self, words=self.words.to(device, non_blocking=non_blocking))


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
    """Lay out an artifact's segments of one matrix.

    Args:
        shape: (h_out, h_in) of the linear's weight.
        groups: consecutive ranks of equal widths, in stored order.
        s: (rank,) float32 or float16; `s * gain` is the singular values times both sides' steps.
        v, u: 32-bit words of each side's segments.
        v_zero, u_zero: (rank,) float16 zero points; None: the mid-rise grid.
        gain: scale of `s`.
        row_scale, column_scale: optional (h_out,) and (h_in,) scales.

    Raises:
        InvalidArtifact: a width is out of range, or sizes disagree with the groups.
    """
    h_out, h_in = shape
    kept = tuple(Group(*group) for group in groups if group[0])
    if any(not 1 <= bits <= 8 for group in kept for bits in group[1:]):
        raise InvalidArtifact("A delta has a width outside 1 to 8 bits.")
    rank = sum(group.ranks for group in kept)
    sizes = {
        "v": sum(segment_words(group.ranks, h_in, group.v_bits) for group in kept),
        "u": sum(segment_words(group.ranks, h_out, group.u_bits) for group in kept),
        "s": rank,
        "v_offset": rank,
        "u_offset": rank,
        "row_scale": h_out,
        "column_scale": h_in,
    }
    regions = {
        "v": v.view(torch.int32),
        "u": u.view(torch.int32),
        "s": s.float() * gain,
        "v_offset": None if v_zero is None else v_zero.float(),
        "u_offset": None if u_zero is None else u_zero.float(),
        "row_scale": row_scale,
        "column_scale": column_scale,
    }
    present = {name: data for name, data in regions.items() if data is not None}
    if any(data.shape != (sizes[name],) for name, data in present.items()):
        raise InvalidArtifact("The segments of a delta do not have the sizes its ranks imply.")
    for name, side in (("v_offset", 1), ("u_offset", 2)):
        if name in present:
            present[name] = present[name] - midpoints(kept, side).to(present[name].device)
    return _lay_out(shape, kept, present)


def empty_delta(h_out: int, h_in: int) -> PackedDelta:
    """A delta of rank 0, to which a bias delta can be added."""
    words = torch.zeros(0, dtype=torch.int32)
    return pack_delta((h_out, h_in), [], s=torch.zeros(0), v=words, u=words)


def midpoints(groups: Sequence[Group], side: int) -> Tensor:
    """Midpoint of each rank's codes, (rank,) float32; `side` is the index of a width in `Group`."""
    return torch.tensor([(2 ** group[side] - 1) / 2 for group in groups for _ in range(group[0])])


def _lay_out(
    shape: tuple[int, int], groups: tuple[Group, ...], contents: dict[str, Tensor]
) -> PackedDelta:
    tiles, blocks, bounds = _tiles_and_blocks(shape, groups, _aligned(len(contents["v"])))
    contents["tiles"] = torch.tensor(tiles, dtype=torch.int32).flatten()
    contents["blocks"] = torch.tensor(blocks, dtype=torch.int32).flatten()
    regions: dict[str, Region] = {}
    end = 0
    for name, data in contents.items():
        regions[name] = Region(end, len(data))
        end += _aligned(len(data))
    # Also a delta of rank 0 has an address.
    end = max(end, len(contents["v"]) + SLACK_WORDS if groups else ALIGNMENT_WORDS)
    words = torch.zeros(end, dtype=torch.int32, device=contents["v"].device)
    for name, data in contents.items():
        begin, size = regions[name]
        bits = data if data.dtype == torch.int32 else data.float().contiguous().view(torch.int32)
        words[begin : begin + size] = bits
    return PackedDelta(*shape, groups, words, regions, bounds)


def _tiles_and_blocks(
    shape: tuple[int, int], groups: Sequence[Group], u_begin: int
) -> tuple[list[list[int]], list[list[int]], tuple[int, ...]]:
    """The tiles, the expand kernel's blocks by plane, and each plane's bounds."""
    h_out, h_in = shape
    tiles: list[list[int]] = []
    blocks: dict[int, list[list[int]]] = {plane: [] for plane in PLANES}
    rank, v_word, u_word = 0, 0, u_begin
    for count, v_bits, u_bits in groups:
        v_starts = _plane_starts(v_word, count, h_in, v_bits)
        u_starts = _plane_starts(u_word, count, h_out, u_bits)
        first_tile = len(tiles)
        for first in range(0, count, TILE_RANKS):
            fields = [v_bits, rank + first, min(TILE_RANKS, count - first)]
            fields += _words_of(first, h_in, v_starts)
            fields += [u_bits, *_words_of(first, h_out, u_starts)]
            tiles.append(fields + [0] * (TILE_FIELDS - len(fields)))
        above = 0
        for plane, start in u_starts.items():
            weight = (127 - above) << 23  # of float32's bits, 2**-above
            above += plane
            for number, first in enumerate(range(0, count, TILE_RANKS), first_tile):
                word = start + first * plane_words(h_out, plane)
                ranks = min(TILE_RANKS, count - first)
                blocks[plane].append([number, ranks, word, weight])
        rank += count
        v_word += segment_words(count, h_in, v_bits)
        u_word += segment_words(count, h_out, u_bits)
    bounds = [0]
    for plane in PLANES:
        bounds.append(bounds[-1] + len(blocks[plane]))
    return tiles, [block for plane in PLANES for block in blocks[plane]], tuple(bounds)


def _plane_starts(word: int, count: int, columns: int, bits: int) -> dict[int, int]:
    """The first word of each plane of a group's segment that begins at `word`."""
    starts = {}
    for plane in planes(bits):
        starts[plane] = word
        word += count * plane_words(columns, plane)
    return starts


def _words_of(rank: int, columns: int, starts: dict[int, int]) -> list[int]:
    """The first word of a group's rank in each of `PLANES`; 0 for planes that it lacks."""
    return [
        starts[plane] + rank * plane_words(columns, plane) if plane in starts else 0
        for plane in PLANES
    ]


class DeltaTable:
    """The deltas of one linear, or of several that share an input (q, k, v; gate, up), by slot.

    Slot 0 is the bare base and stays empty. The table stores the addresses of the deltas' words,
    so deltas of different sizes share a table without padding. Its own buffers never move.

    Attributes:
        addresses: (slots, linears) int64, address of each delta's words.
        descriptors: (slots, linears, DESCRIPTOR_FIELDS) int32.
        output_tiles: (tiles, OUTPUT_TILE_FIELDS) int32, tiles of all linears' outputs, for each of
            `TILE_COLUMNS`.
        max_tiles: maximum tiles of ranks of a slot's deltas.
        padded_h_in: `h_in` rounded up to a multiple of `H_IN_ALIGNMENT`.
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
        """Allocate an empty table.

        Args:
            slots: slots, including slot 0.
            h_in: inputs of the linears.
            h_outs: outputs of each linear, concatenated in y in this order.
            max_rank: maximum total rank of a slot's deltas.
            device: device of the deltas.
        """
        self.h_in, self.h_outs, self.max_rank = h_in, tuple(h_outs), max_rank
        self.linears, self.slot_count = len(self.h_outs), slots
        self.padded_h_in = -(-h_in // H_IN_ALIGNMENT) * H_IN_ALIGNMENT
        self.addresses = torch.zeros(slots, self.linears, dtype=torch.int64, device=device)
        empty = torch.tensor(_EMPTY_DESCRIPTOR, dtype=torch.int32, device=device)
        self.descriptors = empty.repeat(slots, self.linears, 1)
        self.max_tiles = min(max_rank, max_rank // TILE_RANKS + MOST_GROUPS * self.linears)
        self.output_tiles = {
            columns: torch.tensor(self._output_tiles(columns), dtype=torch.int32, device=device)
            for columns in TILE_COLUMNS
        }
        self.cpu_plan: EmbeddingBagPlan | None = None
        """The embedding-bag plan of the latest step on a CPU."""
        self.deltas: dict[int, tuple[PackedDelta | None, ...]] = {}
        """The deltas of each occupied slot, one per linear; None: the linear is unchanged."""

    def _output_tiles(self, columns: int) -> list[tuple[int, int, int, int]]:
        begins = [sum(self.h_outs[:linear]) for linear in range(self.linears)]
        return [
            (linear, tile, begins[linear], h_out)
            for linear, h_out in enumerate(self.h_outs)
            for tile in range(-(-h_out // columns))
        ]

    @property
    def h_out(self) -> int:
        """Total outputs of all linears."""
        return sum(self.h_outs)

    def install(self, slot: int, *deltas: PackedDelta | None) -> None:
        """Use `deltas`, one per linear and on the table's device, for the rows of `slot`.

        The table references the deltas until they are removed or replaced.

        Raises:
            TooLarge: the total rank exceeds `max_rank`.
            ValueError: a shape or device differs from the table's, or the slot is out of range.
        """
        if not 0 < slot < self.slot_count:
            raise ValueError(f"Slot {slot} is not one of 1 to {self.slot_count - 1}.")
        if len(deltas) != self.linears:
            raise ValueError(f"The table is of {self.linears} linears.")
        descriptors, addresses, tiles = [], [], 0
        for delta, h_out in zip(deltas, self.h_outs, strict=True):
            if delta is None:
                descriptors.append((0, tiles, *_EMPTY_DESCRIPTOR[2:]))
                addresses.append(0)
                continue
            if (delta.h_out, delta.h_in) != (h_out, self.h_in):
                raise ValueError("The delta belongs to a linear of another shape.")
            if delta.words.device != self.addresses.device:
                raise ValueError("Move the delta to the table's device first.")
            descriptors.append(_descriptor(delta, tiles))
            addresses.append(delta.words.data_ptr())
            tiles += delta.tile_count
        rank = sum(delta.rank for delta in deltas if delta is not None)
        if rank > self.max_rank or tiles > self.max_tiles:
            raise TooLarge("The delta has more ranks than this table holds.")
        _write(self.descriptors[slot], descriptors)
        _write(self.addresses[slot], addresses)
        self.deltas[slot] = deltas

    def remove(self, slot: int) -> None:
        """Empty a slot, once no running kernel reads it."""
        _write(self.descriptors[slot], [_EMPTY_DESCRIPTOR] * self.linears)
        self.deltas.pop(slot, None)
        self.cpu_plan = None  # it references rows of the pool


def _write(target: Tensor, values: Sequence[Any]) -> None:
    """Copy numbers to a device, in the order of the current stream; the host does not wait."""
    source = torch.tensor(values, dtype=target.dtype, pin_memory=target.is_cuda)
    target.copy_(source, non_blocking=True)


def _descriptor(delta: PackedDelta, first_tile: int) -> tuple[int, ...]:
    offsets = [
        delta.regions[name].begin if name in delta.regions else -1 for name in _DESCRIBED_REGIONS
    ]
    v_planes = reduce(or_, (group.v_bits for group in delta.groups), 0)
    return (delta.tile_count, first_tile, *offsets, *delta.block_bounds, v_planes)
