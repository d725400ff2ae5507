"""`x @ weight.T + bias`, the base's product.

On a GPU with a form in `triton.FORMS` few rows take a kernel of their own; all else is PyTorch's.
"""

import torch.nn.functional as F
from torch import Tensor

from deltadock.kernels import dispatch

__all__ = ["linear"]


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """(rows, h_in) to (rows, h_out); weight (h_out, h_in), bias (h_out,), of one dtype."""
    if dispatch.on_gpu(x):
        from deltadock.kernels.linear import triton

        form = triton.form_of(x.device)
        if form is not None and triton.fits(x, weight):
            return triton.linear(x, weight, bias, form)
    return F.linear(x, weight, bias)
