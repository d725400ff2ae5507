"""Artifacts as torch tensors: stored and merged tensors, packed deltas, segments on a device."""

from collections.abc import Mapping, Sequence
from io import FileIO
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from deltadock.artifacts.encodings import (
    Encoded,
    Vectors,
    decode_dense,
    decode_factors,
    decode_svd,
    inflate,
    parts,
    stored_array,
)
from deltadock.artifacts.reader import Artifact
from deltadock.errors import InvalidArtifact
from deltadock.kernels.svd_delta import Group, PackedDelta, pack_delta

TORCH_DTYPES: Final = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2, "U16": torch.uint16, "I16": torch.int16, "F16": torch.float16,
    "BF16": torch.bfloat16, "U32": torch.uint32, "I32": torch.int32, "F32": torch.float32,
    "U64": torch.uint64, "I64": torch.int64, "F64": torch.float64,
}  # fmt: skip

CHUNK_BYTES: Final = 32 << 20
"""Size of each of the two pinned buffers that `load_segments` copies through."""


def stored_tensor(encoded: Encoded) -> Tensor:
    """A copy of an `exact` tensor, or of the added rows of a `new-rows` tensor.

    Raises:
        InvalidArtifact: the segment does not inflate to the size its record implies.
    """
    array = np.array(stored_array(encoded))
    return torch.from_numpy(array).view(TORCH_DTYPES[encoded.record["dtype"]])


def fits_base(record: Mapping[str, Any], base: Sequence[int]) -> bool:
    """Whether a record applies to a base tensor of this shape; `exact` may have more rows."""
    shape, expected = list(base), _base_shape(record)
    if record["kind"] == "exact" and shape and expected:
        return expected[1:] == shape[1:] and expected[0] >= shape[0]
    return expected == shape


def _base_shape(record: Mapping[str, Any]) -> list[int]:
    """The shape of the base's tensor that a record implies."""
    shape: list[int] = record["shape"]
    return [record["base_rows"], *shape[1:]] if record["kind"] == "new-rows" else shape


def merged_tensor(artifact: Artifact, name: str, base: Tensor) -> Tensor:
    """The fine-tuned tensor: base plus delta, in the fine-tune's dtype.

    The delta is added in float32 and the sum rounded once. A tensor without a record is returned
    unchanged. With an extended vocabulary the result has more rows than the base.

    Raises:
        InvalidArtifact: the record does not fit the base tensor's shape.
    """
    if name not in artifact.records:
        return base
    encoded = artifact.resolved(name)
    if not fits_base(encoded.record, base.shape):
        raise InvalidArtifact(
            f"{artifact.path.name} has {name!r} for a base of the shape "
            f"{_base_shape(encoded.record)}, but the base has it in {list(base.shape)}."
        )
    return apply_delta(encoded, base)


def apply_delta(encoded: Encoded, base: Tensor) -> Tensor:
    """As `merged_tensor`, of one encoding of the base's shape."""
    record = encoded.record
    dtype = TORCH_DTYPES[record["dtype"]]
    if record["kind"] == "exact":
        return stored_tensor(encoded).to(base.device)
    if record["kind"] == "new-rows":
        (part,) = parts(encoded)
        rows = base.to(dtype) if part is None else apply_delta(part, base)
        return torch.cat([rows, stored_tensor(encoded).to(base.device)])
    if base.device.type == "cpu":  # equal bytes on every machine
        return (base.float() + torch.from_numpy(decode_dense(encoded))).to(dtype)
    return (base.float() + decoded_delta(encoded, base.device)).to(dtype)


