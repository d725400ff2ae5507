"""What a delta does to one tensor of the base.

PackedDelta   an `svd` matrix, packed as in the artifact; computed by `kernels.svd_delta`
LowRank       LoRA-style factors in the model's dtype: two products per slot
RowsDelta     a `rows` matrix, with the artifact's packed words
EncodedDelta  a matrix of any other encoding, as in the artifact
Tensor        replaces the base's tensor
NewRows       one of these, and rows that the base's tensor lacks

Encoded matrices are decoded to a dense difference at use and cached in `TensorCache` while there
is room: a product then costs as much as the base's, and the first use of a delta the decoding.
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
    """A weight difference in the artifact's encoding, in host memory.

    Attributes:
        shape: the tensor's.
        nbytes: bytes held.
    """

    def __init__(
        self, encoded: Encoded, device: torch.device | str = "cpu", dtype: torch.dtype | None = None
    ) -> None:
        """Take ownership of `encoded`, copied from the file; decode to this device and dtype."""
        self.shape = torch.Size(encoded.record["shape"])
        self.nbytes = encoded.nbytes
        self._encoded, self._device, self._dtype = encoded, device, dtype

    def to(self, device: torch.device, dtype: torch.dtype) -> "EncodedDelta":
        """The same delta, decoded to another device and dtype."""
        return EncodedDelta(self._encoded, device, dtype)

    def dense(self) -> Tensor:
        """The difference, in the tensor's shape."""
        return torch.from_numpy(decode_dense(self._encoded)).to(self._device, self._dtype)


class _RowBlock(NamedTuple):
    """Consecutive stored rows of one width."""

    first: int
    """First stored row."""
    rows: int
    bits: int
    word: int
    """Offset of the block's words in `codes`."""


