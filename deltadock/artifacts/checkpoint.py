"""A checkpoint's files and tensors, each identified by SHA-256.

There are two digests:
- `weights_digest`, a Merkle root over the tensors: it does not depend on how weights are sharded
  into files, so that a base is recognized wherever it was downloaded from;
- `digest`, which also covers the files: the key of the blob store and the caches.
"""

import hashlib
import json
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Final, Self

from deltadock.artifacts.container import MAX_TENSORS, StreamingInspector
from deltadock.errors import InvalidCheckpoint, UnsafeFile

CHUNK_BYTES: Final = 1 << 20

PICKLE_SUFFIXES: Final = frozenset({".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt"})
"""Suffixes of PyTorch pickles."""

RUNNABLE_SUFFIXES: Final = PICKLE_SUFFIXES | {".py", ".joblib", ".npy", ".npz", ".h5"}
"""Formats that can run code when opened, or that other loaders prefer to safetensors."""

KNOWN_SUFFIXES: Final = frozenset({".safetensors", ".json", ".txt", ".model", ".jinja", ".md"})

CONFIG: Final = "config.json"
ADAPTER_CONFIG: Final = "adapter_config.json"
"""A PEFT adapter's configuration, in place of `config.json`."""
ADAPTER_TYPE: Final = "peft-adapter"
"""The `model_type` of an adapter's manifest."""


@dataclass(frozen=True, slots=True)
class FileEntry:
    """One file: path inside the checkpoint, size in bytes, SHA-256 (hex)."""

    path: str
    size: int
    sha256: str


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """One tensor: name, safetensors dtype, shape, file, SHA-256 (hex)."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: str
    sha256: str


def check_path(path: str) -> str:
    """Return `path` if it is a safe relative path of a checkpoint file.

    Raises:
        UnsafeFile: the path is absolute or escapes, or the file can run code when opened.
        InvalidCheckpoint: checkpoints have no such files.
    """
    pure = PurePosixPath(path)
    if (
        not path
        or not path.isprintable()
        or len(path.encode()) > 255
        or "\\" in path
        or pure.is_absolute()
        or str(pure) != path
        or any(part.startswith(".") or len(part.encode()) > 200 for part in pure.parts)
    ):
        raise UnsafeFile(f"{path!r} is not a plain relative path inside a checkpoint.")
    if pure.suffix in RUNNABLE_SUFFIXES:
        raise UnsafeFile(
            f"{path!r} is of a kind that can run code when it is opened. Save the model with "
            "save_pretrained(..., safe_serialization=True) and upload the .safetensors files."
        )
    if pure.suffix not in KNOWN_SUFFIXES:
        raise InvalidCheckpoint(
            f"{path!r} is not a file of a Hugging Face checkpoint; leave it out. "
            f"Accepted are {', '.join(sorted(KNOWN_SUFFIXES))}."
        )
    return path


def merkle_root(tensors: Iterable[TensorEntry]) -> str:
    """The weights digest: SHA-256 (hex) over the tensors' hashed leaves, sorted by name."""
    root = hashlib.sha256()
    for tensor in sorted(tensors, key=lambda entry: entry.name):
        leaf = json.dumps([tensor.name, tensor.dtype, list(tensor.shape), tensor.sha256])
        root.update(hashlib.sha256(leaf.encode()).digest())
    return root.hexdigest()


@dataclass(frozen=True, slots=True)
class CheckpointManifest:
    """A checkpoint's files and tensors, both sorted by name, and its parsed config.json.

    For a PEFT adapter, `config` is `adapter_config.json` with `ADAPTER_TYPE` as `model_type`.
    """

    files: tuple[FileEntry, ...]
    tensors: tuple[TensorEntry, ...]
    config: dict[str, Any]

    @property
    def weights_digest(self) -> str:
        """SHA-256 (hex) over the tensors' names, dtypes, shapes and bytes."""
        return merkle_root(self.tensors)

    @property
    def digest(self) -> str:
        """SHA-256 (hex) of the canonical JSON form."""
        return hashlib.sha256(self.to_json()).hexdigest()

    @property
    def total_bytes(self) -> int:
        """Sum of the files' sizes in bytes."""
        return sum(file.size for file in self.files)

    def to_json(self) -> bytes:
        """Canonical JSON: sorted keys, no spaces."""
        return json.dumps(asdict(self), sort_keys=True, separators=(",", ":")).encode()

    @classmethod
    def from_json(cls, raw: bytes) -> Self:
        """Parse the output of `to_json`."""
        parsed = json.loads(raw)
        return cls(
            files=tuple(FileEntry(**entry) for entry in parsed["files"]),
            tensors=tuple(
                TensorEntry(**{**entry, "shape": tuple(entry["shape"])})
                for entry in parsed["tensors"]
            ),
            config=parsed["config"],
        )


