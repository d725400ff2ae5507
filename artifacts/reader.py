"""Reading a delta file: lazy, memory-mapped, numpy only.

Opening validates the container's header and holds every record against its segments; no tensor
data is read until it is asked for.
"""

import base64
import contextlib
import hashlib
import json
import mmap
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any, Final, NoReturn, Self

import numpy as np
import numpy.typing as npt

from artifacts.checkpoint import check_path
from artifacts.container import Header, header_length, parse_header
from artifacts.encoding import (
    FACTORED,
    NUMPY_DTYPES,
    Encoded,
    Factors,
    FloatArray,
    decode_dense,
    decode_factors,
    expected_segments,
    inflated,
)
from artifacts.writer import FORMAT
from deltadock.errors import InvalidArtifact, InvalidCheckpoint, MalformedSafetensors

REQUIRED_KEYS: Final[Mapping[str, type | tuple[type, ...]]] = {
    "base_digest": str,
    "method": str,
    "tensors": dict,
    "files": dict,
    "checkpoint_bytes": int,
    "parameters": int,
    "nominal_bits": (int, float, type(None)),
}


class Artifact:
    """An open delta file; use it as a context manager or call `close`.

    Attributes:
        path: the file.
        manifest: the manifest as parsed; keys this version does not know are kept.
        records: each changed tensor's record, by name; a tensor without one equals the base's.
    """

    def __init__(self, path: Path) -> None:
        """Open `path`.

        Raises:
            InvalidArtifact: not a delta file, of a newer major version, or inconsistent.
        """
        self.path = path
        try:
            with path.open("rb") as stream:
                self.nbytes = stream.seek(0, 2)
                stream.seek(0)
                length = header_length(stream.read(8))
                self._header = parse_header(stream.read(min(length, self.nbytes)))
                if (8 + length, self._header.file_bytes) != (self._header.data_offset, self.nbytes):
                    raise MalformedSafetensors(
                        f"{self._header.file_bytes} bytes announced, {self.nbytes} there."
                    )
                self._map = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
        except MalformedSafetensors as error:
            raise InvalidArtifact(f"{path.name} is not a whole delta file: {error}") from error
        except FileNotFoundError as error:
            raise InvalidArtifact(f"There is no file {path}.") from error
        self.manifest = _parse_manifest(path, self._header)
        self.records: Mapping[str, dict[str, Any]] = self.manifest["tensors"]
        self._specs = {spec.name: spec for spec in self._header.tensors}
        self._check_segments()

    @classmethod
    def open(cls, path: Path) -> Self:
        """Open `path`; the same as `Artifact(path)`."""
        return cls(path)

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
        """Unmap the file, once no array taken from it is alive any more."""
        # Arrays that still point into the map keep it; it goes when the last of them does.
        with contextlib.suppress(BufferError):
            self._map.close()

    @property
    def base_digest(self) -> str:
        """`weights_digest` of the base that the delta belongs to."""
        digest: str = self.manifest["base_digest"]
        return digest

    @cached_property
    def digest(self) -> str:
        """SHA-256 (hex) of the whole file."""
        return hashlib.sha256(self._map).hexdigest()

    def _check_segments(self) -> None:
        announced: set[str] = set()
        for name, record in self.records.items():
            expected = expected_segments(record)
            if not isinstance(record.get("sha256"), dict):
                raise InvalidArtifact(f"{self.path.name}: the record of {name!r} has no hashes.")
            if record["kind"] == "alias":
                self._check_alias(name, record)
            for key, (dtype, shape) in expected.items():
                full = f"{name}:{key}"
                spec = self._specs.get(full)
                if spec is None or (spec.dtype, spec.shape) != (dtype, shape):
                    raise InvalidArtifact(
                        f"{self.path.name}: segment {full!r} is missing or not {dtype} {shape}."
                    )
                announced.add(full)
        if extra := self._specs.keys() - announced:
            raise InvalidArtifact(
                f"{self.path.name}: segment {min(extra)!r} belongs to no tensor of the manifest."
            )

    def _check_alias(self, name: str, record: dict[str, Any]) -> None:
        target = self.records.get(record["of"])
        same = ("shape", "dtype")
        if (
            target is None
            or target.get("kind") == "alias"
            or [target.get(key) for key in same] != [record[key] for key in same]
        ):
            raise InvalidArtifact(
                f"{self.path.name}: {name!r} is an alias of {record['of']!r}, which is no tensor "
                "of its shape and dtype with an encoding of its own."
            )

    def segment(self, full_name: str) -> npt.NDArray[Any]:
        """A segment's data without a copy, in its stored shape; read-only."""
        spec = self._specs[full_name]
        count = int(np.prod(spec.shape, dtype=np.int64))
        data = (
            np.frombuffer(
                self._map, NUMPY_DTYPES[spec.dtype], count, self._header.data_offset + spec.begin
            )
            if count
            else np.empty(0, NUMPY_DTYPES[spec.dtype])
        )
        return data.reshape(spec.shape)

    def encoded(self, name: str) -> Encoded:
        """A tensor's record and segments, as the writer took them."""
        record = self.records[name]
        return Encoded(
            record, {key: self.segment(f"{name}:{key}") for key in expected_segments(record)}
        )

    def tensor_bytes(self, name: str) -> int:
        """Bytes that a tensor takes in the file."""
        keys = expected_segments(self.records[name])
        return sum(self._specs[f"{name}:{key}"].nbytes for key in keys)

    def resolved(self, name: str) -> Encoded:
        """What stands for a tensor: its own encoding, or that of the tensor it is an alias of."""
        record = self.records[name]
        return self.encoded(record["of"] if record["kind"] == "alias" else name)

    def factors(self, name: str) -> Factors:
        """Decoded float32 factors of an `svd` or `low-rank` tensor."""
        encoded = self.resolved(name)
        if encoded.record["kind"] not in FACTORED:
            raise KeyError(f"{name} is stored as {encoded.record['kind']}, not as factors")
        return decode_factors(encoded)

    def exact(self, name: str) -> npt.NDArray[Any]:
        """Raw data of an `exact` tensor in its shape; bfloat16 as uint16, float8 as uint8."""
        encoded = self.resolved(name)
        if encoded.record["kind"] != "exact":
            raise KeyError(f"{name} is stored as {encoded.record['kind']}, not exact")
        return inflated(encoded).segments["data"]

    def dense(self, name: str) -> FloatArray:
        """The whole delta of a tensor, float32, in the tensor's shape.

        Raises:
            InvalidArtifact: the tensor has none: it is exact, or has rows that the base lacks.
        """
        return decode_dense(self.resolved(name))

    def damaged(self) -> Iterator[str]:
        """Full names of the segments whose bytes do not have the manifest's SHA-256."""
        for name, record in self.records.items():
            for key in expected_segments(record):
                data = self.segment(f"{name}:{key}")
                if hashlib.sha256(data.tobytes()).hexdigest() != record["sha256"].get(key):
                    yield f"{name}:{key}"

    def check_intact(self) -> None:
        """Read every segment and hold it against its SHA-256.

        Raises:
            InvalidArtifact: some are damaged; the message counts them and names the first.
        """
        if damaged := list(self.damaged()):
            raise InvalidArtifact(
                f"{self.path.name} is damaged: {len(damaged)} of its segments do not have their "
                f"hash, {damaged[0]!r} first. Fetch it again."
            )


