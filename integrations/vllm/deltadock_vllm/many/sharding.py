"""A tensor-parallel rank's part of a matrix's delta; of a packed one whole words, not unpacked.

Vectors of V run along h_in and those of U along h_out, each plane of a vector padded to whole
words. A part that begins and ends at multiples of 32 codes is whole words in a plane of any width.
"""

import math

import torch
from torch import Tensor

from deltadock.inference.model.weight_deltas import (
    EncodedDelta,
    LowRank,
    RowsDelta,
    WeightDelta,
)
from deltadock.kernels.svd_delta import PackedDelta, pack_delta, reference
from deltadock.kernels.svd_delta.layout import plane_words, planes, segment_words

WORD_CODES = 32


class DensePart:
    """Rows and columns of a delta that cannot be cut as it is stored: cut where it is decoded.

    Attributes:
        shape: of the part.
    """

    def __init__(
        self, whole: EncodedDelta | RowsDelta | PackedDelta, rows: slice, columns: slice
    ) -> None:
        self.whole = whole
        self._rows, self._columns = rows, columns
        self.shape = torch.Size([rows.stop - rows.start, columns.stop - columns.start])

    def moved(self, whole: EncodedDelta | RowsDelta | PackedDelta) -> "DensePart":
        """The same part of a delta that lies elsewhere."""
        return DensePart(whole, self._rows, self._columns)

    def dense(self) -> Tensor:
        """The difference of the part."""
        whole = self.whole
        values = reference.dense(whole) if isinstance(whole, PackedDelta) else whole.dense()
        return values[self._rows, self._columns].contiguous()


PartDelta = WeightDelta | DensePart
"""What a rank holds of a tensor's delta."""


def part(delta: WeightDelta, rows: slice, columns: slice) -> PartDelta:
    """The delta of `rows` (outputs) and `columns` (inputs) of a matrix; slices have both ends."""
    if isinstance(delta, PackedDelta):
        shape = (delta.h_out, delta.h_in)
    elif isinstance(delta, LowRank):
        shape = (len(delta.u), delta.v.shape[1])
    else:
        shape = (delta.shape[0], delta.shape[1])
    if (rows, columns) == (slice(0, shape[0]), slice(0, shape[1])):
        return delta
    if isinstance(delta, Tensor):
        return delta[rows, columns].contiguous()
    if isinstance(delta, LowRank):
        return LowRank(delta.u[rows].contiguous(), delta.v[:, columns].contiguous())
    if (
        isinstance(delta, PackedDelta)
        and _in_words(rows, shape[0])
        and _in_words(columns, shape[1])
    ):
        return packed_part(delta, rows, columns)
    return DensePart(delta, rows, columns)


def _in_words(part: slice, size: int) -> bool:
    begin, end = int(part.start), int(part.stop)
    return begin % WORD_CODES == 0 and (end % WORD_CODES == 0 or end == size)


def packed_part(delta: PackedDelta, rows: slice, columns: slice) -> PackedDelta:
    """Cut a packed delta at multiples of 32, or at its end.

    Its words are copied, never unpacked. A bias is cut with the rows.
    """
    shape = (rows.stop - rows.start, columns.stop - columns.start)
    found = pack_delta(
        shape, delta.groups, s=delta.s,
        v=_side(delta, "v", delta.h_in, columns), u=_side(delta, "u", delta.h_out, rows),
        v_zero=_zeros(delta, "v"), u_zero=_zeros(delta, "u"),
        row_scale=_cut(delta, "row_scale", rows),
        column_scale=_cut(delta, "column_scale", columns),
    )  # fmt: skip
    bias = delta.floats("bias")
    return found if bias is None else found.with_bias(bias[rows])


def _cut(delta: PackedDelta, name: str, where: slice) -> Tensor | None:
    whole = delta.floats(name)
    return None if whole is None else whole[where]


def _zeros(delta: PackedDelta, name: str) -> Tensor | None:
    """The zero points, if they are stored; else the codes are centred."""
    return None if f"{name}_offset" not in delta.regions else reference.zero_points(delta, name)


def _side(delta: PackedDelta, name: str, length: int, where: slice) -> Tensor:
    """The words of a side's vectors of `length` codes, from `where.start` to `where.stop`."""
    words, number = delta.integers(name), reference.SIDES[name]
    found: list[Tensor] = []
    begin = 0
    for group in delta.groups:
        bits, position, taken = group[number], begin, 0
        for plane in planes(bits):
            width = plane_words(length, plane)
            block = words[position : position + group.ranks * width].view(group.ranks, width)
            first, last = where.start * plane // 32, math.ceil(where.stop * plane / 32)
            found.append(block[:, first:last].flatten())
            taken += len(found[-1])
            position += group.ranks * width
        padding = segment_words(group.ranks, where.stop - where.start, bits) - taken
        found.append(words.new_zeros(padding))
        begin += segment_words(group.ranks, length, bits)
    return torch.cat(found) if found else words[:0]
