"""Scratch space for intermediate tensors: where they are, then in memory, then on disk."""

import tempfile
from pathlib import Path
from types import TracebackType
from typing import Final, Self

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

MEMORY_BYTES: Final = 1 << 29


class Scratch:
    """A context manager that drops all tensors at its end.

    Attributes:
        parent: the folder under which files are created; None: `TMPDIR`.
    """

    def __init__(
        self,
        memory_bytes: int = MEMORY_BYTES,
        device_bytes: int = 0,
        parent: Path | None = None,
    ) -> None:
        """Hold up to `device_bytes` on the tensors' device, and `memory_bytes` in memory."""
        self.parent = parent
        self._free, self._device_free = memory_bytes, device_bytes
        self._held: dict[str, Tensor] = {}
        self._files: dict[str, Path] = {}
        self._folder: tempfile.TemporaryDirectory[str] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._held.clear()
        self._files.clear()
        if self._folder is not None:
            self._folder.cleanup()

    def __contains__(self, key: str) -> bool:
        return key in self._held or key in self._files

    def put(self, key: str, tensor: Tensor) -> None:
        """Store `tensor`; each key is stored once."""
        tensor = tensor.detach()
        if tensor.device.type != "cpu" and tensor.nbytes <= self._device_free:
            self._device_free -= tensor.nbytes
            # Not a view, whose whole storage would stay.
            self._held[key] = tensor.clone(memory_format=torch.contiguous_format)
            return
        tensor = tensor.cpu().contiguous()
        if tensor.nbytes <= self._free:
            self._free -= tensor.nbytes
            self._held[key] = tensor
            return
        if self._folder is None:
            self._folder = tempfile.TemporaryDirectory(prefix="deltadock-", dir=self.parent)
        path = Path(self._folder.name) / f"{len(self._files)}.safetensors"
        save_file({"": tensor}, path)
        self._files[key] = path

    def get(self, key: str, device: torch.device | str = "cpu") -> Tensor:
        """Load the tensor stored under `key`; raises KeyError if there is none."""
        held = self._held.get(key)
        tensor: Tensor = load_file(self._files[key])[""] if held is None else held
        return tensor.to(device)
