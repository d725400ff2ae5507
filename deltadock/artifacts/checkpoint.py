"""A checkpoint's files and tensors, each identified by SHA-256.

There are two digests:
- `weights_digest`, a Merkle root over the tensors: it does not depend on how weights are sharded
  into files, so that a base is recognized wherever it was downloaded from;
- `digest`, which also covers the files: the key of the blob store and the caches.
"""

import hashlib
import json
import re
from collections.abc import Collection, Iterable, Iterator
from concurrent.futures import Executor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any, Final, Self

from deltadock.artifacts.container import (
    MAX_TENSORS,
    StreamingInspector,
)
from deltadock.errors import InvalidCheckpoint, MalformedSafetensors, UnsafeFile
from deltadock.json_depth import MAX_DEPTH, is_too_deep

CHUNK_BYTES: Final = 1 << 20

PICKLE_SUFFIXES: Final = frozenset({".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt"})
"""Suffixes of PyTorch pickles."""

RUNNABLE_SUFFIXES: Final = PICKLE_SUFFIXES | {".py", ".joblib", ".npy", ".npz", ".h5"}
"""Formats that can run code when opened, or that other loaders prefer to safetensors."""

KNOWN_SUFFIXES: Final = frozenset({".safetensors", ".json", ".txt", ".model", ".jinja", ".md"})

CONFIG: Final = "config.json"
WEIGHTS: Final = "model.safetensors"
CHAT_TEMPLATE: Final = "chat_template.jinja"
TOKENIZER: Final = "tokenizer.json"
TOKENIZER_CONFIG: Final = "tokenizer_config.json"
SHARD_INDEX: Final = "model.safetensors.index.json"
ADAPTER_CONFIG: Final = "adapter_config.json"
ADAPTER_WEIGHTS: Final = "adapter_model.safetensors"
ADAPTER_TYPE: Final = "peft-adapter"
"""The `model_type` of an adapter's manifest."""

VOCABULARY_FILES: Final = frozenset(
    {
        TOKENIZER, "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model",
        "sentencepiece.bpe.model", "tekken.json",
    }
)  # fmt: skip
"""A checkpoint without any of these has no tokenizer."""

TOKENIZER_FILES: Final = VOCABULARY_FILES | {
    TOKENIZER_CONFIG, "special_tokens_map.json", "added_tokens.json", "merges.txt", CHAT_TEMPLATE,
    "chat_template.json",
}  # fmt: skip

MODEL_FILES: Final = TOKENIZER_FILES | {
    CONFIG, "generation_config.json", "preprocessor_config.json", "processor_config.json",
    "video_preprocessor_config.json",
}  # fmt: skip
"""The files besides weights that a model needs to answer; trainers leave many others."""

SAVE_AGAIN: Final = (
    "Save the model as .safetensors with transformers 5: "
    'model = AutoModelForCausalLM.from_pretrained(FOLDER, dtype="auto"); '
    "model.save_pretrained(NEW_FOLDER). Copy the tokenizer's files too."
)
"""What to do with pickled weights."""

_OTHER_FORMATS: Final[tuple[tuple[re.Pattern[str], str], ...]] = (
    (
        re.compile(r"^(?:\d+_)?adapters\.safetensors$"),
        "which is an adapter of MLX. Merge it: mlx_lm.fuse --model BASE --adapter-path FOLDER "
        "--save-path NEW_FOLDER",
    ),
    (
        re.compile(r"(?:^|/)(?:mp_rank|zero_pp_rank|bf16_zero_pp_rank)_.*\.pt$"),
        "which is DeepSpeed's. Run python zero_to_fp32.py . NEW_FOLDER --safe_serialization in the "
        "folder, and copy config.json and the tokenizer's files to the new one",
    ),
    (
        re.compile(r"\.distcp$"),
        "which is FSDP's. Run accelerate merge-weights on its folder, and copy config.json and the "
        "tokenizer's files to the new one",
    ),
    (
        re.compile(r"\.gguf$"),
        "which is quantized for llama.cpp. Take the checkpoint that it was made from",
    ),
    (
        re.compile(r"^consolidated.*\.safetensors$"),
        "which names its tensors as Mistral does. Take the model's files for transformers",
    ),
)
"""Weights that are in no model.safetensors: whose they are, and what to do."""

