"""One linear's delta as the kernels read it: the packed words as the artifact holds them.

A delta is `diag(row_scale) U_hat diag(s) V_hat diag(column_scale)`, with a difference of the bias
beside it. Its ranks lie in groups of equal widths; a group's segment on either side holds one plane
after the other, and the planes of a width are its binary digits (3 = 2+1, 5 = 4+1, 6 = 4+2,
7 = 4+2+1). Plane `p` of a segment is (count, plane_words) 32-bit words, row-major; segments begin
at multiples of 128 bytes. Nothing is repacked on the way to the device: segments, scales and the
lists that tell the kernels' programs where to read are one run of words, and one copy.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final, NamedTuple

import torch
from torch import Tensor

from deltadock.errors import InvalidArtifact

ALIGNMENT_WORDS: Final = 32
PLANES: Final = (8, 4, 2, 1)
TILE_RANKS: Final = 32
"""Ranks of a program of the shrink kernel."""
BLOCK_RANKS: Final = 16
"""Ranks that a warp of the expand kernel takes at a time."""
TILE_FIELDS: Final = 8
"""int32 fields of a tile: v_bits, first rank, ranks, then the first word of each of `PLANES`."""
BLOCK_FIELDS: Final = 4
"""int32 fields of a block: first rank, ranks, first word, bits below the plane."""


class Group(NamedTuple):
    """A run of ranks whose widths are equal on each side."""

    ranks: int
    v_bits: int
    u_bits: int


def planes(bits: int) -> list[int]:
    """The planes of a width, most significant first."""
    return [plane for plane in PLANES if bits & plane]


def plane_words(columns: int, plane: int) -> int:
    """Words that one vector of `columns` codes takes in a plane."""
    return -(-columns * plane // 32)


def segment_words(count: int, columns: int, bits: int) -> int:
    """Words of a group's segment on one side, with the padding to 128 bytes."""
    return _aligned(count * sum(plane_words(columns, plane) for plane in planes(bits)))


