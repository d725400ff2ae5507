"""Finished blocks as bytes: encoded tensors with notes, for a work store."""

import json
from collections.abc import Mapping
from typing import Any

import numpy as np

from deltadock.artifacts.container import header_length, parse_header
from deltadock.artifacts.encoding import NUMPY_DTYPES, Encoded, expected_segments
from deltadock.artifacts.writer import Segments, pack_container


def serialize(tensors: Mapping[str, Encoded], notes: Mapping[str, Any]) -> bytes:
    """Encoded tensors and JSON-able notes as one safetensors blob."""
    segments: Segments = {}
    for name, encoded in sorted(tensors.items()):
        expected = expected_segments(encoded.record)
        for key, data in encoded.segments.items():
            dtype = expected[key][0]
            segments[f"{name}:{key}"] = (
                dtype,
                np.asarray(data, order="C").view(NUMPY_DTYPES[dtype]),
            )
    records = {name: encoded.record for name, encoded in tensors.items()}
    metadata = {"records": json.dumps(records), "notes": json.dumps(dict(notes))}
    head, order = pack_container(segments, metadata)
    return head + b"".join(segments[name][1].tobytes() for name in order)


def deserialize(blob: bytes) -> tuple[dict[str, Encoded], dict[str, Any]]:
    """What `serialize` was given."""
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
