"""Views of a model's weights with the names and shapes of its checkpoint.

`transformers` renames tensors as it loads them, and stacks the experts of a layer. Its
reverse conversion, for saving, copies them; here they are found as writable views.
"""

from bisect import bisect_right
from collections.abc import Iterable
from math import prod
from typing import Any

import torch
from torch import Tensor
from transformers.core_model_loading import revert_weight_conversion

from deltadock.errors import UnsupportedModel


def tensors_of(model: Any) -> dict[str, Tensor]:
    """Saved parameters and buffers by name; tied ones appear under each of their names."""
    return dict(model.state_dict(keep_vars=True))


def checkpoint_views(model: Any) -> dict[str, Tensor]:
    """Every tensor of the model's checkpoint as a view of a parameter or buffer.

    Raises:
        UnsupportedModel: weights are quantized or not in memory, or a checkpoint tensor is not a
            slice of a parameter.
    """
    tensors = tensors_of(model)
    if getattr(model, "hf_quantizer", None) or any(t.is_meta for t in tensors.values()):
        raise UnsupportedModel(
            "The model's weights are quantized or not in memory, so they cannot be replaced. Load "
            "the model in a floating-point dtype and without offloading."
        )
    proxies, inputs = _IndexProxies(), {}
    for name, tensor in tensors.items():
        inputs[name] = tensor.detach() if tensor.ndim < 3 else proxies.add(tensor.detach())
    unchanged = {id(tensor) for tensor in inputs.values() if tensor.ndim < 3}
    return {
        name: output if id(output) in unchanged else proxies.view(name, output)
        for name, output in revert_weight_conversion(model, inputs).items()
    }


class _IndexProxies:
    """Small proxies for stacked tensors, whose entries are consecutive numbers.

    A proxy has a tensor's first dimension and at most two entries of each other dimension. The
    numbers in a slice of it identify the tensor and the slice.
    """

    def __init__(self) -> None:
        self._next = 0
        self._starts: list[int] = []
        self._pairs: list[tuple[Tensor, Tensor]] = []

    def add(self, tensor: Tensor) -> Tensor:
        sizes = [tensor.shape[0], *(min(size, 2) for size in tensor.shape[1:])]
        proxy = torch.arange(self._next, self._next + prod(sizes)).reshape(sizes)
        self._starts.append(self._next)
        self._next += prod(sizes)
        self._pairs.append((proxy, tensor))
        return proxy

    def view(self, name: str, found: Tensor) -> Tensor:
        """The slice of the tensor that corresponds to a slice `found` of its proxy."""
        if self._pairs and found.dtype == torch.int64 and found.numel():
            first = int(found.flatten()[0])
            index = max(bisect_right(self._starts, first) - 1, 0)
            proxy, tensor = self._pairs[index]
            offset = first - self._starts[index]
            if 0 <= offset < proxy.numel() and found.ndim <= proxy.ndim:
                return _slice(name, found, proxy, tensor, offset)
        raise UnsupportedModel(f"The model stores {name!r} in another form than its checkpoint.")


def _slice(name: str, found: Tensor, proxy: Tensor, tensor: Tensor, offset: int) -> Tensor:
    corner: Iterable[Tensor] = torch.unravel_index(torch.tensor(offset), proxy.shape)
    sizes = (1,) * (proxy.ndim - found.ndim) + tuple(found.shape)
    cut = [(int(begin), int(begin) + side) for begin, side in zip(corner, sizes, strict=True)]
    if not torch.equal(proxy[tuple(slice(*edges) for edges in cut)].reshape(found.shape), found):
        raise UnsupportedModel(f"The model stores {name!r} in another form than its checkpoint.")
    scaled = [
        slice(begin * side // steps, end * side // steps)
        for (begin, end), side, steps in zip(cut, tensor.shape, proxy.shape, strict=True)
    ]
    part = tensor[tuple(scaled)]
    # An expert's checkpoint tensor lacks the leading dimensions of size one.
    return part.reshape(part.shape[proxy.ndim - found.ndim :])