def decoded_delta(encoded: Encoded, device: torch.device) -> Tensor:
    """The delta of an encoding, float32; codes are dequantized and factors multiplied on `device`.

    Raises:
        InvalidArtifact: as `decode_dense`.
    """
    encoded = inflate(encoded)
    kind, scales = encoded.record["kind"], encoded.segments
    if kind == "svd":
        matrix = decode_svd(encoded)
        u = _dequantized(matrix.u, scales.get("row_scale"), device)
        v = _dequantized(matrix.v, scales.get("column_scale"), device)
        return (u.t() * torch.from_numpy(matrix.s).to(device)) @ v
    if kind == "low-rank":
        factors = decode_factors(encoded)
        u, s, v = (torch.from_numpy(one).to(device) for one in (factors.u, factors.s, factors.v))
        return (u * s) @ v
    return torch.from_numpy(decode_dense(encoded)).to(device)


def _dequantized(vectors: Vectors, scale: npt.NDArray[Any] | None, device: torch.device) -> Tensor:
    """Vectors (r, n) float32, of which each coordinate is scaled."""
    zero = (2.0**vectors.bits - 1) / 2 if vectors.zero is None else vectors.zero
    zeros = torch.from_numpy(zero.astype(np.float32)).to(device)
    values = torch.from_numpy(vectors.codes).to(device).float().sub_(zeros[:, None])
    if scale is not None:
        values *= torch.from_numpy(scale.astype(np.float32)).to(device)
    return values


def packed_delta(encoded: Encoded) -> PackedDelta:
    """Copy an `svd` matrix into the kernels' layout, on the CPU.

    Raises:
        InvalidArtifact: the encoding is not `svd`, or does not inflate.
    """
    if encoded.record["kind"] != "svd":
        raise InvalidArtifact(f"A matrix stored as {encoded.record['kind']!r} has no packed form.")
    inflated = inflate(encoded)
    h_out, h_in = inflated.record["shape"]
    segments = {
        # torch requires writable arrays and supports few operations on uint32.
        name.replace(".", "_"): torch.from_numpy(
            np.array(array.view(np.int32) if array.dtype == np.uint32 else array)
        )
        for name, array in inflated.segments.items()
    }
    groups = [Group(run["count"], run["v_bits"], run["u_bits"]) for run in inflated.record["ranks"]]
    return pack_delta((h_out, h_in), groups, gain=inflated.record.get("gain", 1.0), **segments)


def load_segments(artifact: Artifact, device: torch.device | str) -> dict[str, Tensor]:
    """Every segment by its full name, `<tensor>:<segment>`, in its stored dtype and shape.

    The file's data is read sequentially into one allocation, of which the segments are views.
    For an accelerator, reading the next chunk overlaps with copying the last. Hashes are not
    checked.

    Raises:
        InvalidArtifact: the file has become shorter since it was opened.
    """
    header = artifact.header
    data = torch.empty(header.data_bytes, dtype=torch.uint8, device=device)
    with FileIO(str(artifact.path)) as stream:
        stream.seek(header.data_offset)
        if data.device.type == "cpu":
            _read_into(stream, data)
        else:
            _copy_in_chunks(stream, data)
    segments = {}
    for spec in header.tensors:
        segment = data[spec.begin : spec.end]
        dtype = TORCH_DTYPES[spec.dtype]
        if segment.data_ptr() % dtype.itemsize:
            segment = segment.clone()  # another writer's file: ours aligns every segment
        segments[spec.name] = segment.view(dtype).reshape(spec.shape)
    return segments


def _read_into(stream: FileIO, buffer: Tensor) -> None:
    view = buffer.numpy().data
    while view:
        count = stream.readinto(view)
        if not count:
            raise InvalidArtifact("The delta file became shorter while it was read.")
        view = view[count:]


def _copy_in_chunks(stream: FileIO, data: Tensor) -> None:
    buffers = [torch.empty(CHUNK_BYTES, dtype=torch.uint8, pin_memory=True) for _ in range(2)]
    copies = torch.cuda.current_stream(data.device)
    for number, begin in enumerate(range(0, len(data), CHUNK_BYTES)):
        target = data[begin : begin + CHUNK_BYTES]
        buffer = buffers[number % 2][: len(target)]
        _read_into(stream, buffer)
        copies.synchronize()  # the previous chunk's copy, which overlapped with this read
        target.copy_(buffer, non_blocking=True)
    copies.synchronize()
