"""The base's product: `x @ weight.T + bias` for linear layers that share their input."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class BaseProduct:
    """Takes over the parameters of linears: one product, the outputs side by side.

    On the CPU, oneDNN keeps a float32 weight in an order of its own, in which a batch's few rows
    are up to twice as fast. The linears' own weights are then empty tensors of the meta device:
    of the shapes that they had.

    Attributes:
        h_in, h_outs: inputs, and outputs of each linear.
        device, dtype: the parameters'.
    """

    def __init__(self, linears: Sequence[nn.Linear], *, keep: bool = False) -> None:
        """All linears have a bias, or none has; `keep` the weight's rows, for another's use."""
        weights = [linear.weight for linear in linears]
        self.h_in, self.h_outs = linears[0].in_features, [len(weight) for weight in weights]
        self.device, self.dtype = weights[0].device, weights[0].dtype
        biases = [linear.bias for linear in linears if linear.bias is not None]
        self._bias = _joined(biases) if biases else None
        self._packed: Tensor | None = None
        self._weight = _joined(weights)
        if self._packs and not keep:
            self._packed = torch.ops.mkldnn._reorder_linear_weight(self._weight.detach(), None)
            for linear in linears:
                shape = nn.Parameter(linear.weight.to("meta"), requires_grad=False)
                linear.weight = shape
            self._weight = linears[0].weight

    @property
    def _packs(self) -> bool:
        kind = self.device.type, self.dtype
        return kind == ("cpu", torch.float32) and torch.backends.mkldnn.is_available()

    def __call__(self, x: Tensor) -> Tensor:
        """(1, rows, h_in) to (1, rows, h_out)."""
        if self._packed is None:
            return F.linear(x, self._weight, self._bias)
        product: Tensor = torch.ops.mkldnn._linear_pointwise(
            x, self._packed, self._bias, "none", [], ""
        )
        return product


def _joined(parameters: Sequence[Tensor]) -> Tensor:
    """Parameters one after another; each becomes a view of the whole."""
    if len(parameters) == 1:
        return parameters[0]
    whole = torch.cat([parameter.data for parameter in parameters])
    sizes = [len(parameter) for parameter in parameters]
    for parameter, part in zip(parameters, whole.split(sizes), strict=True):
        parameter.data = part
    return whole
