"""Random deltas and their merged models."""

import copy
from typing import Any

import torch

from deltadock.inference.model.weight_deltas import LowRank, NewRows, TensorDelta


def merge(base: Any, changes: dict[str, TensorDelta]) -> Any:
    """The base with a delta merged into it."""
    model = copy.deepcopy(base)
    added = {len(change.added) for change in changes.values() if isinstance(change, NewRows)}
    for count in added:
        model.resize_token_embeddings(base.config.vocab_size + count, mean_resizing=False)
    with torch.no_grad():
        for name, change in changes.items():
            parameter, old = model.get_parameter(name), change
            if isinstance(change, NewRows):
                rows = len(parameter) - len(change.added)
                parameter[rows:] = change.added
                parameter, old = parameter[:rows], change.old
            if isinstance(old, LowRank):
                parameter += old.u @ old.v
            elif old is not None:
                parameter.copy_(old)
    return model


def make_delta(
    model: Any, seed: int, *, low_rank: bool = True, added: int = 0
) -> dict[str, TensorDelta]:
    """Deltas of all tensors of the model: low-rank for matrices, replacements for the rest.

    The rows of `added` tokens are larger than the others, so that answers are full of them.
    """
    generator = torch.Generator().manual_seed(seed)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    changes: dict[str, TensorDelta] = {}
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2 and low_rank:
            rows, columns = parameter.shape
            changes[name] = LowRank(noise(rows, 3) * 0.2, noise(3, columns) * 0.2)
        else:
            changes[name] = parameter.detach() + 0.1 * noise(*parameter.shape)
        if added and len(parameter) == model.config.vocab_size:
            changes[name] = NewRows(changes[name], noise(added, parameter.shape[1]))
    return changes
