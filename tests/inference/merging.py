"""Random deltas, and the fine-tuned models that they stand for."""

import copy
from typing import Any

import torch

from inference.model.changes import Change, LowRank


def merge(base: Any, changes: dict[str, Change]) -> Any:
    """The fine-tuned model that a delta stands for."""
    model = copy.deepcopy(base)
    with torch.no_grad():
        for name, change in changes.items():
            parameter = model.get_parameter(name)
            if isinstance(change, LowRank):
                parameter += change.u @ change.v
            else:
                parameter.copy_(change)
    return model


def make_delta(model: Any, seed: int, *, low_rank: bool = True) -> dict[str, Change]:
    """Changes of every kind of tensor that the model has: factors of matrices, the rest exactly."""
    generator = torch.Generator().manual_seed(seed)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    changes: dict[str, Change] = {}
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2 and low_rank:
            rows, columns = parameter.shape
            changes[name] = LowRank(noise(rows, 3) * 0.2, noise(3, columns) * 0.2)
        else:
            changes[name] = parameter.detach() + 0.1 * noise(*parameter.shape)
    return changes
