"""LoRA: a PEFT adapter as an artifact's tensors, without loss.

Source: Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models" (2021); the files are those
that PEFT's `save_pretrained` writes. A layer's delta is `scaling * B @ A`, `scaling = alpha / r`
(rank-stabilised: `alpha / sqrt(r)`); the factors are kept in the adapter's own dtype. Tensors that
the adapter holds whole (`modules_to_save`, biases, a resized vocabulary) replace the base's.
"""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Final

import torch
from safetensors import safe_open
from torch import Tensor

from deltadock.artifacts.checkpoint import TensorEntry
from deltadock.artifacts.container import StreamingInspector
from deltadock.artifacts.encodings import (
    Encoded,
    encode_exact,
    encode_low_rank,
    encode_new_rows,
    encode_transposed,
)
from deltadock.compression.methods.lora_config import CONFIG, LoraConfig, read_config
from deltadock.compression.model.weights import Checkpoint, raw
from deltadock.errors import (
    ArchitectureMismatch,
    InvalidAdapter,
    MalformedSafetensors,
    NonFiniteWeights,
    UnsafeFile,
)

WEIGHTS: Final = "adapter_model.safetensors"
PREFIX: Final = "base_model.model."

DTYPES: Final = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32"}
FACTORS: Final = {
    "lora_A.weight": ("a", False),
    "lora_B.weight": ("b", False),
    "lora_embedding_A": ("a", True),
    "lora_embedding_B": ("b", True),
}
"""How a factor's name ends: which factor it is, and whether its layer is an embedding."""


def adapter_digest(folder: Path) -> str:
    """SHA-256 (hex) over the adapter's configuration and weights, checked while they are read.

    Raises:
        UnsafeFile: the weights are a pickle.
        InvalidAdapter: there are none.
        MalformedSafetensors: they are damaged.
    """
    path = folder / WEIGHTS
    if not path.is_file():
        if any(folder.glob("adapter_model.bin")):
            raise UnsafeFile(
                "adapter_model.bin can run code when it is opened. Save the adapter with "
                "save_pretrained(..., safe_serialization=True)."
            )
        raise InvalidAdapter(f"{folder.name} has no {WEIGHTS}; is it a PEFT adapter?")
    digest = hashlib.sha256(hashlib.sha256((folder / CONFIG).read_bytes()).digest())
    inspector = StreamingInspector()
    with path.open("rb") as stream:
        while chunk := stream.read(1 << 20):
            inspector.update(chunk)
            digest.update(chunk)
    header, _ = inspector.finish()
    if not header.tensors:
        raise MalformedSafetensors(f"{WEIGHTS} holds no tensors.")
    return digest.hexdigest()


def import_adapter(base: Path, adapter: Path) -> dict[str, Encoded]:
    """The encodings of every tensor that the adapter changes, by the base's names.

    Args:
        base: checkpoint folder that the adapter was trained on.
        adapter: folder of adapter_config.json and adapter_model.safetensors.

    Raises:
        InvalidAdapter: a file is missing, or uses what cannot be imported; the message names it.
        UnsafeFile, MalformedSafetensors: the weights are a pickle, or damaged.
        ArchitectureMismatch: the base lacks a tensor, or has it in another shape.
        NonFiniteWeights: a tensor holds NaN or an infinity.
    """
    config = read_config(adapter)
    adapter_digest(adapter)
    checkpoint = Checkpoint(base)
    factors: dict[tuple[str, bool], dict[str, Tensor]] = {}
    encoded: dict[str, Encoded] = {}
    with safe_open(str(adapter / WEIGHTS), framework="pt") as weights:
        for key in weights.keys():  # noqa: SIM118 - not a mapping
            tensor = weights.get_tensor(key)
            if tensor.dtype not in DTYPES:
                raise InvalidAdapter(f"Tensor {key!r} is {tensor.dtype}; floats are expected.")
            if not torch.isfinite(tensor.float()).all():
                raise NonFiniteWeights(f"Tensor {key!r} of the adapter holds NaN or an infinity.")
            name = key.removeprefix(PREFIX)
            module, side, embedding = _as_factor(name)
            if side:
                factors.setdefault((module, embedding), {})[side] = tensor
            else:
                name = name.replace(".base_layer.", ".")
                if (whole := _whole(checkpoint, name, tensor)) is not None:
                    encoded[name] = whole
    for (module, embedding), pair in factors.items():
        if f"{module}.weight" in encoded or pair.keys() != {"a", "b"}:
            raise InvalidAdapter(
                f"The adapter does not hold both factors of {module!r} and no more."
            )
        encoded[f"{module}.weight"] = _product(
            config, checkpoint.entries, module, embedding=embedding, pair=pair
        )
    return encoded


