"""The base's product, `x @ weight.T + bias`, for linear layers that share their input."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Product:
    """A weight (h_out, h_in) and, if there is one, a bias (h_out,).

    On the CPU, oneDNN puts a float32 weight in an order of its own, in which a batch's few rows
    are up to twice as fast.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, *, plain: bool = False) -> None:
        """Take over the tensors; a `plain` weight stays as it is."""
        self.device, self.dtype = weight.device, weight.dtype
        self.packed = (
            not plain
            and (self.device.type, self.dtype) == ("cpu", torch.float32)
            and torch.backends.mkldnn.is_available()
        )
        """Whether the weight is in oneDNN's order."""
        self.bias = bias
        self._weight = (
            torch.ops.mkldnn._reorder_linear_weight(weight, None) if self.packed else weight
        )

    def __call__(self, x: Tensor) -> Tensor:
        """(1, rows, h_in) to (1, rows, h_out)."""
        if not self.packed:
            return F.linear(x, self._weight, self.bias)
        product: Tensor = torch.ops.mkldnn._linear_pointwise(
            x, self._weight, self.bias, "none", [], ""
        )
        return product

    def copy(self) -> tuple[Tensor, Tensor | None]:
        """Weight and bias in float32, in memory of their own."""
        weight = (
            self._weight.to_dense() if self.packed else self._weight.to(torch.float32, copy=True)
        )
        return weight, None if self.bias is None else self.bias.to(torch.float32, copy=True)


def joined(linears: Sequence[nn.Linear], *, plain: bool = False) -> Product:
    """Take over the parameters of linears, which all have a bias, or none has; outputs lie side by
    side.

    The linears' own weights become views, or tensors of the meta device that tell their shapes.
    """
    weight = _joined([linear.weight for linear in linears])
    biases = [linear.bias for linear in linears if linear.bias is not None]
    product = Product(weight.detach(), _joined(biases) if biases else None, plain=plain)
    if product.packed:
        for linear in linears:
            linear.weight = nn.Parameter(linear.weight.to("meta"), requires_grad=False)
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
