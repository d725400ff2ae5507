"""Write a delta file.

Output is deterministic: keys are sorted, and nothing depends on the time or the machine.
"""

import hashlib
import json
import os
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy.typing as npt

from deltadock.artifacts.container import header_length, parse_header
from deltadock.artifacts.encodings import Encoded
from deltadock.artifacts.manifest import readable_format
from deltadock.artifacts.serial import named_segments, pack_header


def _layout(
    tensors: Mapping[str, Encoded], manifest: Mapping[str, Any]
) -> tuple[bytes, list[npt.NDArray[Any]]]:
    """The header of a delta file, and the arrays that follow it in this order."""
    segments = named_segments(tensors)
    hashes: dict[str, dict[str, str]] = defaultdict(dict)
    for full_name, (_, data) in segments.items():
        name, _, key = full_name.rpartition(":")
        hashes[name][key] = hashlib.sha256(data.tobytes()).hexdigest()
    records = {
        name: {**encoded.record, "sha256": hashes[name]} for name, encoded in tensors.items()
    }
    document = json.dumps(
        {**manifest, "tensors": records}, sort_keys=True, separators=(",", ":"), allow_nan=False
    )
    header, order = pack_header(
        segments,
        {
            "format": readable_format(manifest),
            "manifest": document,
            "manifest_sha256": hashlib.sha256(document.encode()).hexdigest(),
        },
    )
    return header, [segments[name][1] for name in order]


def artifact_bytes(tensors: Mapping[str, Encoded], manifest: Mapping[str, Any]) -> int:
    """Size in bytes of the file that `write_artifact` writes for these arguments."""
    header, arrays = _layout(tensors, manifest)
    return len(header) + sum(data.nbytes for data in arrays)


def write_artifact(path: Path, tensors: Mapping[str, Encoded], manifest: Mapping[str, Any]) -> None:
    """Write a delta file atomically.

    Args:
        path: where to write.
        tensors: every tensor that differs from the base, by name.
        manifest: everything but the tensors' records, JSON-able (see docs/format.md). Writing a
            manifest and tensors that were read reproduces their file byte for byte.

    Raises:
        InvalidArtifact: the manifest names a format that this version does not know.
        MalformedSafetensors: the manifest or a name exceeds the limits of readers.
    """
    header, arrays = _layout(tensors, manifest)
    # Fail before writing a file that no reader would open.
    parse_header(header[8 : 8 + header_length(header[:8])])
    partial = path.with_name(path.name + ".partial")
    try:
        with partial.open("wb") as stream:
            stream.write(header)
            for data in arrays:
                stream.write(data.tobytes())
            stream.flush()
            os.fsync(stream.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
