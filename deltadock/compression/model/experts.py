"""Mixtures of experts: every expert's linear maps are seen one by one.

`transformers` holds the experts of a layer as two tensors, `gate_up_proj` (experts, 2 *
intermediate, hidden) and `down_proj` (experts, hidden, intermediate), and lets the code that runs
them be chosen; this module adds one that reports what goes in and out of each.
"""

from collections.abc import Callable
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

IMPLEMENTATION: Final = "deltadock"
"""The name under which `transformers` knows `run_experts`."""

Reporter = Callable[[str, int, Tensor, Tensor], None]
"""Told of a parameter's name, the expert, its inputs (tokens, h_in) and outputs (tokens, h_out)."""


def run_experts(experts: Any, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """The weighted sum of the chosen experts' outputs, (tokens, hidden).

    Args:
        experts: the module; its attribute `reporter`, where it has one, is told of every map.
        hidden: (tokens, hidden).
        top_k_index: (tokens, k), the experts of each token, all different.
        top_k_weights: (tokens, k).
    """
    total = torch.zeros_like(hidden)
    for expert in top_k_index.unique().tolist():
        token, choice = torch.where(top_k_index == expert)
        gated = experts._apply_gate(_apply(experts, "gate_up_proj", expert, hidden[token]))
        output = _apply(experts, "down_proj", expert, gated)
        weighted = output * top_k_weights[token, choice, None]
        # An expert sees a token once, so that the order of additions is fixed.
        total = total.index_add(0, token, weighted.to(total.dtype))
    return total


def _apply(experts: Any, parameter: str, expert: int, inputs: Tensor) -> Tensor:
    outputs = F.linear(inputs, getattr(experts, parameter)[expert])
    reporter: Reporter | None = getattr(experts, "reporter", None)
    if reporter is not None:
        reporter(parameter, expert, inputs, outputs)
    return outputs


ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, run_experts)


def is_experts(module: nn.Module) -> bool:
    """Whether `run_experts` runs the module."""
    return all(hasattr(module, name) for name in ("gate_up_proj", "down_proj", "_apply_gate"))
