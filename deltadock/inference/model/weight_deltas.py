"""What a delta does to one tensor of the base.

PackedDelta   an `svd` matrix, packed as in the artifact: it runs through `kernels.svd_delta`
LowRank       factors as a LoRA adapter has them, in the model's dtype: two products a slot
RowsDelta     a `rows` matrix, its words as in the artifact
EncodedDelta         a matrix of any other kind, as in the artifact
Tensor        takes the place of the base's tensor
NewRows       one of these, and rows that the base's tensor lacks

What is coded is decoded to a dense difference at use, and kept while `TensorCache` has room: a
product costs what the base's own does, and the first use of a delta the decoding.
"""

from dataclasses import replace
from typing import Any, NamedTuple, overload

import numpy as np
import torch
from torch import Tensor

from deltadock.artifacts.encodings import Encoded, decode_dense, stored_rows
from deltadock.kernels.svd_delta import PackedDelta
from deltadock.kernels.svd_delta.layout import plane_words, planes, segment_words
from deltadock.kernels.svd_delta.reference import unpack_codes


class LowRank(NamedTuple):
    """A weight difference `u @ v`; the singular values are folded into `v`."""

    u: Tensor
    """(h_out, rank)"""
    v: Tensor
    """(rank, h_in)"""


class EncodedDelta:
    """A weight difference as the artifact codes it, in host memory.

    Attributes:
        shape: the tensor's.
        nbytes: bytes held.
    """

    def __init__(
        self, encoded: Encoded, device: torch.device | str = "cpu", dtype: torch.dtype | None = None
    ) -> None:
        """Take over `encoded`, whose arrays are not the file's; decode to a device and dtype."""
        self.shape = torch.Size(encoded.record["shape"])
        self.nbytes = encoded.nbytes
        self._encoded, self._device, self._dtype = encoded, device, dtype

    def to(self, device: torch.device, dtype: torch.dtype) -> "EncodedDelta":
        """The same, decoded to a device and dtype."""
        return EncodedDelta(self._encoded, device, dtype)

    def dense(self) -> Tensor:
        """The difference, in the tensor's shape."""
        return torch.from_numpy(decode_dense(self._encoded)).to(self._device, self._dtype)


class _RowBlock(NamedTuple):
    """Stored rows of one width."""

    first: int
    stored: int
    bits: int
    word: int


