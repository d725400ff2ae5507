"""Writing a delta file.

The same inputs give the same bytes: keys are sorted, nothing depends on time or machine.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from deltadock.artifacts.container import header_length, parse_header
from deltadock.artifacts.encoding import NUMPY_DTYPES, Encoded, expected_segments
from deltadock.artifacts.manifest import readable_format
from deltadock.errors import MalformedSafetensors

ALIGNMENT: Final = 128

Segments = dict[str, tuple[str, npt.NDArray[Any]]]
"""Full name -> (safetensors dtype, data)."""


def pack_container(segments: Segments, metadata: Mapping[str, str]) -> tuple[bytes, list[str]]:
    """The head of a safetensors file, and the order in which the segments' data follows it.

    The data begins at a multiple of 128 bytes. Segments whose size keeps that alignment come
    first, the others after them with the widest dtypes leading, so each is aligned for its dtype.

    Raises:
        MalformedSafetensors: a name has no UTF-8.
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
        # Without escapes, whose spelling no hash would cover.
        raw = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise MalformedSafetensors("A tensor's name has no UTF-8.") from error
    raw += b" " * (-(8 + len(raw)) % ALIGNMENT)
    return len(raw).to_bytes(8, "little") + raw, order


def _collect(tensors: Mapping[str, Encoded]) -> tuple[Segments, dict[str, dict[str, Any]]]:
    segments: Segments = {}
    records: dict[str, dict[str, Any]] = {}
    for name, encoded in sorted(tensors.items()):
        expected = expected_segments(encoded.record)
        hashes = {}
        for key, data in sorted(encoded.segments.items()):
            dtype = expected[key][0]
            stored = np.asarray(data, order="C").view(NUMPY_DTYPES[dtype])
            segments[f"{name}:{key}"] = (dtype, stored)
            hashes[key] = hashlib.sha256(stored.tobytes()).hexdigest()
        records[name] = {**encoded.record, "sha256": hashes}
    return segments, records


def write_artifact(path: Path, tensors: Mapping[str, Encoded], manifest: Mapping[str, Any]) -> None:
    """Write a delta file; it appears under `path` complete or not at all.

    Args:
        path: where to write.
        tensors: every tensor that differs from the base, by name.
        manifest: everything but the tensors' records, JSON-able (see docs/format.md). One that
            was read, with records as they were read, gives the file that it was read from.

    Raises:
        InvalidArtifact: the manifest names a format that this version does not know.
        MalformedSafetensors: the manifest or a name is longer than any reader accepts.
    """
    segments, records = _collect(tensors)
    document = json.dumps(
        {**manifest, "tensors": records}, sort_keys=True, separators=(",", ":"), allow_nan=False
    )
    head, order = pack_container(
        segments,
        {
            "format": readable_format(manifest),
            "manifest": document,
            "manifest_sha256": hashlib.sha256(document.encode()).hexdigest(),
        },
    )
    # What no reader would open must not be called an artifact.
    parse_header(head[8 : 8 + header_length(head[:8])])
    partial = path.with_name(path.name + ".partial")
    try:
        with partial.open("wb") as stream:
            stream.write(head)
            for name in order:
                stream.write(segments[name][1].tobytes())
            stream.flush()
            os.fsync(stream.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
