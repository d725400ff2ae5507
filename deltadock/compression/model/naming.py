"""Which tensors of a checkpoint a model's parameters are made of.

Modules and checkpoints differ in names (`model.language_model.` is `model.` on disk), and in
shape where a checkpoint has a tensor for each expert's gate, up and down projection while the
modules hold all experts' in two.
"""

from collections.abc import Collection, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from deltadock.compression.model.families import Family
from deltadock.compression.model.weights import TensorSource


@dataclass(frozen=True, slots=True)
class Stored:
    """A parameter as the checkpoint has it.

    Attributes:
        names: for each expert, tensors whose rows follow each other; for any other parameter its
            own tensor alone.
        stacked: the parameter is the experts' matrices along a new first dimension.
    """

    names: tuple[tuple[str, ...], ...]
    stacked: bool = False

    def tensor(self, source: TensorSource) -> Tensor:
        """The parameter, put together."""
        if not self.stacked:
            return source.tensor(self.names[0][0])
        return torch.stack(
            [torch.cat([source.tensor(name) for name in rows]) for rows in self.names]
        )

    def all_names(self) -> Iterator[str]:
        """Every tensor it is made of."""
        for rows in self.names:
            yield from rows


def locate(
    parameter: str, experts: int, family: Family, prefix: str, names: Collection[str]
) -> Stored:
    """How a checkpoint with tensors `names` stores a parameter.

    Args:
        parameter: its name in the model.
        experts: how many experts' matrices it holds; 0: it holds none.
        family: of the model.
        prefix: the name of the body in the model, which checkpoints of the body alone lack.
        names: the checkpoint's tensors.
    """
    renamed = parameter
    for module, checkpoint in family.renamed:
        renamed = renamed.replace(module, checkpoint)
    spellings = (renamed, parameter, parameter.removeprefix(f"{prefix}."))
    for spelling in spellings:
        if spelling in names:
            return Stored(((spelling,),))
        if experts:
            stored = _by_expert(spelling, experts, family)
            if stored.names[0][0] in names:
                return stored
    return Stored(((renamed,),))


def _by_expert(parameter: str, experts: int, family: Family) -> Stored:
    folder, _, held = parameter.rpartition(".")
    gate, up, down = family.experts
    pieces = (gate, up) if held == "gate_up_proj" else (down,)
    return Stored(
        tuple(
            tuple(f"{folder}.{expert}.{piece}.weight" for piece in pieces)
            for expert in range(experts)
        ),
        stacked=True,
    )
