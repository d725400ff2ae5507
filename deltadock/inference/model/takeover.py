"""Puts the modules that know deltas in the place of a model's own."""

from typing import Any, Final

from torch import Tensor, nn

from deltadock.errors import UnsupportedModel
from deltadock.inference.model.layers import DeltaEmbedding, DeltaNorm
from deltadock.inference.model.linears import DeltaLinears, Output
from deltadock.inference.model.routing import DeltaModule, Routing

JOINED: Final = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Linears that share their input wherever one module has them all."""

Owners = dict[str, list[tuple[DeltaModule, str]]]
"""By a tensor's name: the modules that a change of it acts in, and what they call it."""


def replace_modules(model: Any, routing: Routing) -> tuple[Owners, dict[str, Tensor]]:
    """Replace every module of `model` that has parameters of its own.

    Returns:
        Who owns each tensor now, and the tensors, by the checkpoint's names.

    Raises:
        UnsupportedModel: it holds weights in a kind of module that has no per-row form.
    """
    owners: Owners = {}
    tensors: dict[str, Tensor] = {}

    def own(path: str, module: nn.Module, owner: DeltaModule, within: str = "") -> None:
        for name, parameter in module.named_parameters():
            owners[f"{path}.{name}"] = [(owner, within + name)]
            tensors[f"{path}.{name}"] = parameter

    def join(parent: str, linears: dict[str, nn.Linear]) -> None:
        tied = "lm_head" in linears and model.config.tie_word_embeddings
        joined = DeltaLinears(linears, routing, tied=tied)
        for number, (name, linear) in enumerate(linears.items()):
            path = f"{parent}.{name}".lstrip(".")
            own(path, linear, joined, f"{name}.")
            model.set_submodule(path, Output(joined, number) if len(linears) > 1 else joined)

    for path, module in list(model.named_modules()):
        for names in JOINED:
            if (linears := _linears(module, names)) is not None:
                join(path, linears)
        parameters = dict(module.named_parameters(recurse=False))
        if not parameters or any(f"{path}.{name}" in owners for name in parameters):
            continue
        if isinstance(module, nn.Linear):
            parent, _, name = path.rpartition(".")
            join(parent, {name: module})
            continue
        if isinstance(module, nn.Embedding):
            replacement: DeltaModule = DeltaEmbedding(module, routing)
        elif parameters.keys() == {"weight"} and parameters["weight"].ndim == 1:
            replacement = DeltaNorm(module, routing)
        else:
            raise UnsupportedModel(f"{path} is a {type(module).__name__}, which cannot be served.")
        own(path, module, replacement)
        model.set_submodule(path, replacement)
    return owners, tensors


def _linears(module: nn.Module, names: tuple[str, ...]) -> dict[str, nn.Linear] | None:
    """The module's linears of these names, if it has all, and all have a bias or none."""
    children = {name: getattr(module, name, None) for name in names}
    found = {name: child for name, child in children.items() if isinstance(child, nn.Linear)}
    alike = len({linear.bias is None for linear in found.values()}) == 1
    return found if len(found) == len(names) and alike else None