class RowsDelta:
    """A matrix difference of directly coded rows, on the model's device.

    Attributes:
        shape: the matrix's.
        nbytes: bytes held.
    """

    def __init__(self, record: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        """Take a `rows` record and its tensors: `codes` int32, `scale` (stored rows) float32,
        `place` (rows) int32, the place of each row among the stored, -1 for none; and
        `column_scale` float32 where the record has one."""
        self.shape = torch.Size(record["shape"])
        self._record, self._tensors = record, tensors
        self.nbytes = sum(tensor.nbytes for tensor in tensors.values())
        self._runs = []
        first = word = 0
        for run in record["runs"]:
            self._runs.append(_RowBlock(first, run["count"], run["bits"], word))
            first += run["count"]
            word += segment_words(run["count"], self.shape[1], run["bits"])

    @classmethod
    def of(cls, encoded: Encoded) -> "RowsDelta":
        """A `rows` matrix, not deflated, copied from the file.

        Raises:
            InvalidArtifact: its stored rows are not distinct rows.
        """
        record, segments = encoded.record, encoded.segments
        numbers, scale = stored_rows(encoded)
        place = np.full(record["shape"][0], -1, np.int32)
        place[numbers] = np.arange(len(numbers), dtype=np.int32)
        codes = np.array(segments["codes"].view(np.int32))
        found = {"codes": codes, "scale": np.array(scale), "place": place}
        if record.get("column_scale"):
            found["column_scale"] = segments["column_scale"].astype(np.float32)
        return cls(record, {name: torch.from_numpy(array) for name, array in found.items()})

    def to(self, device: torch.device) -> "RowsDelta":
        """The same on another device."""
        return RowsDelta(
            self._record, {n: tensor.to(device) for n, tensor in self._tensors.items()}
        )

    def pin_memory(self) -> "RowsDelta":
        """The same in page-locked memory."""
        return RowsDelta(self._record, {n: held.pin_memory() for n, held in self._tensors.items()})

    def rows(self, numbers: Tensor) -> Tensor:
        """(n, columns) float32, the rows that `numbers` (n,) int64 names."""
        columns = self.shape[1]
        place = self._tensors["place"][numbers]
        out = torch.zeros(len(numbers), columns, device=place.device)
        for first, count, bits, word in self._runs:
            inside = (place >= first) & (place < first + count)
            own = (place - first).clamp(0, count - 1)
            parts, position = [], word
            for plane in planes(bits):
                size = plane_words(columns, plane)
                block = self._tensors["codes"][position : position + count * size]
                parts.append(block.view(count, size)[own].flatten())
                position += count * size
            codes = unpack_codes(torch.cat(parts), len(numbers), columns, bits)
            values = codes - (2**bits - 1) / 2
            values *= self._tensors["scale"][own + first, None]
            out += torch.where(inside[:, None], values, 0)
        scale = self._tensors.get("column_scale")
        return out if scale is None else out * scale

    def dense(self) -> Tensor:
        """The difference (rows, columns), float32."""
        return self.rows(torch.arange(self.shape[0], device=self._tensors["place"].device))


WeightDelta = PackedDelta | LowRank | RowsDelta | EncodedDelta | Tensor


class NewRows(NamedTuple):
    """A matrix with more rows than the base's."""

    old: WeightDelta | None
    """What becomes of the base's rows; None: nothing."""
    added: Tensor
    """(added rows, columns)"""


TensorDelta = WeightDelta | NewRows
"""All that a delta can do to a tensor."""


def nbytes(change: TensorDelta) -> int:
    """Bytes of memory that a change holds."""
    if isinstance(change, NewRows):
        return change.added.nbytes + (0 if change.old is None else nbytes(change.old))
    if isinstance(change, LowRank):
        return change.u.nbytes + change.v.nbytes
    return change.nbytes


def fits(change: TensorDelta, shape: torch.Size) -> bool:
    """Whether a base's tensor of this shape can have the change."""
    if isinstance(change, NewRows):
        same_columns = len(shape) == 2 and change.added.shape[1:] == shape[1:]
        return same_columns and (change.old is None or fits(change.old, shape))
    if isinstance(change, LowRank):
        u, v = change
        return (len(u), v.shape[1]) == shape and u.shape[1] == len(v)
    if isinstance(change, PackedDelta):
        return (change.h_out, change.h_in) == shape and change.rank <= min(shape)
    # Only a tensor that takes its place fits what is no matrix.
    return change.shape == shape and (isinstance(change, Tensor) or len(shape) == 2)


@overload
def place(change: WeightDelta, device: torch.device, dtype: torch.dtype) -> WeightDelta: ...
@overload
def place(change: TensorDelta, device: torch.device, dtype: torch.dtype) -> TensorDelta: ...
def place(change: TensorDelta, device: torch.device, dtype: torch.dtype) -> TensorDelta:
    """The change in the memory of a model's device; what is in no code, in the model's dtype."""
    if isinstance(change, NewRows):
        old, added = change
        return NewRows(
            None if old is None else place(old, device, dtype),
            added.to(device, dtype).contiguous(),
        )
    if isinstance(change, PackedDelta | RowsDelta):
        return change.to(device)
    if isinstance(change, EncodedDelta):
        return change.to(device, dtype)
    if isinstance(change, LowRank):
        return LowRank(*(tensor.to(device, dtype).contiguous() for tensor in change))
    return change.to(device, dtype).contiguous()


@overload
def pinned(change: WeightDelta) -> WeightDelta: ...
@overload
def pinned(change: TensorDelta) -> TensorDelta: ...
def pinned(change: TensorDelta) -> TensorDelta:
    """The change in page-locked memory, from which a GPU copies at full speed."""
    if isinstance(change, NewRows):
        old, added = change
        return NewRows(None if old is None else pinned(old), added.pin_memory())
    if isinstance(change, PackedDelta):
        return replace(change, words=change.words.pin_memory())
    if isinstance(change, RowsDelta):
        return change.pin_memory()
    if isinstance(change, LowRank):
        return LowRank(*(tensor.pin_memory() for tensor in change))
    return change if isinstance(change, EncodedDelta) else change.pin_memory()


def low_rank(u: Tensor, s: Tensor, v: Tensor) -> LowRank:
    """Fold the singular values into V: (h_out, r), (r,), (r, h_in)."""
    return LowRank(u.contiguous(), torch.mul(v, s[:, None]).contiguous())
