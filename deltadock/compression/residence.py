"""Tensors that stay on the device while they fit, instead of being read again at every use."""

from collections.abc import Callable
from pathlib import Path
from typing import Final

import torch
from torch import Tensor

from deltadock.compression.scratch import MEMORY_BYTES, Scratch
from deltadock.host_memory import total_memory

CPU_BYTES: Final = 1 << 30
GPU_SHARE: Final = 0.6
"""Fraction of the free device memory."""
SCRATCH_SHARE: Final = 0.5
"""Fraction of the free device memory that scratch space takes: a 7B model's moments take 89 GB."""
MEMORY_SHARE: Final = 0.25
"""Fraction of the memory that scratch space takes beside a GPU."""


def device_budget(device: torch.device) -> int:
    """Bytes that tensors may take on a device; results do not depend on it."""
    if device.type == "cpu":
        return CPU_BYTES
    return int(GPU_SHARE * torch.cuda.mem_get_info(device)[0])


def scratch_for(device: torch.device, parent: Path | None = None) -> Scratch:
    """Scratch space for work on a device: a GPU's tensors stay there while they fit."""
    if device.type == "cpu":
        return Scratch(parent=parent)
    return Scratch(
        max(MEMORY_BYTES, int(MEMORY_SHARE * total_memory())),
        int(SCRATCH_SHARE * torch.cuda.mem_get_info(device)[0]),
        parent,
    )


class DeviceMemory:
    """Tensors of a scratch space and of files; the first that fit stay on the device.

    They are shared: nobody may change them in place.

    Attributes:
        device: where tensors are delivered.
        free: bytes left.
        complete: whether every tensor loaded so far has stayed.
    """

    def __init__(self, scratch: Scratch, device: torch.device, budget: int) -> None:
        self.device, self.free, self.complete = device, budget, True
        self._scratch = scratch
        self._held: dict[str, Tensor] = {}

    def put(self, key: str, tensor: Tensor) -> None:
        """Store a tensor in the scratch space."""
        self._scratch.put(key, tensor)

    def get(self, key: str) -> Tensor:
        """A tensor of the scratch space."""
        return self.load(key, lambda: self._scratch.get(key))

    def load(self, key: str, read: Callable[[], Tensor]) -> Tensor:
        """The tensor of a key, on the device; `read` makes it unless it has stayed."""
        if key in self._held:
            return self._held[key]
        tensor = read().to(self.device)
        if tensor.nbytes <= self.free:
            self.free -= tensor.nbytes
            self._held[key] = tensor
        else:
            self.complete = False
        return tensor
