"""What a checkpoint is made of: its files and tensors, each named by SHA-256.

Two identities are kept apart:
- `weights_digest`, a Merkle root over the tensors alone: the same weights give the same digest
  however they are sharded into files, so a base is recognised wherever it was downloaded from;
- `digest`, over the files as well: what the blob store and the caches are keyed by.
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
"""What PyTorch's pickles are called."""

RUNNABLE_SUFFIXES: Final = PICKLE_SUFFIXES | {".py", ".joblib", ".npy", ".npz", ".h5"}
"""Formats that run code when opened, or that other loaders would prefer to safetensors."""

KNOWN_SUFFIXES: Final = frozenset({".safetensors", ".json", ".txt", ".model", ".jinja", ".md"})


CONFIG: Final = "config.json"
ADAPTER_CONFIG: Final = "adapter_config.json"
"""What a PEFT adapter's folder has in place of a model's configuration."""
ADAPTER_TYPE: Final = "peft-adapter"
"""The `model_type` that an adapter goes by."""


@dataclass(frozen=True, slots=True)
class FileEntry:
    """One file: its path inside the checkpoint, size in bytes and SHA-256 (hex)."""

    path: str
    size: int
    sha256: str


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """One tensor: name, dtype (safetensors' spelling), shape, the file it is in, SHA-256 (hex)."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: str
    sha256: str


def check_path(path: str) -> str:
    """Return `path` if it is a safe relative path of a kind that checkpoints consist of.

    Raises:
        UnsafeFile: absolute or escaping paths, and files that can run code when opened.
        InvalidCheckpoint: kinds of files that no checkpoint needs.
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
    """Weights digest: SHA-256 (hex) over the tensors' hashed leaves, sorted by name."""
    root = hashlib.sha256()
    for tensor in sorted(tensors, key=lambda entry: entry.name):
        leaf = json.dumps([tensor.name, tensor.dtype, list(tensor.shape), tensor.sha256])
        root.update(hashlib.sha256(leaf.encode()).digest())
    return root.hexdigest()


@dataclass(frozen=True, slots=True)
class CheckpointManifest:
    """A checkpoint's files and tensors, both sorted by name, and its parsed config.json.

    Of a PEFT adapter the configuration is `adapter_config.json`, with `ADAPTER_TYPE` as its
    `model_type`.
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
        """The canonical JSON form: sorted keys, no spaces."""
        return json.dumps(asdict(self), sort_keys=True, separators=(",", ":")).encode()

    @classmethod
    def from_json(cls, raw: bytes) -> Self:
        """The manifest that `to_json` wrote."""
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
    """Put a checkpoint, or a PEFT adapter, together from what was learned of its files.

    Args:
        files: all of them.
        tensors: of all safetensors files.
        config_json: the bytes of `config.json`, if there is one.
        adapter_json: those of `adapter_config.json`: without the other, this is an adapter.

    Raises:
        InvalidCheckpoint: no weights, no configuration, or a tensor in two files.
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
    """Hashes one file of a checkpoint while it streams, and looks inside if it is safetensors."""

    def __init__(self, path: str, non_finite: set[str] | None = None) -> None:
        """Take the file's path; for `non_finite` see `StreamingInspector`."""
        self.path = check_path(path)
        self.size = 0
        self._hash = hashlib.sha256()
        weights = path.endswith(".safetensors")
        self._tensors = StreamingInspector(non_finite) if weights else None

    def update(self, chunk: bytes | bytearray | memoryview) -> None:
        """Take the file's next bytes; raises what `StreamingInspector.update` raises."""
        self.size += len(chunk)
        self._hash.update(chunk)
        if self._tensors is not None:
            self._tensors.update(chunk)

    def finish(self) -> tuple[FileEntry, list[TensorEntry]]:
        """The file's entry and those of its tensors; raises if the file ended early."""
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

    Files that are no part of a checkpoint (hidden files, READMEs, other formats) are left out.

    Args:
        folder: with config.json and safetensors files.
        non_finite: if given, the names of tensors that hold NaN or an infinity are added to it.

    Raises:
        InvalidCheckpoint: the folder holds no complete safetensors checkpoint.
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
        file, found = inspector.finish()
        files.append(file)
        tensors.extend(found)
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
