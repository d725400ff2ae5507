"""Random checkpoint pairs of any size and architecture, written block by block."""

import json
import shutil
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

STD = 0.02
"""Standard deviation of the weights, as at initialization."""


def random_tensor(name: str, shape: torch.Size, device: str) -> Tensor:
    """Normal values, float32, determined by name, shape and device type."""
    generator = torch.Generator(device).manual_seed(zlib.crc32(name.encode()))
    return STD * torch.randn(shape, generator=generator, device=device)


def shapes_of(config: Any) -> dict[str, torch.Size]:
    """Shapes of a checkpoint's tensors by name, for a `transformers` configuration."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    if config.tie_word_embeddings:
        shapes.pop("lm_head.weight", None)
    return shapes


def block_of(name: str) -> str:
    """The block of a tensor, such as `model.layers.3`; empty for tensors outside the blocks."""
    parts = name.split(".")
    for index, part in enumerate(parts):
        if part.isdigit():
            return ".".join(parts[: index + 1])
    return ""


def write_pair(
    config: Any,
    folder: Path,
    changed: Callable[[str], bool],
    *,
    delta: float = 0.002,
    dtype: torch.dtype = torch.bfloat16,
    device: str = "cpu",
    identical_blocks: bool = False,
) -> tuple[Path, Path]:
    """Write a random base and a fine-tune of it, one block in memory at a time.

    Shards without a changed tensor are hard links, to save disk space.

    Args:
        config: a `transformers` configuration.
        folder: parent of the new folders `base` and `finetuned`.
        changed: whether the fine-tune changes the tensor of this name.
        delta: standard deviation of the weight delta.
        dtype: of the stored weights.
        device: where random numbers are drawn.
        identical_blocks: draw one block and copy it to all, which is faster.

    Returns:
        The two folders.
    """
    base, tuned = folder / "base", folder / "finetuned"
    groups: dict[str, dict[str, torch.Size]] = {}
    for name, shape in shapes_of(config).items():
        groups.setdefault(block_of(name), {})[name] = shape
    weight_map = {}
    for path in (base, tuned):
        path.mkdir(parents=True)
    drawn: dict[str, Tensor] = {}
    for number, (group, shapes) in enumerate(groups.items(), 1):
        file = f"model-{number:05d}-of-{len(groups):05d}.safetensors"
        weight_map.update(dict.fromkeys(shapes, file))
        tensors = {}
        for name, shape in shapes.items():
            key = name.removeprefix(group) if identical_blocks and group else name
            if key not in drawn:
                # Norms are near one.
                values = random_tensor(key, shape, device) + name.endswith("norm.weight")
                drawn[key] = values.to(dtype)
            tensors[name] = drawn[key]
        if not identical_blocks:
            drawn.clear()
        save_file(tensors, base / file, metadata={"format": "pt"})
        moved = [name for name in shapes if changed(name)]
        for name in moved:
            step = random_tensor(f"delta/{name}", shapes[name], device)
            tensors[name] = (tensors[name].float() + delta / STD * step).to(dtype)
        if moved:
            save_file(tensors, tuned / file, metadata={"format": "pt"})
        else:
            (tuned / file).hardlink_to(base / file)
    index = json.dumps({"metadata": {}, "weight_map": weight_map})
    config.dtype = dtype
    config.save_pretrained(base)
    write_tokenizer(base)
    (base / "model.safetensors.index.json").write_text(index, encoding="utf-8")
    for path in base.glob("*.json"):
        shutil.copy(path, tuned)
    return base, tuned


def write_tokenizer(folder: Path) -> None:
    """Write a byte-level tokenizer without merges."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(BPE(vocab={char: i for i, char in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)


def write_text(path: Path, characters: int) -> Path:
    """Write numbers and their squares until the text has at least `characters`."""
    lines, length, number = [], 0, 0
    while length < characters:
        lines.append(f"{number} squared is {number * number}.\n")
        length += len(lines[-1])
        number += 1
    path.write_text("".join(lines), encoding="utf-8")
    return path
