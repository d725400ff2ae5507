"""Serialize encoded tensors as safetensors: the header's layout, and blobs of finished blocks."""

import json
from collections.abc import Mapping
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from deltadock.artifacts.container import header_length, parse_header
from deltadock.artifacts.encodings import NUMPY_DTYPES, Encoded, expected_segments
from deltadock.errors import MalformedSafetensors

ALIGNMENT: Final = 128

Segments = dict[str, tuple[str, npt.NDArray[Any]]]
"""Full name, `<tensor>:<segment>` -> (safetensors dtype, contiguous data)."""


def named_segments(tensors: Mapping[str, Encoded]) -> Segments:
    """The segments of all tensors by their full names, sorted."""
    segments: Segments = {}
    for name, encoded in sorted(tensors.items()):
        expected = expected_segments(encoded.record)
        for key, data in sorted(encoded.segments.items()):
            dtype = expected[key][0]
            stored = np.asarray(data, order="C").view(NUMPY_DTYPES[dtype])
            segments[f"{name}:{key}"] = (dtype, stored)
    return segments


def pack_header(segments: Segments, metadata: Mapping[str, str]) -> tuple[bytes, list[str]]:
    """Build the header, length prefix included, and the order in which the data follows.

    The data begins at a multiple of 128 bytes. Segments whose size preserves that alignment come
    first, then the others by descending item size, so that each is aligned for its dtype.

    Raises:
        MalformedSafetensors: a name cannot be encoded in UTF-8.
    """
    order = sorted(
        segments,
        key=lambda name: (
            segments[name][1].nbytes % ALIGNMENT != 0,
            -segments[name][1].itemsize,
            name,
        ),
    )
    header: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))}
    position = 0
    for name in order:
        dtype, data = segments[name]
        header[name] = {
            "dtype": dtype,
            "shape": list(data.shape),
            "data_offsets": [position, position + data.nbytes],
        }
        position += data.nbytes
    try:
        # No \u escapes: no hash would cover how a name is spelled.
        raw = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise MalformedSafetensors("A tensor's name has no UTF-8.") from error
    raw += b" " * (-(8 + len(raw)) % ALIGNMENT)
    return len(raw).to_bytes(8, "little") + raw, order


def serialize(tensors: Mapping[str, Encoded], notes: Mapping[str, Any]) -> bytes:
    """Serialize encoded tensors and JSON-able notes to one safetensors blob."""
    segments = named_segments(tensors)
    records = {name: encoded.record for name, encoded in tensors.items()}
    metadata = {"records": json.dumps(records), "notes": json.dumps(dict(notes))}
    header, order = pack_header(segments, metadata)
    return header + b"".join(segments[name][1].tobytes() for name in order)


def deserialize(blob: bytes) -> tuple[dict[str, Encoded], dict[str, Any]]:
    """The tensors and notes passed to `serialize`.

    Raises:
        MalformedSafetensors: the blob has no valid header.
    """
    header = parse_header(blob[8 : 8 + header_length(blob[:8])])
    arrays: dict[str, dict[str, Any]] = {}
    for spec in header.tensors:
        name, _, key = spec.name.rpartition(":")
        begin = header.data_offset + spec.begin
        data = np.frombuffer(blob[begin : begin + spec.nbytes], NUMPY_DTYPES[spec.dtype])
        arrays.setdefault(name, {})[key] = data.reshape(spec.shape)
    records = json.loads(header.metadata["records"])
    tensors = {name: Encoded(record, arrays.get(name, {})) for name, record in records.items()}
    return tensors, json.loads(header.metadata["notes"])
