"""Read a delta file lazily, memory-mapped, with numpy only.

Opening validates the header and checks every record against its segments; tensor data is read
on access.
"""

import base64
import contextlib
import hashlib
import mmap
import re
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Final, Self

import numpy as np
import numpy.typing as npt

from deltadock.artifacts.container import header_length, parse_header
from deltadock.artifacts.encodings import (
    FACTORED_ENCODINGS,
    NUMPY_DTYPES,
    DecodedFactors,
    Encoded,
    FloatArray,
    decode_dense,
    decode_factors,
    expected_segments,
    stored_array,
)
from deltadock.artifacts.manifest import file_text, parse_manifest
from deltadock.errors import BaseMismatch, InvalidArtifact, MalformedSafetensors

NON_CANONICAL: Final = re.compile(rb"[\x00-\x1f]|(?<!\\)(?:\\\\)*\\u")
"""Header bytes with an equivalent spelling: a flipped bit in them could go undetected."""


class Artifact:
    """An open delta file; use it as a context manager or call `close`.

    Attributes:
        path: the file.
        nbytes: its size in bytes.
        header: the position of each segment.
        manifest: the parsed manifest; unknown keys are preserved.
        records: each changed tensor's record, by name; a tensor without one equals the base's.
    """

    def __init__(self, path: Path) -> None:
        """Open `path`.

        Raises:
            InvalidArtifact: the file is missing, not a delta file, of another major version, or
                inconsistent.
        """
        self.path = path
        try:
            with path.open("rb") as stream:
                self._read_head(stream)
                self._map = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
        except MalformedSafetensors as error:
            raise InvalidArtifact(f"{path.name} is not a whole delta file: {error}") from error
        except (FileNotFoundError, IsADirectoryError) as error:
            raise InvalidArtifact(f"There is no file {path}.") from error
        try:
            self.manifest = parse_manifest(self.header.metadata)
            self.records: Mapping[str, dict[str, Any]] = self.manifest["tensors"]
            self._specs = {spec.name: spec for spec in self.header.tensors}
            self._check_segments()
        except InvalidArtifact as error:
            self._map.close()
            raise InvalidArtifact(f"{path.name}: {error}") from error

    def _read_head(self, stream: BinaryIO) -> None:
        self.nbytes = stream.seek(0, 2)
        stream.seek(0)
        try:
            length = header_length(stream.read(8))
        except MalformedSafetensors as error:
            raise InvalidArtifact(
                f"{self.path.name} is no delta file, as `deltadock pull` and `deltadock compress` "
                "write them."
            ) from error
        if length > self.nbytes - 8:
            raise MalformedSafetensors("It ends inside its header. Was it cut off?")
        raw = stream.read(length)
        self.header = parse_header(raw)
        if self.header.file_bytes != self.nbytes:
            raise MalformedSafetensors(
                f"{self.header.file_bytes} bytes announced, {self.nbytes} there."
            )
        if NON_CANONICAL.search(raw):
            raise MalformedSafetensors("Its header has control characters or \\u escapes.")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Unmap the file; if arrays still reference it, it is unmapped with the last of them."""
        with contextlib.suppress(BufferError):
            self._map.close()

    @property
    def base_digest(self) -> str:
        """`weights_digest` of the delta's base."""
        digest: str = self.manifest["base_digest"]
        return digest

    def check_base(self, weights_digest: str) -> None:
        """Reject a base other than the delta's.

        Raises:
            BaseMismatch: the digests differ.
        """
        if self.base_digest != weights_digest:
            raise BaseMismatch(
                f"{self.path.name} belongs to the base with weights digest "
                f"{self.base_digest}; this base has {weights_digest}."
            )

    @cached_property
    def files(self) -> Mapping[str, str | None]:
        """Config and tokenizer files that differ from the base's; None: the fine-tune has none."""
        files: Mapping[str, Any] = self.manifest["files"]
        return {name: None if one is None else file_text(one) for name, one in files.items()}

    @property
    def binary_files(self) -> Mapping[str, bytes]:
        """Those of these files that are not text."""
        files: Mapping[str, str] = self.manifest.get("binary_files", {})
        return {name: base64.b64decode(encoded) for name, encoded in files.items()}

    @cached_property
    def digest(self) -> str:
        """SHA-256 (hex) of the whole file."""
        return hashlib.sha256(self._map).hexdigest()

    def _check_segments(self) -> None:
        announced: set[str] = set()
        for name, record in self.records.items():
            expected = expected_segments(record)
            hashes = record.get("sha256")
            if not isinstance(hashes, dict) or hashes.keys() != expected.keys():
                raise InvalidArtifact(f"The record of {name!r} has not a hash for each segment.")
            if record["kind"] == "alias":
                self._check_alias(name, record)
            for key, (dtype, shape) in expected.items():
                full = f"{name}:{key}"
                spec = self._specs.get(full)
                if spec is None or (spec.dtype, spec.shape) != (dtype, shape):
                    raise InvalidArtifact(f"Segment {full!r} is missing or not {dtype} {shape}.")
                announced.add(full)
        if extra := self._specs.keys() - announced:
            raise InvalidArtifact(f"Segment {min(extra)!r} belongs to no tensor of the manifest.")

    def _check_alias(self, name: str, record: dict[str, Any]) -> None:
        target = self.records.get(record["of"])
        same = ("shape", "dtype")
        if (
            not isinstance(target, dict)
            or target.get("kind") == "alias"
            or [target.get(key) for key in same] != [record[key] for key in same]
        ):
            raise InvalidArtifact(
                f"{name!r} is an alias of {record['of']!r:.80}, which is no tensor of its shape "
                "and dtype with an encoding of its own."
            )

    def segment(self, full_name: str) -> npt.NDArray[Any]:
        """A segment's data in its stored shape: a read-only view of the mapped file."""
        spec = self._specs[full_name]
        count = int(np.prod(spec.shape, dtype=np.int64))
        data = (
            np.frombuffer(
                self._map, NUMPY_DTYPES[spec.dtype], count, self.header.data_offset + spec.begin
            )
            if count
            else np.empty(0, NUMPY_DTYPES[spec.dtype])
        )
        return data.reshape(spec.shape)

    def encoded(self, name: str) -> Encoded:
        """A tensor's record and segments, as passed to the writer."""
        record = self.records[name]
        return Encoded(
            record, {key: self.segment(f"{name}:{key}") for key in expected_segments(record)}
        )

    def tensor_bytes(self, name: str) -> int:
        """Bytes of a tensor's segments in the file."""
        keys = expected_segments(self.records[name])
        return sum(self._specs[f"{name}:{key}"].nbytes for key in keys)

    def resolved(self, name: str) -> Encoded:
        """A tensor's encoding, with aliases followed."""
        record = self.records[name]
        return self.encoded(record["of"] if record["kind"] == "alias" else name)

    def factors(self, name: str) -> DecodedFactors:
        """The float32 factors of an `svd` or `low-rank` tensor.

        Raises:
            KeyError: the tensor has another encoding.
        """
        encoded = self.resolved(name)
        if encoded.record["kind"] not in FACTORED_ENCODINGS:
            raise KeyError(f"{name} is stored as {encoded.record['kind']}, not as factors")
        return decode_factors(encoded)

    def exact(self, name: str) -> npt.NDArray[Any]:
        """The data of an `exact` tensor in its shape; bfloat16 as uint16, float8 as uint8.

        Raises:
            KeyError: the tensor has another encoding.
        """
        encoded = self.resolved(name)
        if encoded.record["kind"] != "exact":
            raise KeyError(f"{name} is stored as {encoded.record['kind']}, not exact")
        return stored_array(encoded)

    def dense(self, name: str) -> FloatArray:
        """Decode a tensor's delta to float32, in the tensor's shape.

        Raises:
            InvalidArtifact: the tensor has no delta: it is `exact` or `new-rows`.
        """
        return decode_dense(self.resolved(name))

    def damaged(self) -> Iterator[str]:
        """Full names of the segments whose SHA-256 differs from the manifest's."""
        for name, record in self.records.items():
            for key, sha256 in record["sha256"].items():
                spec = self._specs[f"{name}:{key}"]
                begin = self.header.data_offset + spec.begin
                with memoryview(self._map)[begin : begin + spec.nbytes] as data:
                    if hashlib.sha256(data).hexdigest() != sha256:
                        yield f"{name}:{key}"

    def check_intact(self) -> None:
        """Read every segment and verify its SHA-256.

        Raises:
            InvalidArtifact: segments are damaged; the message counts them and names the first.
        """
        if damaged := list(self.damaged()):
            raise InvalidArtifact(
                f"{self.path.name} is damaged: {len(damaged)} of its segments do not have their "
                f"hash, {damaged[0]!r} first. Fetch it again."
            )
