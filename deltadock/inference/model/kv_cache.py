"""The slotted key/value cache: one slot per sequence, long enough for the whole context."""

import math

import numpy as np
import torch
from torch import Tensor


class KVCache:
    """Keys and values of `slots` sequences of at most `length` tokens, per layer.

    `keys[layer]` and `values[layer]` are (slots, kv_heads, length, head_dim).
    """

    def __init__(
        self,
        layers: int,
        slots: int,
        kv_heads: int,
        length: int,
        head_dim: int,
        *,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.slots, self.length = slots, length
        shape = (layers, 2, slots, kv_heads, length, head_dim)
        if device.type == "cpu":  # numpy's zeros use memory only once written to
            zeros = torch.from_numpy(np.zeros(math.prod(shape) * dtype.itemsize, np.uint8))
            self._store = zeros.view(dtype).view(shape)
        else:
            self._store = torch.zeros(shape, dtype=dtype, device=device)
        self.keys: list[Tensor] = [layer[0] for layer in self._store]
        self.values: list[Tensor] = [layer[1] for layer in self._store]

    def copy(self, source: int, target: int, count: int) -> None:
        """Copy the first `count` tokens of one slot to another."""
        self._store[:, :, target, :, :count] = self._store[:, :, source, :, :count]

    def erase(self, slot: int, begin: int, end: int) -> None:
        """Zero the tokens `[begin, end)` of a slot."""
        self._store[:, :, slot, :, begin:end] = 0