_INNER_CHECKPOINT: Final = re.compile(
    rf"(.+)/(?:{re.escape(ADAPTER_WEIGHTS)}|{re.escape(WEIGHTS)}|{re.escape(SHARD_INDEX)})"
)
_SHARD: Final = re.compile(r"-\d{5}-of-\d{5}\.safetensors$")
_OTHER_WEIGHTS: Final = re.compile(r"(adapters?|consolidated|optimizer|ema)[._-].*|adapter_model.*")


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
        raise UnsafeFile(f"{path!r} is of a kind that can run code when it is opened. {SAVE_AGAIN}")
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
        content = {
            "files": [
                {"path": file.path, "size": file.size, "sha256": file.sha256} for file in self.files
            ],
            "tensors": [
                {
                    "name": tensor.name,
                    "dtype": tensor.dtype,
                    "shape": tensor.shape,
                    "file": tensor.file,
                    "sha256": tensor.sha256,
                }
                for tensor in self.tensors
            ],
            "config": self.config,
        }
        return json.dumps(content, sort_keys=True, separators=(",", ":")).encode()

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


def weight_files(paths: Collection[str], index_json: bytes | None) -> frozenset[str]:
    """The files that `from_pretrained` reads a model's weights from; empty: there are none.

    As in `transformers`, `model.safetensors` comes first, then the shards that the index names.
    Without either, it is every file that is not known for something else.

    Args:
        paths: all files of the folder.
        index_json: the bytes of `SHARD_INDEX`, if present.

    Raises:
        InvalidCheckpoint: the index is damaged or missing, or names a shard that is not there.
    """
    if WEIGHTS in paths:
        return frozenset({WEIGHTS})
    if index_json is None:
        found = frozenset(
            path
            for path in paths
            if path.endswith(".safetensors") and "/" not in path and not _OTHER_WEIGHTS.match(path)
        )
        if parts := sorted(filter(_SHARD.search, found)):
            raise InvalidCheckpoint(
                f"There is no {SHARD_INDEX}, without which transformers finds no shards such as "
                f"{parts[0]}. Copy it too."
            )
        return found
    try:
        shards = frozenset(json.loads(index_json)["weight_map"].values())
        missing = sorted(str(shard) for shard in shards if shard not in paths)
    except (ValueError, RecursionError, LookupError, TypeError, AttributeError) as error:
        raise InvalidCheckpoint(f"{SHARD_INDEX} is not a shard index.") from error
    if missing:
        raise InvalidCheckpoint(
            f"{SHARD_INDEX} names {missing[0]!r}, which is not there ({len(missing)} of "
            f"{len(shards)} shards are missing). Copy or upload the missing files."
        )
    if foreign := [shard for shard in shards if not shard.endswith(".safetensors")]:
        raise InvalidCheckpoint(f"{SHARD_INDEX} names {min(foreign)!r}, no .safetensors file.")
    return shards


def model_files(
    paths: Collection[str], index_json: bytes | None, *, adapter: bool = False
) -> frozenset[str]:
    """The files of a folder that belong to the model or adapter in it; all others are ignored.

    Args:
        paths: all files of the folder, relative to it.
        index_json: the bytes of `SHARD_INDEX`, if present.
        adapter: take a folder that holds both for an adapter, not for a model.

    Raises:
        InvalidCheckpoint: there are no weights, or a model and an adapter; the message says what
            to do.
        UnsafeFile: the only weights are PyTorch pickles.
    """
    is_adapter = {ADAPTER_CONFIG, ADAPTER_WEIGHTS} <= set(paths)
    weights = frozenset[str]() if adapter else weight_files(paths, index_json)
    if is_adapter and weights:
        raise InvalidCheckpoint(
            f"The folder holds a whole model ({min(weights)}) and a PEFT adapter: transformers "
            f"would load the base that {ADAPTER_CONFIG} names. Keep only the files of one of them."
        )
    others = MODEL_FILES & set(paths)
    if weights:
        index = {SHARD_INDEX} if WEIGHTS not in weights and index_json is not None else set()
        return weights | others | index
    if is_adapter:
        return (others - {CONFIG}) | {ADAPTER_CONFIG, ADAPTER_WEIGHTS}
    inner = {found[1] for path in paths if (found := _INNER_CHECKPOINT.fullmatch(path))}
    if inner:
        last = max(inner, key=lambda name: (int((re.findall(r"\d+", name) or ["0"])[-1]), name))
        raise InvalidCheckpoint(
            f"The weights are in inner folders ({', '.join(sorted(inner)[:4])}). Take the one to "
            f"use, such as {last!r}, as the checkpoint's folder."
        )
    for pattern, how in _OTHER_FORMATS:
        if names := sorted(filter(pattern.search, paths)):
            raise InvalidCheckpoint(f"The weights are in {names[0]}, {how}.")
    pickles = any(PurePosixPath(path).suffix in PICKLE_SUFFIXES for path in paths)
    if pickles and not any(path.endswith(".safetensors") for path in paths):
        raise UnsafeFile(
            f"The weights are only PyTorch pickles, which can run code when opened. {SAVE_AGAIN}"
        )
    raise InvalidCheckpoint("There is no .safetensors file with weights.")