def assemble(
    files: list[FileEntry],
    tensors: list[TensorEntry],
    config_json: bytes | None,
    adapter_json: bytes | None = None,
) -> CheckpointManifest:
    """Build the manifest of a checkpoint or a PEFT adapter from its inspected files.

    Args:
        files: all files.
        tensors: the tensors of all safetensors files.
        config_json: the bytes of `config.json`, if present.
        adapter_json: the bytes of `adapter_config.json`; without `config.json` it is an adapter.

    Raises:
        InvalidCheckpoint: there are no weights or no configuration, or a tensor is in two files.
    """
    if config_json is None and adapter_json is None:
        raise InvalidCheckpoint("config.json is missing; a checkpoint folder always has one.")
    if config_json is None:
        config = _parsed(ADAPTER_CONFIG, adapter_json)
        config["model_type"] = ADAPTER_TYPE
    else:
        config = _parsed(CONFIG, config_json)
        if config.get("model_type") == ADAPTER_TYPE:
            raise InvalidCheckpoint(f"{CONFIG} is that of no model; an adapter has none.")
    if not isinstance(config.get("model_type"), str):
        raise InvalidCheckpoint("config.json names no model_type.")
    if not re.fullmatch(r"[A-Za-z0-9._-]{1,64}", config["model_type"]):
        raise InvalidCheckpoint("config.json's model_type is not a plain name.")
    if not tensors:
        raise InvalidCheckpoint("There is no .safetensors file with weights.")
    paths = {file.path for file in files}
    if clash := paths & {str(parent) for path in paths for parent in PurePosixPath(path).parents}:
        raise InvalidCheckpoint(f"{min(clash)!r} is a file and a folder at once.")
    if len(tensors) > MAX_TENSORS:
        raise InvalidCheckpoint(f"The checkpoint has more than {MAX_TENSORS} tensors.")
    names: set[str] = set()
    for tensor in tensors:
        if tensor.name in names:
            raise InvalidCheckpoint(f"Tensor {tensor.name!r} is in two files.")
        names.add(tensor.name)
    return CheckpointManifest(
        files=tuple(sorted(files, key=lambda entry: entry.path)),
        tensors=tuple(sorted(tensors, key=lambda entry: entry.name)),
        config=config,
    )


def _parsed(name: str, text: bytes | None) -> dict[str, Any]:
    try:
        config = json.loads(text or b"")
    except (ValueError, RecursionError) as error:
        raise InvalidCheckpoint(f"{name} is not valid JSON.") from error
    if not isinstance(config, dict):
        raise InvalidCheckpoint(f"{name} is not a JSON object.")
    return config


class FileInspector:
    """Hashes one file of a checkpoint as it streams, and the tensors of a safetensors file."""

    def __init__(self, path: str, non_finite: set[str] | None = None) -> None:
        """`path` is inside the checkpoint; for `non_finite` see `StreamingInspector`."""
        self.path = check_path(path)
        self.size = 0
        self._hash = hashlib.sha256()
        weights = path.endswith(".safetensors")
        self._tensors = StreamingInspector(non_finite) if weights else None

    def update(self, chunk: bytes | bytearray | memoryview) -> None:
        """Process the file's next bytes; raises like `StreamingInspector.update`."""
        self.size += len(chunk)
        self._hash.update(chunk)
        if self._tensors is not None:
            self._tensors.update(chunk)

    def finish(self) -> tuple[FileEntry, list[TensorEntry]]:
        """The entries of the file and its tensors; raises if a safetensors file ended early."""
        entry = FileEntry(self.path, self.size, self._hash.hexdigest())
        if self._tensors is None:
            return entry, []
        header, digests = self._tensors.finish()
        return entry, [
            TensorEntry(spec.name, spec.dtype, spec.shape, self.path, digests[spec.name])
            for spec in header.tensors
        ]


def scan_folder(folder: Path, non_finite: set[str] | None = None) -> CheckpointManifest:
    """The manifest of a checkpoint folder on disk; every byte is read once.

    Files that are not part of a checkpoint (hidden files, READMEs, other formats) are skipped.

    Args:
        folder: contains config.json and safetensors files.
        non_finite: if given, names of tensors with NaN or infinities are added to it.

    Raises:
        InvalidCheckpoint: the folder is not a complete safetensors checkpoint.
        UnsafeFile: its only weights are PyTorch pickles.
    """
    if not folder.is_dir():
        raise InvalidCheckpoint(f"{folder} is not a folder with a Hugging Face checkpoint.")
    files: list[FileEntry] = []
    tensors: list[TensorEntry] = []
    for path in sorted(folder.iterdir()):
        if path.name.startswith(".") or path.suffix not in KNOWN_SUFFIXES - {".md"}:
            continue
        if not path.is_file():
            continue
        inspector = FileInspector(path.name, non_finite)
        with path.open("rb") as stream:
            while chunk := stream.read(CHUNK_BYTES):
                inspector.update(chunk)
        file, file_tensors = inspector.finish()
        files.append(file)
        tensors.extend(file_tensors)
    if not tensors and any(path.suffix in PICKLE_SUFFIXES for path in folder.iterdir()):
        raise UnsafeFile(
            f"{folder} holds its weights only as PyTorch pickles, which can run code when opened. "
            "Save the model again with safe_serialization=True."
        )
    config = folder / CONFIG
    if not config.is_file() and (folder / ADAPTER_CONFIG).is_file():
        raise InvalidCheckpoint(
            f"{folder} is a PEFT adapter and no whole model; the method 'lora' imports it."
        )
    return assemble(files, tensors, config.read_bytes() if config.is_file() else None)
