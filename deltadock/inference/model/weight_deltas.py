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

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from deltadock.artifacts.encodings import Encoded, decode_dense, stored_rows
from deltadock.kernels.svd_delta import PackedDelta
from deltadock.kernels.svd_delta.layout import ALIGNMENT_WORDS, plane_words, planes, segment_words
from deltadock.kernels.svd_delta.reference import unpack_codes


class LowRank(NamedTuple):
    """A weight difference `u @ v`; the singular values are folded into `v`."""

    u: Tensor
    """(h_out, rank)"""
    v: Tensor
    """(rank, h_in)"""

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return self.u.nbytes + self.v.nbytes


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

    def mapped(self, change: Callable[[Tensor], Tensor]) -> "RowsDelta":
        """The same delta with each of its tensors changed."""
        return RowsDelta(self._record, {n: change(tensor) for n, tensor in self._tensors.items()})

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

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return self.added.nbytes + (0 if self.old is None else self.old.nbytes)


TensorDelta = WeightDelta | NewRows
"""Anything that a delta can do to a tensor."""
DeltaT = TypeVar("DeltaT")


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


def placed(
    deltas: Mapping[str, TensorDelta], device: torch.device, dtype: torch.dtype
) -> dict[str, TensorDelta]:
    """Copy deltas to a model's device; what is not encoded, in the model's dtype.

    Tensors that share memory, as those of `in_one_buffer` do, are one copy. From page-locked memory
    it is not complete on return, but in the order of the current stream.
    """
    copies: dict[int, tuple[Tensor, Tensor]] = {}

    def moved(tensor: Tensor) -> Tensor:
        if tensor.device == device:
            return tensor
        tensor = tensor.contiguous()
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in copies:
            whole = torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(storage)
            copies[storage.data_ptr()] = whole, whole.to(device, non_blocking=True)
        begin = int(tensor.storage_offset()) * tensor.itemsize
        return view_at(copies[storage.data_ptr()][1], begin, tensor)

    def converted(tensor: Tensor) -> Tensor:
        return moved(tensor).to(dtype).contiguous()

    def place(delta: WeightDelta) -> WeightDelta:
        if isinstance(delta, EncodedDelta):
            return delta.to(device, dtype)
        return mapped(delta, moved if isinstance(delta, PackedDelta | RowsDelta) else converted)

    return {
        name: NewRows(None if delta.old is None else place(delta.old), converted(delta.added))
        if isinstance(delta, NewRows)
        else place(delta)
        for name, delta in deltas.items()
    }


def in_one_buffer(
    deltas: Mapping[str, TensorDelta], *, pin_memory: bool = True
) -> dict[str, TensorDelta]:
    """Copy all tensors of deltas to one buffer, page-locked by default: a GPU copies it at once."""
    _, views = buffered(list(deltas.values()), _all_mapped, pin_memory=pin_memory)
    return dict(zip(deltas, views, strict=True))


def buffered(
    deltas: Sequence[DeltaT],
    mapped: Callable[[DeltaT, Callable[[Tensor], Tensor]], DeltaT],
    *,
    pin_memory: bool,
) -> tuple[Tensor, list[DeltaT]]:
    """Copy the tensors that `mapped` finds to one (bytes,) uint8 buffer: it, and views of it.

    A tensor of several deltas is copied once.
    """
    begins: dict[Tensor, int] = {}
    size = 0

    def placed(tensor: Tensor) -> Tensor:
        nonlocal size
        if tensor not in begins:
            begins[tensor] = size
            size += _aligned(tensor.nbytes)
        return tensor

    for delta in deltas:
        mapped(delta, placed)
    buffer = torch.empty(size, dtype=torch.uint8, pin_memory=pin_memory)
    views = {tensor: view_at(buffer, begin, tensor) for tensor, begin in begins.items()}
    for tensor, view in views.items():
        view.copy_(tensor)
    return buffer, [mapped(delta, views.__getitem__) for delta in deltas]


def view_at(buffer: Tensor, begin: int, like: Tensor) -> Tensor:
    """The bytes of a uint8 buffer from `begin` on as a tensor of the same dtype and shape."""
    return buffer[begin : begin + like.nbytes].view(like.dtype).view(like.shape)


def _aligned(size: int) -> int:
    """A size in bytes rounded up to what the kernels take packed words to be aligned to."""
    unit = 4 * ALIGNMENT_WORDS
    return -(-size // unit) * unit


def _all_mapped(delta: TensorDelta, change: Callable[[Tensor], Tensor]) -> TensorDelta:
    """The delta with each of its tensors changed."""
    if isinstance(delta, NewRows):
        old = None if delta.old is None else mapped(delta.old, change)
        return NewRows(old, change(delta.added))
    return mapped(delta, change)


def mapped(delta: WeightDelta, change: Callable[[Tensor], Tensor]) -> WeightDelta:
    """The delta with each of its tensors changed; an encoded one has none."""
    if isinstance(delta, PackedDelta):
        return replace(delta, words=change(delta.words))
    if isinstance(delta, RowsDelta):
        return delta.mapped(change)
    if isinstance(delta, LowRank):
        return LowRank(change(delta.u), change(delta.v))
    return delta if isinstance(delta, EncodedDelta) else change(delta)


def low_rank(u: Tensor, s: Tensor, v: Tensor) -> LowRank:
    """Fold the singular values into V: (h_out, r), (r,), (r, h_in)."""
    return LowRank(u.contiguous(), torch.mul(v, s[:, None]).contiguous())
