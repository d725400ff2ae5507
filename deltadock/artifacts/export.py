"""Export: merge a delta into its base and write a Hugging Face checkpoint for any engine."""

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from deltadock.artifacts.checkpoint import MODEL_FILES, CheckpointManifest, TensorEntry
from deltadock.artifacts.compatibility import tied_head
from deltadock.artifacts.folder import scan_folder
from deltadock.artifacts.reader import Artifact
from deltadock.artifacts.tensors import merged_tensor
from deltadock.errors import Conflict, InvalidArtifact

SHARD_BYTES: Final = 5 * 2**30


def merge(base: Path, artifact_path: Path, out: Path, shard_bytes: int = SHARD_BYTES) -> None:
    """Merge a delta into its base and write the fine-tuned checkpoint as a Hugging Face folder.

    Tensors are merged one at a time and written in shards of about `shard_bytes`; peak memory is
    one shard and one tensor. Config and tokenizer files are the fine-tune's. `out` appears complete
    or not at all.

    Raises:
        BaseMismatch: `base` is not the artifact's base.
        InvalidArtifact: the delta is unreadable or damaged, or names tensors that `base` lacks.
        Conflict: `out` exists and is not an empty folder.
    """
    with new_folder(out) as folder, Artifact(artifact_path) as artifact:
        manifest = scan_folder(base)
        artifact.check_base(manifest.weights_digest)
        artifact.check_intact()
        known = {entry.name: entry for entry in manifest.tensors}
        known = {**tied_head(manifest), **known}
        if unknown := artifact.records.keys() - known.keys():
            raise InvalidArtifact(
                f"{artifact_path.name} changes {min(unknown)!r}, which the base lacks."
            )
        # A head that is tied to the embedding is written if the delta unties it.
        written = {
            name: entry
            for name, entry in known.items()
            if name == entry.name or name in artifact.records
        }
        _write_shards(_merged_tensors(base, written, artifact), folder, shard_bytes)
        _write_files(base, manifest, artifact, folder)


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """A folder to write into, which becomes `out` when all is written.

    Raises:
        Conflict: `out` exists and is not an empty folder.
    """
    out = out.resolve()
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise Conflict(f"{out} is not an empty folder; choose another name.")
    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        if out.exists():
            out.rmdir()
        partial.rename(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _merged_tensors(
    base: Path, entries: Mapping[str, TensorEntry], artifact: Artifact
) -> Iterator[tuple[str, Tensor]]:
    """Every tensor with its name, in the order of `entries`."""
    for name, entry in entries.items():
        # Reopened for each tensor: an open file keeps every page that was read mapped.
        with safe_open(str(base / entry.file), framework="pt") as file:
            # An unchanged tensor is a view of the mapped file.
            yield name, merged_tensor(artifact, name, file.get_tensor(entry.name))


def _write_shards(tensors: Iterator[tuple[str, Tensor]], folder: Path, shard_bytes: int) -> None:
    shard: dict[str, Tensor] = {}
    names: list[list[str]] = []
    size = 0
    for name, tensor in tensors:
        if shard and size + tensor.nbytes > shard_bytes:
            write_tensors(folder / f"shard-{len(names) + 1}", shard)
            names.append(list(shard))
            shard, size = {}, 0
        shard[name] = tensor.contiguous()
        size += tensor.nbytes
    write_tensors(folder / f"shard-{len(names) + 1}", shard)
    _name_shards(folder, [*names, list(shard)])


def _write_files(
    base: Path, manifest: CheckpointManifest, artifact: Artifact, folder: Path
) -> None:
    """Copy the base's files except weights, then overwrite them with the fine-tune's."""
    for file in manifest.files:
        if file.path in MODEL_FILES:
            shutil.copyfile(base / file.path, folder / file.path)
    write_carried(artifact, folder)


def write_carried(artifact: Artifact, folder: Path, without: str | None = None) -> None:
    """Write the fine-tune's files that differ from the base's, and remove those that it lacks."""
    for name, text in artifact.files.items():
        if text is None:
            (folder / name).unlink(missing_ok=True)
        elif name != without:
            (folder / name).write_bytes(text.encode())
    for name, content in artifact.binary_files.items():
        (folder / name).write_bytes(content)


def write_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write a safetensors file."""
    save_file(tensors, str(path), metadata={"format": "pt"})
    # safetensors creates files with mode 0600; use the folder's read permissions.
    path.chmod(path.parent.stat().st_mode & 0o666)


def _name_shards(folder: Path, names: list[list[str]]) -> None:
    """Rename the shards as `transformers` expects; write an index if there are several."""
    if len(names) == 1:
        (folder / "shard-1").rename(folder / "model.safetensors")
        return
    weight_map = {}
    for number, shard in enumerate(names, 1):
        final = f"model-{number:05d}-of-{len(names):05d}.safetensors"
        (folder / f"shard-{number}").rename(folder / final)
        weight_map.update(dict.fromkeys(shard, final))
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
