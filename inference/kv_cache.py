"""The slotted key/value cache: a sequence owns one slot, long enough for the whole context."""

import heapq

import torch
from torch import Tensor


class KVCache:
    """Keys and values of `slots` sequences of at most `length` tokens, per layer.

    `keys[layer]` and `values[layer]` are (slots, kv_heads, length, head_dim). On the CPU, zeroed
    pages are only given memory once they are written to.
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
        self.length = length
        store = torch.zeros(
            (layers, 2, slots, kv_heads, length, head_dim), dtype=dtype, device=device
        )
        self.keys: list[Tensor] = [layer[0] for layer in store]
        self.values: list[Tensor] = [layer[1] for layer in store]
        self._free = list(range(slots))

    @property
    def free_slots(self) -> int:
        """How many more sequences fit."""
        return len(self._free)

    def allocate(self) -> int:
        """Take the lowest free slot: neighbours are attended to in one call, without copies."""
        return heapq.heappop(self._free)

    def release(self, slot: int, used: int) -> None:
        """Give a slot back and erase the `used` tokens in it.

        Masked positions are still read, and 0 * NaN is NaN: what a broken delta left behind
        would reach the next sequence.
        """
        for layer in (*self.keys, *self.values):
            layer[slot, :, :used].zero_()
        heapq.heappush(self._free, slot)