def configures_chat(tokenizer_config: str | bytes | None) -> bool:
    """Whether a tokenizer_config.json holds a chat template."""
    try:
        config = json.loads(tokenizer_config or "{}")
    except (ValueError, RecursionError):
        return False  # the node refuses it by name
    return isinstance(config, dict) and bool(config.get("chat_template"))


def assemble(
    files: list[FileEntry],
    tensors: list[TensorEntry],
    config_json: bytes | None,
    adapter_json: bytes | None = None,
    index_json: bytes | None = None,
) -> CheckpointManifest:
    """Build the manifest of a checkpoint or a PEFT adapter from its inspected files.

    Files that are not the model's (`model_files`) are left out.

    Args:
        files: all files.
        tensors: the tensors of all safetensors files.
        config_json: the bytes of `config.json`, if present.
        adapter_json: the bytes of `adapter_config.json`, if present.
        index_json: the bytes of `SHARD_INDEX`, if present.

    Raises:
        InvalidCheckpoint: there are no weights or no configuration, or a tensor is in two files.
    """
    if config_json is None and adapter_json is None:
        raise InvalidCheckpoint("config.json is missing; a checkpoint folder always has one.")
    paths = {file.path for file in files}
    if clash := paths & {str(parent) for path in paths for parent in PurePosixPath(path).parents}:
        raise InvalidCheckpoint(f"{min(clash)!r} is a file and a folder at once.")
    kept = model_files(paths, index_json)
    tensors = [tensor for tensor in tensors if tensor.file in kept]
    if ADAPTER_CONFIG in kept:
        config = _parsed(ADAPTER_CONFIG, adapter_json)
        config["model_type"] = ADAPTER_TYPE
    elif config_json is None:
        raise InvalidCheckpoint("config.json is missing; a checkpoint folder always has one.")
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
    if len(tensors) > MAX_TENSORS:
        raise InvalidCheckpoint(f"The checkpoint has more than {MAX_TENSORS} tensors.")
    names: set[str] = set()
    for tensor in tensors:
        if tensor.name in names:
            raise InvalidCheckpoint(f"Tensor {tensor.name!r} is in two files.")
        names.add(tensor.name)
    return CheckpointManifest(
        files=tuple(sorted((f for f in files if f.path in kept), key=lambda entry: entry.path)),
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
    if is_too_deep(config):
        raise InvalidCheckpoint(f"{name} is nested more than {MAX_DEPTH} levels deep.")
    try:
        json.dumps(config, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise InvalidCheckpoint(f"{name} holds half a surrogate pair, which is no text.") from error
    return config


@contextmanager
def naming(path: str) -> Iterator[None]:
    """Name the file in an error about its content."""
    try:
        yield
    except MalformedSafetensors as error:
        raise MalformedSafetensors(f"{path}: {error.message}") from error


class FileInspector:
    """Hashes one file of a checkpoint as it streams, and the tensors of a safetensors file."""

    def __init__(
        self,
        path: str,
        non_finite: set[str] | None = None,
        *,
        threads: Executor | None = None,
    ) -> None:
        """`path` is inside the checkpoint; for `non_finite` see `StreamingInspector`.

        With `threads`, the file is hashed in one of them, beside its tensors in this one.
        """
        self._threads = threads
        self.path = check_path(path)
        self.size = 0
        self._hash = hashlib.sha256()
        weights = path.endswith(".safetensors")
        self._tensors = StreamingInspector(non_finite) if weights else None

    def update(self, chunk: bytes | bytearray | memoryview) -> None:
        """Process the file's next bytes; raises like `StreamingInspector.update`."""
        self.size += len(chunk)
        if self._tensors is None:
            self._hash.update(chunk)
            return
        if self._threads is None:
            self._hash.update(chunk)
            with naming(self.path):
                self._tensors.update(chunk)
            return
        hashed = self._threads.submit(self._hash.update, chunk)
        try:
            with naming(self.path):
                self._tensors.update(chunk)
        finally:
            hashed.result()

    def finish(self) -> tuple[FileEntry, list[TensorEntry]]:
        """The entries of the file and its tensors; raises if a safetensors file ended early."""
        entry = FileEntry(self.path, self.size, self._hash.hexdigest())
        if self._tensors is None:
            return entry, []
        with naming(self.path):
            header, digests = self._tensors.finish()
        return entry, [
            TensorEntry(spec.name, spec.dtype, spec.shape, self.path, digests[spec.name])
            for spec in header.tensors
        ]