def _as_factor(name: str) -> tuple[str, str, bool]:
    """Module, side ("a", "b", or "" for a whole tensor), and whether the module is an embedding.

    Raises:
        InvalidAdapter: it is a LoRA tensor of another kind.
    """
    for ending, (side, embedding) in FACTORS.items():
        if name.endswith(f".{ending}"):
            return name.removesuffix(f".{ending}"), side, embedding
    if ".lora_" in name:
        raise InvalidAdapter(
            f"Tensor {name!r} belongs to a feature that cannot be imported (DoRA, say). Merge the "
            "adapter into its base with PEFT's merge_and_unload and compress the checkpoint."
        )
    return name, "", False


def _whole(base: Checkpoint, name: str, tensor: Tensor) -> Encoded | None:
    """A tensor that replaces the base's; None where it is the base's."""
    dtype, shape = DTYPES[tensor.dtype], tuple(tensor.shape)
    entry = base.entries.get(name)
    if entry is not None and shape[1:] == entry.shape[1:] and shape[:1] > entry.shape[:1]:
        rows, old = entry.shape[0], base.tensor(name)
        if tensor.dtype == old.dtype and tensor[:rows].equal(old):
            return encode_new_rows(None, raw(tensor[rows:], dtype), rows, dtype)
        return encode_exact(raw(tensor, dtype), dtype, shape)
    entry = _entry(base.entries, name, shape)
    data = raw(tensor, dtype)
    if (dtype, hashlib.sha256(data.tobytes()).hexdigest()) == (entry.dtype, entry.sha256):
        return None
    return encode_exact(data, dtype, shape)


def _entry(entries: Mapping[str, TensorEntry], name: str, shape: tuple[int, ...]) -> TensorEntry:
    """The base's tensor that is to be changed, which has this shape."""
    entry = entries.get(name)
    if entry is None or entry.shape != shape:
        found = "none" if entry is None else f"one of shape {list(entry.shape)}"
        raise ArchitectureMismatch(
            f"The adapter changes a tensor {name!r} of shape {list(shape)}, but the base has "
            f"{found}. Is it the base that the adapter was trained on?"
        )
    return entry


def _product(
    config: LoraConfig,
    entries: Mapping[str, TensorEntry],
    module: str,
    *,
    embedding: bool,
    pair: Mapping[str, Tensor],
) -> Encoded:
    """The delta `scaling * B @ A`; an embedding's, and a Conv1D's, is the transpose of that."""
    a, b = pair["a"], pair["b"]
    if a.ndim != 2 or b.ndim != 2 or a.shape[0] != b.shape[1]:
        raise InvalidAdapter(f"The adapter's factors of {module!r} have no product.")
    if a.dtype != b.dtype:
        a, b = a.float(), b.float()
    dtype = DTYPES[a.dtype]
    scaling = config.scaling(module, len(a))
    shape = (len(b), a.shape[1])
    name = f"{module}.weight"
    found = entries[name].shape if name in entries else None
    if embedding:
        entry = _entry(entries, name, shape[::-1])
        return encode_low_rank(
            raw(a.t(), dtype), raw(b.t(), dtype), scaling, entry.dtype, {}, dtype
        )
    # A square weight's orientation is told by the configuration alone.
    turned = found == shape[::-1] and (found != shape or config.fan_in_fan_out)
    entry = _entry(entries, name, shape[::-1] if turned else shape)
    encoded = encode_low_rank(raw(b, dtype), raw(a, dtype), scaling, entry.dtype, {}, dtype)
    return encode_transposed(encoded) if turned else encoded
