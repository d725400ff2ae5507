"""Fused linears return each caller's outputs for its input."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deltadock.errors import UnsupportedModel
from deltadock.inference.model.layers import DeltaLinears, LinearOutput, replace_modules
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
    owners, tensors = replace_modules(model, routing)
    modules = {module for owned in owners.values() for module, _ in owned}
    tables = [module.table for module in modules if isinstance(module, DeltaLinears)]
    routing.chunks = Chunks(4, 2, tables)
    routing.chunks.assign([0, 0, 0])
    return owners, tensors


def test_every_input_gets_its_own_answer() -> None:
    part = Mlp()
    weights = {name: tensor.clone() for name, tensor in part.named_parameters()}
    owners, tensors = routed(Model(part))
    assert isinstance(part.gate_proj, LinearOutput)
    joined = owners["part.gate_proj.weight"][0][0]
    assert owners["part.up_proj.weight"] == [(joined, "up_proj.weight")]
    for name, before in weights.items():
        assert tensors[f"part.{name}"].shape == before.shape
    first, second = torch.randn(2, 1, 3, 6)
    # In the usual order, then with inputs that differ, then in another order.
    calls = [("gate", first), ("up", first), ("gate", first), ("up", second), ("up", first)]
    calls += [("gate", second), ("gate", first), ("up", first)]
    with torch.inference_mode():
        for name, x in calls:
            expected = F.linear(x, weights[f"{name}_proj.weight"])
            torch.testing.assert_close(getattr(part, f"{name}_proj")(x), expected)


def test_linears_that_cannot_be_fused_stay_separate() -> None:
    part = Mlp(bias_up=True)
    owners, _ = routed(Model(part))
    assert isinstance(part.gate_proj, DeltaLinears)
    assert owners.keys() == {f"part.{name}.weight" for name in NAMES} | {
        "part.up_proj.bias",
        "part.down_proj.bias",
    }
    x = torch.randn(1, 3, 6)
    with torch.inference_mode():
        assert part.up_proj(x).shape == (1, 3, 4)


NAMES = ("gate_proj", "up_proj", "down_proj")


def test_an_unknown_kind_of_module_is_refused() -> None:
    with pytest.raises(UnsupportedModel, match="part is a Conv1d"):
        routed(Model(nn.Conv1d(2, 2, 1)))