def _aligned(words: int) -> int:
    return -(-words // ALIGNMENT_WORDS) * ALIGNMENT_WORDS


class Region(NamedTuple):
    """A part of a delta's words; it begins at a multiple of 128 bytes."""

    begin: int
    size: int


@dataclass(frozen=True, eq=False, slots=True)
class PackedDelta:
    """One linear's delta in the form that the kernels read.

    Attributes:
        h_out, h_in: shape of the linear's weight.
        groups: the ranks, in stored order.
        words: int32, all that a kernel reads of this delta.
        regions: where in `words` each part lies. Always there: `v` and `u`, the segments; `s`
            (rank) float32; `tiles` (n, TILE_FIELDS) and `blocks` (n, BLOCK_FIELDS) int32. Where the
            delta has them, float32: `v_offset` and `u_offset` (rank), what a value is less than
            `code - (2**bits - 1) / 2`; `row_scale` (h_out); `column_scale` (h_in); `bias` (h_out).
        block_bounds: for each of `PLANES` its first block, then the number of blocks.
    """

    h_out: int
    h_in: int
    groups: tuple[Group, ...]
    words: Tensor
    regions: dict[str, Region]
    block_bounds: tuple[int, ...]

    @property
    def rank(self) -> int:
        """Ranks of all groups together."""
        return self.regions["s"].size

    @property
    def tile_count(self) -> int:
        """Tiles of the shrink kernel."""
        return self.regions["tiles"].size // TILE_FIELDS

    @property
    def nbytes(self) -> int:
        """Bytes on the device."""
        return self.words.nbytes

    def integers(self, name: str) -> Tensor:
        """A region's words, int32; a view."""
        begin, size = self.regions[name]
        return self.words[begin : begin + size]

    def numbers(self, name: str) -> Tensor | None:
        """A region's float32 numbers, a view; None if the delta has no such region."""
        return self.integers(name).view(torch.float32) if name in self.regions else None

    @property
    def s(self) -> Tensor:
        """(rank,) float32, a view."""
        return self.integers("s").view(torch.float32)

    def with_bias(self, bias: Tensor) -> "PackedDelta":
        """The same delta with a difference of the bias, (h_out,), beside it; a copy."""
        padding = self.words.new_zeros(_aligned(self.h_out) - self.h_out)
        words = torch.cat([self.words, bias.float().contiguous().view(torch.int32), padding])
        regions = {**self.regions, "bias": Region(len(self.words), self.h_out)}
        return replace(self, words=words, regions=regions)

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> "PackedDelta":
        """The same delta on another device: one contiguous copy."""
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
    parts = {
        "v": v.view(torch.int32),
        "u": u.view(torch.int32),
        "s": s.float() * gain,
        "v_offset": None if v_zero is None else v_zero.float(),
        "u_offset": None if u_zero is None else u_zero.float(),
        "row_scale": row_scale,
        "column_scale": column_scale,
    }
    found = {name: part for name, part in parts.items() if part is not None}
    if any(part.shape != (sizes[name],) for name, part in found.items()):
        raise InvalidArtifact("The segments of a delta do not have the sizes its ranks imply.")
    for name, side in (("v_offset", 1), ("u_offset", 2)):
        if name in found:
            found[name] = found[name] - centres(kept, side).to(found[name].device)
    return _join(shape, kept, found)


def empty_delta(h_out: int, h_in: int) -> PackedDelta:
    """A delta without ranks, for a change of the bias alone."""
    nothing = torch.zeros(0, dtype=torch.int32)
    return pack_delta((h_out, h_in), [], s=torch.zeros(0), v=nothing, u=nothing)


def centres(groups: Sequence[Group], side: int) -> Tensor:
    """(rank,) the middle of each rank's codes; `side` is the width's place in a group."""
    return torch.tensor([(2 ** group[side] - 1) / 2 for group in groups for _ in range(group[0])])


def _join(
    shape: tuple[int, int], groups: tuple[Group, ...], parts: dict[str, Tensor]
) -> PackedDelta:
    tiles, blocks, bounds = _programs(shape, groups, _aligned(len(parts["v"])))
    parts["tiles"] = torch.tensor(tiles, dtype=torch.int32).flatten()
    parts["blocks"] = torch.tensor(blocks, dtype=torch.int32).flatten()
    regions: dict[str, Region] = {}
    end = 0
    for name, part in parts.items():
        regions[name] = Region(end, len(part))
        end += _aligned(len(part))
    # At least one word, so that a delta without ranks has an address too.
    words = torch.zeros(max(end, ALIGNMENT_WORDS), dtype=torch.int32, device=parts["v"].device)
    for name, part in parts.items():
        begin, size = regions[name]
        raw = part if part.dtype == torch.int32 else part.float().contiguous().view(torch.int32)
        words[begin : begin + size] = raw
    return PackedDelta(*shape, groups, words, regions, bounds)


def _programs(
    shape: tuple[int, int], groups: Sequence[Group], u_begin: int
) -> tuple[list[list[int]], list[list[int]], tuple[int, ...]]:
    """The shrink kernel's tiles, and the expand kernel's blocks by plane with their bounds."""
    h_out, h_in = shape
    tiles: list[list[int]] = []
    blocks: dict[int, list[list[int]]] = {plane: [] for plane in PLANES}
    rank, v_word, u_word = 0, 0, u_begin
    for count, v_bits, u_bits in groups:
        starts = dict.fromkeys(PLANES, 0)
        position = v_word
        for plane in planes(v_bits):
            starts[plane] = position
            position += count * plane_words(h_in, plane)
        for first in range(0, count, TILE_RANKS):
            begins = [
                starts[plane] + first * plane_words(h_in, plane) if v_bits & plane else 0
                for plane in PLANES
            ]
            tiles.append([v_bits, rank + first, min(TILE_RANKS, count - first), *begins, 0])
        position, below = u_word, u_bits
        for plane in planes(u_bits):
            below -= plane
            for first in range(0, count, BLOCK_RANKS):
                word = position + first * plane_words(h_out, plane)
                ranks = min(BLOCK_RANKS, count - first)
                blocks[plane].append([rank + first, ranks, word, below])
            position += count * plane_words(h_out, plane)
        rank += count
        v_word += segment_words(count, h_in, v_bits)
        u_word += segment_words(count, h_out, u_bits)
    bounds = [0]
    for plane in PLANES:
        bounds.append(bounds[-1] + len(blocks[plane]))
    return tiles, [block for plane in PLANES for block in blocks[plane]], tuple(bounds)