def _parse_manifest(path: Path, header: Header) -> dict[str, Any]:
    version = header.metadata.get("format", "")
    if version != FORMAT:
        advice = "Upgrade Deltadock." if version.startswith("deltadock/") else "Is it a checkpoint?"
        raise InvalidArtifact(
            f"{path.name} has the format {version!r}; this version reads {FORMAT!r}. {advice}"
        )
    try:
        document = header.metadata["manifest"]
        if hashlib.sha256(document.encode()).hexdigest() != header.metadata["manifest_sha256"]:
            raise InvalidArtifact(f"{path.name}: the manifest is damaged. Fetch it again.")
        manifest = json.loads(document, parse_constant=_refuse_constant)
    except (KeyError, ValueError, RecursionError) as error:
        raise InvalidArtifact(f"{path.name} has no readable manifest.") from error
    if not isinstance(manifest, dict):
        raise InvalidArtifact(f"{path.name}: the manifest is not an object.")
    for key, kind in REQUIRED_KEYS.items():
        if key not in manifest or not isinstance(manifest[key], kind):
            raise InvalidArtifact(f"{path.name}: the manifest's {key!r} is missing or wrong.")
    for key in ("checkpoint_bytes", "parameters"):
        if not 0 <= manifest[key] < 2**63:
            raise InvalidArtifact(f"{path.name}: the manifest's {key!r} is impossible.")
    matrices = manifest.get("matrices", {})
    if not isinstance(matrices, dict) or not all(isinstance(m, dict) for m in matrices.values()):
        raise InvalidArtifact(f"{path.name}: the manifest's 'matrices' is wrong.")
    binary = manifest.setdefault("binary_files", {})
    if not isinstance(binary, dict):
        raise InvalidArtifact(f"{path.name}: the manifest's 'binary_files' is wrong.")
    for name, text in [*manifest["files"].items(), *binary.items()]:
        if not _may_carry(name, text):
            raise InvalidArtifact(f"{path.name}: {name!r} is no file that a delta may carry.")
    for name, encoded in binary.items():
        try:
            base64.b64decode(encoded, validate=True)
        except (ValueError, TypeError) as error:
            raise InvalidArtifact(f"{path.name}: {name!r} is not base64.") from error
    return manifest


def _may_carry(name: str, text: object) -> bool:
    """Whether a delta may bring this file: text that lies beside the weights and is not them."""
    if "/" in name or name.endswith((".safetensors", ".safetensors.index.json")):
        return False
    try:
        check_path(name)
        if isinstance(text, str):
            text.encode()
    except (InvalidCheckpoint, UnicodeEncodeError):
        return False
    return isinstance(text, str | None)


def _refuse_constant(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not JSON")
