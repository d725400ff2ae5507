"""A model's weights under the names, and in the shapes, that its checkpoint has them in.

`transformers` renames what it loads, and puts the experts of a layer into one tensor. Its own way
back, for saving, copies those; here they are found as views, so that they can be written to.
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
    """Parameters and buffers that are saved, by name; one that has several names under each."""
    return dict(model.state_dict(keep_vars=True))


def checkpoint_views(model: Any) -> dict[str, Tensor]:
    """Every tensor of the model's checkpoint: a parameter or buffer, or a part of one.

    Raises:
        UnsupportedModel: weights are quantized or not in memory, or a tensor is no part of any.
    """
    tensors = tensors_of(model)
    if getattr(model, "hf_quantizer", None) or any(t.is_meta for t in tensors.values()):
        raise UnsupportedModel(
            "The model's weights are quantized, or not in memory: nothing can be put in their "
            "place. Load it in a floating-point dtype and without offloading."
        )
    plans, given = _Plans(), {}
    for name, tensor in tensors.items():
        given[name] = tensor.detach() if tensor.ndim < 3 else plans.of(tensor.detach())
    known = {id(tensor) for tensor in given.values() if tensor.ndim < 3}
    return {
        name: found if id(found) in known else plans.view(name, found)
        for name, found in revert_weight_conversion(model, given).items()
    }


class _Plans:
    """Small stand-ins for large tensors, whose entries tell where they came from.

    A plan has a tensor's first side and two of each other side, numbered throughout: what is cut
    out of it shows what is cut out of the tensor.
    """

    def __init__(self) -> None:
        self._next = 0
        self._starts: list[int] = []
        self._plans: list[tuple[Tensor, Tensor]] = []

    def of(self, tensor: Tensor) -> Tensor:
        sides = [tensor.shape[0], *(min(side, 2) for side in tensor.shape[1:])]
        plan = torch.arange(self._next, self._next + prod(sides)).reshape(sides)
        self._starts.append(self._next)
        self._next += prod(sides)
        self._plans.append((plan, tensor))
        return plan

    def view(self, name: str, found: Tensor) -> Tensor:
        """The part of its tensor that `found` is of its plan."""
        if self._plans and found.dtype == torch.int64 and found.numel():
            first = int(found.flatten()[0])
            which = max(bisect_right(self._starts, first) - 1, 0)
            plan, tensor = self._plans[which]
            place = first - self._starts[which]
            if 0 <= place < plan.numel() and found.ndim <= plan.ndim:
                return _part(name, found, plan, tensor, place)
        raise UnsupportedModel(f"The model holds {name!r} in another form than its checkpoint.")


def _part(name: str, found: Tensor, plan: Tensor, tensor: Tensor, place: int) -> Tensor:
    corner: Iterable[Tensor] = torch.unravel_index(torch.tensor(place), plan.shape)
    sides = (1,) * (plan.ndim - found.ndim) + tuple(found.shape)
    cut = [(int(begin), int(begin) + side) for begin, side in zip(corner, sides, strict=True)]
    if not torch.equal(plan[tuple(slice(*edges) for edges in cut)].reshape(found.shape), found):
        raise UnsupportedModel(f"The model holds {name!r} in another form than its checkpoint.")
    scaled = [
        slice(begin * side // steps, end * side // steps)
        for (begin, end), side, steps in zip(cut, tensor.shape, plan.shape, strict=True)
    ]
    part = tensor[tuple(scaled)]
    # Leading sides of one are those that an expert's own tensor lacks.
    return part.reshape(part.shape[plan.ndim - found.ndim :])
