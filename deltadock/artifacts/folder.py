"""Checkpoint folders on disk: which files are the model's, and their manifest."""

from collections.abc import Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from deltadock.artifacts.checkpoint import (
    ADAPTER_CONFIG,
    CHUNK_BYTES,
    CONFIG,
    SHARD_INDEX,
    CheckpointManifest,
    FileEntry,
    FileInspector,
    TensorEntry,
    assemble,
    model_files,
    naming,
)
from deltadock.artifacts.container import Header, header_length, parse_header
from deltadock.errors import InvalidCheckpoint, MalformedSafetensors, UnsafeFile

NAMED_FILES: Final = 8
"""Ignored files that a note names."""


def list_folder(folder: Path) -> frozenset[str]:
    """The folder's files as relative paths, in inner folders too; hidden ones are left out."""
    return frozenset(
        path.relative_to(folder).as_posix()
        for path in folder.rglob("*")
        if path.is_file()
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    )


def ignored_files(folder: Path, kept: Collection[str]) -> list[str]:
    """A note that names the files of a folder that are not among `kept`; empty: there are none."""
    others = sorted(
        path
        for path in list_folder(folder)
        if path not in kept and path != CONFIG and not path.endswith(".md")
    )
    if not others:
        return []
    more = f" and {len(others) - NAMED_FILES} more" if len(others) > NAMED_FILES else ""
    return [f"Ignored, as no part of the model: {', '.join(others[:NAMED_FILES])}{more}."]


def read_header(folder: Path, name: str) -> Header:
    """The header of a safetensors file in a folder; its data are not read.

    Raises:
        MalformedSafetensors: it is invalid, or the file is not as long as it says.
    """
    path = folder / name
    with naming(name), path.open("rb") as stream:
        header = parse_header(stream.read(header_length(stream.read(8))))
        if (size := path.stat().st_size) != header.file_bytes:
            raise MalformedSafetensors(
                f"The file has {size} bytes, but its header tells of {header.file_bytes}. Was it "
                "cut off? Save or copy it again."
            )
    return header


def read_headers(folder: Path) -> CheckpointManifest:
    """The manifest of a checkpoint folder on disk with "" for digests: only headers are read.

    Raises:
        InvalidCheckpoint, UnsafeFile: as `scan_folder`, but for what only the data tell.
    """
    names = sorted(folder_files(folder))
    with _named(folder):
        return _headers(folder, names)


@contextmanager
def _named(folder: Path) -> Iterator[None]:
    """Name the folder in the error of a checkpoint that is not complete."""
    try:
        yield
    except InvalidCheckpoint as error:
        raise type(error)(f"{folder}: {error.message}") from error


def _headers(folder: Path, names: list[str]) -> CheckpointManifest:
    files: list[FileEntry] = []
    tensors: list[TensorEntry] = []
    for name in names:
        files.append(FileEntry(name, (folder / name).stat().st_size, ""))
        if name.endswith(".safetensors"):
            held = read_header(folder, name).tensors
            tensors += (TensorEntry(t.name, t.dtype, t.shape, name, "") for t in held)
    texts = (
        (folder / name).read_bytes() if (folder / name).is_file() else None
        for name in (CONFIG, ADAPTER_CONFIG, SHARD_INDEX)
    )
    return assemble(files, tensors, *texts)


def scan_folder(folder: Path, non_finite: set[str] | None = None) -> CheckpointManifest:
    """The manifest of a checkpoint folder on disk; every byte is read once.

    Files that are not the model's (`model_files`) are skipped.

    Args:
        folder: contains config.json and safetensors files.
        non_finite: if given, names of tensors with NaN or infinities are added to it.

    Raises:
        InvalidCheckpoint: the folder is not a complete safetensors checkpoint.
        UnsafeFile: its only weights are PyTorch pickles.
    """
    names = sorted(folder_files(folder))
    with _named(folder):
        return _scan(folder, names, non_finite)


def _scan(folder: Path, names: list[str], non_finite: set[str] | None) -> CheckpointManifest:
    def inspect(name: str) -> tuple[FileEntry, list[TensorEntry]]:
        inspector = FileInspector(name, non_finite, threads=hashers)
        with (folder / name).open("rb") as stream:
            while chunk := stream.read(CHUNK_BYTES):
                inspector.update(chunk)
        return inspector.finish()

    # Shards beside each other, and each file's hash beside those of its tensors.
    with ThreadPoolExecutor() as readers, ThreadPoolExecutor() as hashers:
        inspected = list(readers.map(inspect, names))
    files = [file for file, _ in inspected]
    tensors = [tensor for _, held in inspected for tensor in held]
    kept = {file.path for file in files}
    if ADAPTER_CONFIG in kept:
        raise InvalidCheckpoint(
            "It is a PEFT adapter, no whole model: the method 'lora' imports it."
        )
    config, index = (
        (folder / name).read_bytes() if name in kept else None for name in (CONFIG, SHARD_INDEX)
    )
    return assemble(files, tensors, config, index_json=index)


def folder_files(folder: Path, *, adapter: bool = False) -> frozenset[str]:
    """The files of a folder on disk that belong to the model or adapter in it (`model_files`).

    Raises:
        InvalidCheckpoint: as `model_files`.
        UnsafeFile: its only weights are PyTorch pickles.
    """
    if not folder.is_dir():
        raise InvalidCheckpoint(f"{folder} is not a folder with a Hugging Face checkpoint.")
    paths = list_folder(folder)
    index = (folder / SHARD_INDEX).read_bytes() if SHARD_INDEX in paths else None
    try:
        return model_files(paths, index, adapter=adapter)
    except (InvalidCheckpoint, UnsafeFile) as error:
        raise type(error)(f"{folder}: {error.message}") from error
