"""A delta's tensors in one block of memory: one copy places all of them in a slot."""

from collections.abc import Callable, Sequence
from typing import Any, Final

import torch
from torch import Tensor

from deltadock.inference.model.weight_deltas import mapped
from deltadock_vllm.many.sharding import DensePart, PartDelta

ALIGNMENT: Final = 128
"""Bytes, as the kernels ask for of a packed delta."""


def moved(delta: PartDelta, move: Callable[[Tensor], Tensor]) -> PartDelta:
    """The same delta of tensors that `move` gives; encoded matrices stay in host memory."""
    if isinstance(delta, DensePart):
        whole: Any = mapped(delta.whole, move)
        return delta.moved(whole)
    return mapped(delta, move)


def in_block(deltas: Sequence[PartDelta], *, pin: bool) -> tuple[Tensor, list[PartDelta]]:
    """Copy the deltas' tensors into one (bytes,) uint8 block, and make them views of it.

    A tensor of several deltas is copied once. With `pin` the block is page-locked: a GPU copies
    from it beside other work.
    """
    begins: dict[int, int] = {}
    held: list[Tensor] = []
    size = 0

    def reserve(tensor: Tensor) -> Tensor:
        nonlocal size
        if id(tensor) not in begins:
            begins[id(tensor)] = size
            held.append(tensor)
            size += -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT
        return tensor

    for delta in deltas:
        moved(delta, reserve)
    block = torch.empty(size, dtype=torch.uint8, pin_memory=pin)
    for tensor in held:
        _view(block, begins[id(tensor)], tensor).copy_(tensor)
    return block, [
        moved(delta, lambda tensor: _view(block, begins[id(tensor)], tensor)) for delta in deltas
    ]


def in_copy(delta: PartDelta, memory: Tensor) -> PartDelta:
    """The same delta in `memory`, which begins with a copy of the block that it is a view of."""
    return moved(
        delta, lambda tensor: _view(memory, int(tensor.storage_offset()) * tensor.itemsize, tensor)
    )


def _view(memory: Tensor, begin: int, like: Tensor) -> Tensor:
    return memory[begin : begin + like.nbytes].view(like.dtype).view(like.shape)
