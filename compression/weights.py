"""Tensors of a checkpoint, one at a time, from memory-mapped safetensors files."""

from pathlib import Path
from typing import Final, Protocol

import torch
from safetensors import safe_open
from torch import Tensor

from artifacts.checkpoint import TensorEntry, scan_folder

FLOAT_DTYPES: Final = {"BF16", "F16", "F32", "F64"}
"""Dtypes whose differences can be compressed; every other is kept exactly."""


class TensorSource(Protocol):
    """Anything that has a model's tensors by name."""

    def __contains__(self, name: object) -> bool: ...

    def tensor(self, name: str) -> Tensor:
        """The tensor, in its stored dtype, on the CPU."""
        ...


class Checkpoint:
    """A checkpoint folder. Opening hashes every file once; tensors are read when asked for."""

    def __init__(self, folder: Path) -> None:
        """Open `folder`.

        Raises:
            InvalidCheckpoint: not a complete safetensors checkpoint.
        """
        self.folder = folder
        self.manifest = scan_folder(folder)
        self.entries: dict[str, TensorEntry] = {t.name: t for t in self.manifest.tensors}
        self._files = {
            file: safe_open(str(folder / file), framework="pt")
            for file in {entry.file for entry in self.manifest.tensors}
        }

    def __contains__(self, name: object) -> bool:
        return name in self.entries

    def tensor(self, name: str) -> Tensor:
        """The tensor, in its stored dtype, on the CPU."""
        tensor: Tensor = self._files[self.entries[name].file].get_tensor(name)
        return tensor

    @property
    def parameters(self) -> int:
        """Number of weights."""
        return sum(torch.Size(entry.shape).numel() for entry in self.entries.values())

    @property
    def bf16_bytes(self) -> int:
        """Size of the weights at two bytes each: what ratios are measured against."""
        return 2 * self.parameters
