"""A delta's tensors in one block of memory: one copy places all of them in a slot."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from deltadock.inference.model.weight_deltas import mapped, view_at
from deltadock_vllm.many.sharding import DensePart, PartDelta


def moved(delta: PartDelta, move: Callable[[Tensor], Tensor]) -> PartDelta:
    """The same delta of tensors that `move` gives; encoded matrices stay in host memory."""
    if isinstance(delta, DensePart):
        whole: Any = mapped(delta.whole, move)
        return delta.moved(whole)
    return mapped(delta, move)


def in_copy(delta: PartDelta, memory: Tensor) -> PartDelta:
    """The same delta in `memory`, which begins with a copy of the buffer that it is a view of."""
    return moved(
        delta,
        lambda tensor: view_at(memory, int(tensor.storage_offset()) * tensor.itemsize, tensor),
    )
