"""Cases of the base's product in Triton against float64."""

import os
from collections.abc import Callable
from functools import partial
from itertools import product
from typing import Final

import torch
from torch import Tensor

from deltadock.kernels.linear.triton import Form, fits, linear

DEVICE: Final = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"
TOLERANCE: Final = {torch.float16: 1e-3, torch.bfloat16: 4e-3}
FORMS: Final = [Form(16, 4, 2, 32), Form(32, 2, 1, 8), Form(16, 8, 4, 32)]
SHAPES: Final = [(40, 256), (33, 328), (16, 24)]
"""Outputs and inputs: whole steps of all forms but the last; a part of one; less than a chunk."""
CASES: dict[str, Callable[[], None]] = {}
"""By name."""


def operands(
    rows: int, shape: tuple[int, int], dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """x, each row a part of a longer one; weight and bias. What lies past them is not a number."""
    generator = torch.Generator().manual_seed(0)
    h_out, h_in = shape
    x = torch.full((rows + 1, h_in + 8), torch.nan)
    x[:rows, :h_in] = torch.randn(rows, h_in, generator=generator)
    weight = torch.full((h_out + 1, h_in), torch.nan)
    weight[:h_out] = torch.randn(h_out, h_in, generator=generator) / h_in**0.5
    bias = torch.randn(h_out, generator=generator)
    return (
        x.to(DEVICE, dtype)[:rows, :h_in],
        weight.to(DEVICE, dtype)[:h_out],
        bias.to(DEVICE, dtype),
    )


def equals_float64(form: Form, shape: tuple[int, int], dtype: torch.dtype, rows: int) -> None:
    x, weight, bias = operands(rows, shape, dtype)
    assert fits(x, weight)
    for added in (bias, None):
        want = x.double() @ weight.double().T + (0 if added is None else added.double())
        got = linear(x, weight, added, form).double()
        assert float((got - want).norm() / want.norm()) < TOLERANCE[dtype]


def a_row_has_the_same_bits_beside_any_others() -> None:
    x, weight, bias = operands(11, (40, 328), torch.bfloat16)
    whole = linear(x, weight, bias, FORMS[0])
    for first, last in ((0, 1), (3, 11), (10, 11)):
        alone = linear(x[first:last], weight, bias, FORMS[0])
        assert torch.equal(alone, whole[first:last])


for form, shape in product(FORMS, SHAPES):
    for dtype, rows in ((torch.bfloat16, 1), (torch.float16, 9)):
        name = f"{form.columns}x{form.warps}x{form.chunks}, {shape}, {dtype}, {rows} rows"
        CASES[f"product {name}"] = partial(equals_float64, form, shape, dtype, rows)
CASES["product: a row's bits"] = a_row_has_the_same_bits_beside_any_others
