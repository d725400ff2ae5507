"""Observe the inputs and output gradients of a block's linear maps while it runs."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from deltadock.compression.checkpoints import MatrixRef
from deltadock.compression.model.families import StoredParameter, is_experts

Observer = Callable[[str, Tensor], None]
"""Called with a linear map's key and its inputs (..., h_in), or the gradient at its outputs
(..., h_out)."""


class LinearSite(NamedTuple):
    """The place of a linear map in a block.

    Attributes:
        ref: the map in the checkpoint.
        module: the module's name within the block.
        parameter: the module's parameter.
        expert: index of the expert, in a mixture.
        rows: the map's rows of the parameter.
    """

    ref: MatrixRef
    module: str
    parameter: str
    expert: int | None = None
    rows: slice = slice(None)


def sites(block: nn.Module, name: str, stored: Mapping[str, StoredParameter]) -> list[LinearSite]:
    """The linear maps of a block; those that share an input are consecutive."""
    found = []
    for path, module in block.named_modules():
        if isinstance(module, nn.Linear | Conv1D):
            (tensor,) = stored[f"{name}.{path}.weight"].all_names()
            ref = MatrixRef(tensor, transposed=isinstance(module, Conv1D))
            found.append(LinearSite(ref, path, "weight"))
        elif is_experts(module):
            found += _expert_sites(module, path, name, stored)
    return found


def _expert_sites(
    module: Any, path: str, name: str, stored: Mapping[str, StoredParameter]
) -> Iterator[LinearSite]:
    parameters = ("gate_up_proj", "down_proj")
    for expert in range(len(module.gate_up_proj)):
        for parameter in parameters:
            held = stored[f"{name}.{path}.{parameter}"]
            if not held.stacked:
                (tensor,) = held.all_names()
                ref = MatrixRef(tensor, expert, module.is_transposed, f"{name}.{path}.{parameter}")
                yield LinearSite(ref, path, parameter, expert)
                continue
            tensors = held.names[expert]
            height = getattr(module, parameter).shape[1] // len(tensors)
            for number, tensor in enumerate(tensors):
                rows = slice(number * height, (number + 1) * height)
                ref = MatrixRef(tensor, mixture=f"{name}.{path}.{parameter}.{number}")
                yield LinearSite(ref, path, parameter, expert, rows)


@contextmanager
def observed(
    block: nn.Module,
    places: Iterable[LinearSite],
    inputs: Observer | None,
    gradients: Observer | None,
) -> Iterator[None]:
    """Call observers with the inputs and output gradients of a block's linear maps.

    Maps that share an input are observed consecutively, with the same tensor object.
    """
    by_module: dict[str, list[LinearSite]] = {}
    for site in places:
        by_module.setdefault(site.module, []).append(site)
    hooks = []
    mixtures: list[Any] = []
    for path, found in by_module.items():
        module = block.get_submodule(path)
        if is_experts(module):
            mixtures.append(module)
            mixtures[-1].observer = _expert_observer(found, inputs, gradients)
        else:
            hooks.append(module.register_forward_hook(_hook(found[0], inputs, gradients)))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for module in mixtures:
            del module.observer


def _hook(
    site: LinearSite, inputs: Observer | None, gradients: Observer | None
) -> Callable[..., None]:
    def hook(_module: nn.Module, args: tuple[Tensor, ...], outputs: Tensor) -> None:
        _report([site], args[0], outputs, inputs, gradients)

    return hook


def _expert_observer(
    places: Iterable[LinearSite], inputs: Observer | None, gradients: Observer | None
) -> Callable[[str, int, Tensor, Tensor], None]:
    by_map: dict[tuple[str, int | None], list[LinearSite]] = {}
    for site in places:
        by_map.setdefault((site.parameter, site.expert), []).append(site)

    def observe(parameter: str, expert: int, x: Tensor, y: Tensor) -> None:
        _report(by_map[parameter, expert], x, y, inputs, gradients)

    return observe


def _report(
    places: Iterable[LinearSite],
    x: Tensor,
    y: Tensor,
    inputs: Observer | None,
    gradients: Observer | None,
) -> None:
    for site in places:
        if inputs is not None:
            with torch.no_grad():
                inputs(site.ref.key, x)
        if gradients is not None:
            y.register_hook(partial(_report_gradient, site, gradients))


def _report_gradient(site: LinearSite, observe: Observer, gradient: Tensor) -> None:
    observe(site.ref.key, gradient[..., site.rows])
