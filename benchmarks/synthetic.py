"""Random checkpoints of any size and architecture, written block by block."""

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
"""Standard deviation of the weights, as models are initialised."""


def random_tensor(name: str, shape: torch.Size, device: str) -> Tensor:
    """Normal values, float32, that depend on the name, the shape and the device's kind alone."""
    generator = torch.Generator(device).manual_seed(zlib.crc32(name.encode()))
    return STD * torch.randn(shape, generator=generator, device=device)


def shapes_of(config: Any) -> dict[str, torch.Size]:
    """Name and shape of every tensor of a checkpoint with this configuration."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    if config.tie_word_embeddings:
        shapes.pop("lm_head.weight", None)
    return shapes


def group_of(name: str) -> str:
    """`model.layers.3` for what is in a block; everything else is one group."""
    parts = name.split(".")
    for place, part in enumerate(parts):
        if part.isdigit():
            return ".".join(parts[: place + 1])
    return ""


def write_pair(
    config: Any,
    folder: Path,
    changed: Callable[[str], bool],
    *,
    delta: float = 0.002,
    dtype: torch.dtype = torch.bfloat16,
    device: str = "cpu",
    alike: bool = False,
) -> tuple[Path, Path]:
    """Write a random base and a fine-tune of it; one block is in memory at a time.

    Shards without a changed tensor are hard links: they take no room on the disk.

    Args:
        config: a `transformers` configuration.
        folder: where `base` and `finetuned` are made.
        changed: whether the fine-tune changes the tensor of this name.
        delta: standard deviation of the change.
        dtype: of the stored weights.
        device: where the numbers are drawn.
        alike: draw one block and give its values to all, which is quicker.

    Returns:
        The two folders.
    """
    base, tuned = folder / "base", folder / "finetuned"
    groups: dict[str, dict[str, torch.Size]] = {}
    for name, shape in shapes_of(config).items():
        groups.setdefault(group_of(name), {})[name] = shape
    weight_map = {}
    for path in (base, tuned):
        path.mkdir(parents=True)
    drawn: dict[str, Tensor] = {}
    for number, (group, shapes) in enumerate(groups.items(), 1):
        file = f"model-{number:05d}-of-{len(groups):05d}.safetensors"
        weight_map.update(dict.fromkeys(shapes, file))
        tensors = {}
        for name, shape in shapes.items():
            key = name.removeprefix(group) if alike and group else name
            if key not in drawn:
                # Norms are near one.
                values = random_tensor(key, shape, device) + name.endswith("norm.weight")
                drawn[key] = values.to(dtype)
            tensors[name] = drawn[key]
        if not alike:
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
    """A tokenizer of the 256 bytes."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(BPE(vocab={char: i for i, char in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)


def write_text(path: Path, characters: int) -> Path:
    """A text of numbers and their squares, at least that long."""
    lines, length, number = [], 0, 0
    while length < characters:
        lines.append(f"{number} squared is {number * number}.\n")
        length += len(lines[-1])
        number += 1
    path.write_text("".join(lines), encoding="utf-8")
    return path
