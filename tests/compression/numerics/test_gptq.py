"""GPTQ against a plain float64 reference that updates one column at a time."""

import pytest
import torch
from torch import Tensor

from deltadock.compression.numerics import gptq
from deltadock.compression.numerics.gptq import (
    Codes,
    inverse_factors,
    search_grid,
)
from deltadock.compression.numerics.metric import DAMPING
from deltadock.errors import InvalidCalibration


def quantize_rows(values: Tensor, bits: Tensor, hessian: Tensor) -> tuple[Codes, float]:
    """`gptq.quantize_rows` of one matrix."""
    codes, (damping,) = gptq.quantize_rows(values[None], bits[None], hessian[None])
    return codes[0,], damping


def quantize_columns(values: Tensor, bits: Tensor, hessian: Tensor) -> tuple[Codes, float]:
    """`gptq.quantize_columns` of one matrix."""
    codes, (damping,) = gptq.quantize_columns(values[None], bits[None], hessian[None])
    return codes[0,], damping


def make_moment(n: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(n, 4 * n, generator=generator, dtype=torch.float64)
    mixing = torch.randn(n, n, generator=generator, dtype=torch.float64)
    inputs = mixing @ inputs
    return inputs @ inputs.T


def reference_rows(
    values: Tensor, scale: Tensor, zero: Tensor, bits: Tensor, hessian: Tensor
) -> Tensor:
    """Optimal brain quantization in column order, float64, the inverse updated explicitly."""
    n = values.shape[1]
    eye = torch.eye(n, dtype=torch.float64)
    inverse = torch.linalg.inv(hessian + DAMPING * hessian.diagonal().mean() * eye)
    work, codes = values.double().clone(), torch.zeros(values.shape, dtype=torch.float64)
    highest = 2.0 ** bits.double() - 1
    for j in range(n):
        code = (work[:, j] / scale.double()).round() + zero.double()
        codes[:, j] = torch.minimum(code.clamp_min(0), highest)
        error = work[:, j] - scale.double() * (codes[:, j] - zero.double())
        work -= torch.outer(error / inverse[j, j], inverse[j])
        inverse = inverse - torch.outer(inverse[:, j], inverse[j]) / inverse[j, j]
        inverse[j] = inverse[:, j] = 0
        inverse[j, j] = 1  # the column is finished; later writes to it have no effect
    return codes


@pytest.mark.parametrize("columns", [7, 128, 150])
def test_rows_equal_the_reference(columns: int) -> None:
    generator = torch.Generator().manual_seed(columns)
    values = torch.randn(21, columns, generator=generator)
    bits = torch.arange(21) % 7 + 2
    hessian = make_moment(columns)
    codes, damping = quantize_rows(values, bits, hessian)
    expected = reference_rows(values, codes.scale, codes.zero, bits, hessian)
    assert damping == DAMPING
    # Near a tie float32 may round the other way, which changes later columns.
    assert (codes.codes.double() == expected).double().mean() > 0.98
    assert (codes.codes.long() < 2 ** bits[:, None]).all()


def test_several_widths_at_once_equal_each_width_alone() -> None:
    values, hessian = (
        torch.randn(5, 40, generator=torch.Generator().manual_seed(1)),
        make_moment(40),
    )
    stacked, _ = quantize_rows(
        values.repeat(3, 1), torch.tensor([2, 5, 8]).repeat_interleave(5), hessian
    )
    for position, width in enumerate((2, 5, 8)):
        alone, _ = quantize_rows(values, torch.full((5,), width), hessian)
        index = torch.arange(5) + 5 * position
        assert torch.equal(stacked[index,].codes, alone.codes)


def test_compensation_reduces_the_output_error() -> None:
    values, hessian = (
        torch.randn(8, 96, generator=torch.Generator().manual_seed(2)),
        make_moment(96),
    )
    bits = torch.full((8,), 3)
    codes, _ = quantize_rows(values, bits, hessian)
    scale, zero, _ = search_grid(values, (2.0**bits - 1).float())
    nearest = (values / scale[:, None]).round() + zero[:, None]
    nearest = scale[:, None] * (nearest.clamp(0, 7) - zero[:, None])

    def loss(approximation: Tensor) -> float:
        error = (values - approximation).double()
        return float(((error @ hessian) * error).sum())

    assert loss(codes.decode()) < 0.7 * loss(nearest)


@pytest.mark.parametrize("columns", [9, 140])
def test_columns_are_quantized_with_their_own_widths(columns: int) -> None:
    values = torch.randn(30, columns, generator=torch.Generator().manual_seed(3))
    bits = torch.arange(columns) % 7 + 2
    hessian = make_moment(columns)
    codes, _ = quantize_columns(values, bits, hessian)
    # The reference with each column's final grid, shared by all rows.
    eye = torch.eye(columns, dtype=torch.float64)
    damped = hessian + DAMPING * hessian.diagonal().mean() * eye
    factor = torch.linalg.cholesky(torch.linalg.inv(damped), upper=True)
    work = values.double().clone()
    for i in range(columns):
        step, zero = codes.scale[i].double(), codes.zero[i].double()
        code = ((work[:, i] / step).round() + zero).clamp(0, 2.0 ** int(bits[i]) - 1)
        assert (codes.codes[i].double() == code).double().mean() > 0.9
        error = (work[:, i] - step * (codes.codes[i].double() - zero)) / factor[i, i]
        work[:, i + 1 :] -= torch.outer(error, factor[i, i + 1 :])


def test_eight_bits_are_nearly_exact() -> None:
    values = torch.randn(4, 33, generator=torch.Generator().manual_seed(4))
    codes, _ = quantize_rows(values, torch.full((4,), 8), torch.eye(33))
    assert (codes.decode() - values).abs().max() < 0.02


def test_dead_columns_and_constant_rows() -> None:
    hessian = make_moment(16)
    hessian[3] = hessian[:, 3] = 0
    values = torch.zeros(3, 16)
    values[1] = 2.5
    codes, _ = quantize_rows(values, torch.tensor([2, 2, 8]), hessian)
    decoded = codes.decode()
    assert torch.isfinite(decoded).all()
    assert decoded[0].abs().max() == 0
    torch.testing.assert_close(decoded[1], values[1])


def test_damping_is_raised_for_a_singular_hessian() -> None:
    hessian = make_moment(12)
    # Indefinite through rounding, as moments in low precision can be.
    hessian -= 0.05 * hessian.diagonal().mean() * torch.eye(12, dtype=torch.float64)
    values = torch.linalg.eigvalsh(hessian)
    hessian -= (values.min() + 0.05 * hessian.diagonal().mean()) * torch.eye(12)
    factor, (damping,) = inverse_factors(hessian[None])
    assert damping > DAMPING
    assert torch.isfinite(factor).all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_non_finite_hessian_is_rejected(bad: float) -> None:
    hessian = torch.eye(4)
    hessian[1, 2] = bad
    with pytest.raises(InvalidCalibration, match="NaN"):
        inverse_factors(hessian[None])