class RowsDelta:
    """A matrix difference whose rows are quantized directly, on the model's device.

    Attributes:
        shape: the matrix's.
        nbytes: bytes held.
    """

    def __init__(self, record: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        """Take a `rows` record and its tensors: `codes` int32, `scale` (stored rows) float32,
        `place` (rows) int32, each row's index among the stored rows or -1, and `column_scale`
        float32 if the record has one."""
        self.shape = torch.Size(record["shape"])
        self._record, self._tensors = record, tensors
        self.nbytes = sum(tensor.nbytes for tensor in tensors.values())
        self._blocks = []
        first = word = 0
        for run in record["runs"]:
            self._blocks.append(_RowBlock(first, run["count"], run["bits"], word))
            first += run["count"]
            word += segment_words(run["count"], self.shape[1], run["bits"])

    @classmethod
    def of(cls, encoded: Encoded) -> "RowsDelta":
        """Copy a `rows` matrix, not deflated, from the file.

        Raises:
            InvalidArtifact: the stored row numbers are not distinct.
        """
        record, segments = encoded.record, encoded.segments
        numbers, scale = stored_rows(encoded)
        place = np.full(record["shape"][0], -1, np.int32)
        place[numbers] = np.arange(len(numbers), dtype=np.int32)
        codes = np.array(segments["codes"].view(np.int32))
        arrays = {"codes": codes, "scale": np.array(scale), "place": place}
        if record.get("column_scale"):
            arrays["column_scale"] = segments["column_scale"].astype(np.float32)
        return cls(record, {name: torch.from_numpy(array) for name, array in arrays.items()})

    def to(self, device: torch.device) -> "RowsDelta":
        """Copy to another device."""
        return RowsDelta(
            self._record, {n: tensor.to(device) for n, tensor in self._tensors.items()}
        )

    def pin_memory(self) -> "RowsDelta":
        """Copy to page-locked memory."""
        return RowsDelta(self._record, {n: held.pin_memory() for n, held in self._tensors.items()})

    def rows(self, numbers: Tensor) -> Tensor:
        """Decode rows `numbers` (n,) int64 to (n, columns) float32."""
        columns = self.shape[1]
        place = self._tensors["place"][numbers]
        out = torch.zeros(len(numbers), columns, device=place.device)
        for first, count, bits, word in self._blocks:
            inside = (place >= first) & (place < first + count)
            index = (place - first).clamp(0, count - 1)
            parts, position = [], word
            for plane in planes(bits):
                size = plane_words(columns, plane)
                block = self._tensors["codes"][position : position + count * size]
                parts.append(block.view(count, size)[index].flatten())
                position += count * size
            codes = unpack_codes(torch.cat(parts), len(numbers), columns, bits)
            values = codes - (2**bits - 1) / 2
            values *= self._tensors["scale"][index + first, None]
            out += torch.where(inside[:, None], values, 0)
        scale = self._tensors.get("column_scale")
        return out if scale is None else out * scale

    def dense(self) -> Tensor:
        """Decode all rows: (rows, columns) float32."""
        return self.rows(torch.arange(self.shape[0], device=self._tensors["place"].device))


WeightDelta = PackedDelta | LowRank | RowsDelta | EncodedDelta | Tensor


class NewRows(NamedTuple):
    """A matrix with more rows than the base's."""

    old: WeightDelta | None
    """The delta of the base's rows; None: unchanged."""
    added: Tensor
    """(added rows, columns)"""


TensorDelta = WeightDelta | NewRows
"""Anything that a delta can do to a tensor."""


def nbytes(delta: TensorDelta) -> int:
    """Bytes of memory that a delta holds."""
    if isinstance(delta, NewRows):
        return delta.added.nbytes + (0 if delta.old is None else nbytes(delta.old))
    if isinstance(delta, LowRank):
        return delta.u.nbytes + delta.v.nbytes
    return delta.nbytes


def fits(delta: TensorDelta, shape: torch.Size) -> bool:
    """Whether the delta fits a base tensor of this shape."""
    if isinstance(delta, NewRows):
        same_columns = len(shape) == 2 and delta.added.shape[1:] == shape[1:]
        return same_columns and (delta.old is None or fits(delta.old, shape))
    if isinstance(delta, LowRank):
        u, v = delta
        return (len(u), v.shape[1]) == shape and u.shape[1] == len(v)
    if isinstance(delta, PackedDelta):
        return (delta.h_out, delta.h_in) == shape and delta.rank <= min(shape)
    # A tensor that is not a matrix can only be replaced.
    return delta.shape == shape and (isinstance(delta, Tensor) or len(shape) == 2)


@overload
def place(delta: WeightDelta, device: torch.device, dtype: torch.dtype) -> WeightDelta: ...
@overload
def place(delta: TensorDelta, device: torch.device, dtype: torch.dtype) -> TensorDelta: ...
def place(delta: TensorDelta, device: torch.device, dtype: torch.dtype) -> TensorDelta:
    """Copy a delta to a model's device; what is not encoded, in the model's dtype."""
    if isinstance(delta, NewRows):
        old, added = delta
        return NewRows(
            None if old is None else place(old, device, dtype),
            added.to(device, dtype).contiguous(),
        )
    if isinstance(delta, PackedDelta | RowsDelta):
        return delta.to(device)
    if isinstance(delta, EncodedDelta):
        return delta.to(device, dtype)
    if isinstance(delta, LowRank):
        return LowRank(*(tensor.to(device, dtype).contiguous() for tensor in delta))
    return delta.to(device, dtype).contiguous()


@overload
def pinned(delta: WeightDelta) -> WeightDelta: ...
@overload
def pinned(delta: TensorDelta) -> TensorDelta: ...
def pinned(delta: TensorDelta) -> TensorDelta:
    """Copy a delta to page-locked memory, from which a GPU copies at full speed."""
    if isinstance(delta, NewRows):
        old, added = delta
        return NewRows(None if old is None else pinned(old), added.pin_memory())
    if isinstance(delta, PackedDelta):
        return replace(delta, words=delta.words.pin_memory())
    if isinstance(delta, RowsDelta):
        return delta.pin_memory()
    if isinstance(delta, LowRank):
        return LowRank(*(tensor.pin_memory() for tensor in delta))
    return delta if isinstance(delta, EncodedDelta) else delta.pin_memory()


def low_rank(u: Tensor, s: Tensor, v: Tensor) -> LowRank:
    """Fold the singular values into V: (h_out, r), (r,), (r, h_in)."""
    return LowRank(u.contiguous(), torch.mul(v, s[:, None]).contiguous())
