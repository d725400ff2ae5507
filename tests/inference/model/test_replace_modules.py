"""The modules of a model that have weights are replaced."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deltadock.errors import UnsupportedModel
from deltadock.inference.model.families import FAMILIES
from deltadock.inference.model.layers import DeltaLinears, replace_modules
from deltadock.inference.model.routing import DeltaLimits, DeltaModule, Routing
from deltadock.kernels.svd_delta import Chunks


class Mlp(nn.Module):
    def __init__(self, *, bias_up: bool = False) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(6, 10, bias=False)
        self.up_proj = nn.Linear(6, 4, bias=bias_up)
        self.down_proj = nn.Linear(10, 6)


class Model(nn.Module):
    def __init__(self, part: nn.Module) -> None:
        super().__init__()
        self.part = part


def routed(model: nn.Module) -> tuple[dict[str, list[tuple[DeltaModule, str]]], dict[str, Tensor]]:
    routing = Routing(DeltaLimits(slots=2, rows=4))
    owners, tensors = replace_modules(model, routing, FAMILIES["llama"])
    modules = {module for owned in owners.values() for module, _ in owned}
    tables = [module.table for module in modules if isinstance(module, DeltaLinears)]
    routing.chunks = Chunks(4, 2, tables)
    routing.chunks.assign([0, 0, 0])
    return owners, tensors


def test_linears_with_one_input_are_one_product() -> None:
    part = Mlp()
    weights = {name: tensor.clone() for name, tensor in part.named_parameters()}
    owners, tensors = routed(Model(part))
    joined = part.gate_up_proj
    assert isinstance(joined, DeltaLinears)
    assert owners["part.gate_proj.weight"] == [(joined, "gate_proj.weight")]
    assert owners["part.up_proj.weight"] == [(joined, "up_proj.weight")]
    for name, before in weights.items():
        assert tensors[f"part.{name}"].shape == before.shape
    x = torch.randn(1, 3, 6)
    with torch.inference_mode():
        expected = [F.linear(x, weights[f"{name}_proj.weight"]) for name in ("gate", "up")]
        torch.testing.assert_close(joined(x), torch.cat(expected, dim=-1))


def test_linears_that_cannot_be_fused_are_refused() -> None:
    with pytest.raises(UnsupportedModel, match="gate_proj, up_proj have a bias"):
        routed(Model(Mlp(bias_up=True)))


def test_an_unknown_kind_of_module_is_refused() -> None:
    with pytest.raises(UnsupportedModel, match="part is a Conv1d"):
        routed(Model(nn.Conv1d(2, 2, 1)))
