"""From a delta back to weights: single tensors, and whole checkpoints for any engine."""

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from deltadock.artifacts.checkpoint import CheckpointManifest, scan_folder
from deltadock.artifacts.encoding import Encoded, decode_dense, parts, raw_data
from deltadock.artifacts.reader import Artifact
from deltadock.errors import BaseMismatch, Conflict, InvalidArtifact

TORCH_DTYPES: Final = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2, "U16": torch.uint16, "I16": torch.int16, "F16": torch.float16,
    "BF16": torch.bfloat16, "U32": torch.uint32, "I32": torch.int32, "F32": torch.float32,
    "U64": torch.uint64, "I64": torch.int64, "F64": torch.float64,
}  # fmt: skip

SHARD_BYTES: Final = 5 * 2**30


def _tensor(raw: npt.NDArray[Any], dtype: str) -> Tensor:
    """Raw data as torch has it, a copy of its own."""
    return torch.from_numpy(np.array(raw)).view(TORCH_DTYPES[dtype])


def stored_tensor(encoded: Encoded) -> Tensor:
    """What an encoding holds as it is: an `exact` tensor, or the rows that `new-rows` adds.

    As torch has it, a copy of its own.

    Raises:
        InvalidArtifact: it is deflated, and not to what its record implies.
    """
    return _tensor(raw_data(encoded), encoded.record["dtype"])


def exact_tensor(artifact: Artifact, name: str) -> Tensor:
    """An `exact` tensor as torch has it, a copy of its own."""
    return _tensor(artifact.exact(name), artifact.records[name]["dtype"])


def merged(artifact: Artifact, name: str, base: Tensor) -> Tensor:
    """The fine-tuned tensor: the base's with the delta applied, in the fine-tune's dtype.

    The delta is added in float32 and rounded once; a tensor that the artifact does not name is
    the base's own. Where the vocabulary has grown, a tensor is longer than the base's.

    Raises:
        InvalidArtifact: the delta is of another shape than the base's tensor.
    """
    if name not in artifact.records:
        return base
    encoded = artifact.resolved(name)
    if not fits(encoded.record, base.shape):
        raise InvalidArtifact(
            f"{artifact.path.name} has {name!r} for a base of the shape "
            f"{_base_shape(encoded.record)}, but the base has it in {list(base.shape)}."
        )
    return _applied(encoded, base)


def _applied(encoded: Encoded, base: Tensor) -> Tensor:
    record = encoded.record
    dtype = TORCH_DTYPES[record["dtype"]]
    if record["kind"] == "exact":
        return stored_tensor(encoded).to(base.device)
    if record["kind"] == "new-rows":
        (part,) = parts(encoded)
        rows = base.to(dtype) if part is None else _applied(part, base)
        return torch.cat([rows, stored_tensor(encoded).to(base.device)])
    return (base.float() + torch.from_numpy(decode_dense(encoded)).to(base.device)).to(dtype)


def fits(record: Mapping[str, Any], base: Sequence[int]) -> bool:
    """Whether a tensor stored so is one of a base's of this shape; an exact one may be longer."""
    shape, wanted = list(base), _base_shape(record)
    if record["kind"] == "exact" and shape and wanted:
        return wanted[1:] == shape[1:] and wanted[0] >= shape[0]
    return wanted == shape


def _base_shape(record: Mapping[str, Any]) -> list[int]:
    """The shape of the base's tensor, so far as the record tells it."""
    shape: list[int] = record["shape"]
    return [record["base_rows"], *shape[1:]] if record["kind"] == "new-rows" else shape


def check_base(artifact: Artifact, weights_digest: str) -> None:
    """Refuse a base that the artifact was not made for.

    Raises:
        BaseMismatch: the digests differ.
    """
    if artifact.base_digest != weights_digest:
        raise BaseMismatch(
            f"{artifact.path.name} belongs to the base with weights digest "
            f"{artifact.base_digest}; this base has {weights_digest}."
        )


def merge(base: Path, artifact_path: Path, out: Path, shard_bytes: int = SHARD_BYTES) -> None:
    """Write the checkpoint that the delta stands for, as an ordinary Hugging Face folder.

    Weights are written in shards of about `shard_bytes`, read and merged one tensor at a time;
    config and tokenizer files are the fine-tune's. Takes memory for one shard and one tensor.

    Raises:
        BaseMismatch: `base` is not the artifact's base.
        InvalidArtifact: the delta cannot be read, is damaged or names tensors that `base` lacks.
        Conflict: `out` exists and is not an empty folder.
    """
    out = out.resolve()
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise Conflict(f"{out} is not an empty folder; choose another name.")
    with Artifact(artifact_path) as artifact:
        manifest = scan_folder(base)
        check_base(artifact, manifest.weights_digest)
        artifact.check_intact()
        if unknown := artifact.records.keys() - {entry.name for entry in manifest.tensors}:
            raise InvalidArtifact(
                f"{artifact_path.name} changes {min(unknown)!r}, which the base lacks."
            )
        partial = out.with_name(out.name + ".partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        try:
            _write_shards(_merged_tensors(base, manifest, artifact), partial, shard_bytes)
            _write_files(base, manifest, artifact, partial)
            if out.exists():
                out.rmdir()
            partial.rename(out)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def _merged_tensors(
    base: Path, manifest: CheckpointManifest, artifact: Artifact
) -> Iterator[tuple[str, Tensor]]:
    """Every tensor by name, in the manifest's order."""
    for entry in manifest.tensors:
        # Opened for each: pages of a file that stays open are kept mapped, all that were read.
        with safe_open(str(base / entry.file), framework="pt") as file:
            # A tensor without a change still points into the file.
            tensor = merged(artifact, entry.name, file.get_tensor(entry.name))
            yield entry.name, tensor


def _write_shards(tensors: Iterator[tuple[str, Tensor]], folder: Path, shard_bytes: int) -> None:
    shard: dict[str, Tensor] = {}
    names: list[list[str]] = []
    size = 0
    for name, tensor in tensors:
        if shard and size + tensor.nbytes > shard_bytes:
            _write_shard(folder, shard, len(names) + 1)
            names.append(list(shard))
            shard, size = {}, 0
        shard[name] = tensor.contiguous()
        size += tensor.nbytes
    _write_shard(folder, shard, len(names) + 1)
    _name_shards(folder, [*names, list(shard)])


def _write_files(
    base: Path, manifest: CheckpointManifest, artifact: Artifact, folder: Path
) -> None:
    """The base's files but its weights, with the fine-tune's in their place."""
    for file in manifest.files:
        if not file.path.endswith((".safetensors", ".safetensors.index.json")):
            shutil.copyfile(base / file.path, folder / file.path)
    for name, text in artifact.files.items():
        if text is None:
            (folder / name).unlink(missing_ok=True)
        else:
            (folder / name).write_bytes(text.encode())
    for name, content in artifact.binary_files.items():
        (folder / name).write_bytes(content)


def _write_shard(folder: Path, tensors: dict[str, Tensor], number: int) -> None:
    path = folder / f"shard-{number}"
    save_file(tensors, str(path), metadata={"format": "pt"})
    # safetensors makes its files private; a checkpoint is as readable as its folder.
    path.chmod(folder.stat().st_mode & 0o666)


def _name_shards(folder: Path, names: list[list[str]]) -> None:
    """Give the shards the names that `transformers` looks for, with an index if there are many."""
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
