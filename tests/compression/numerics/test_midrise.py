"""Mid-rise codes: range, step sizes, and the gain of error compensation."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from deltadock.compression.numerics import midrise
from deltadock.compression.numerics.metric import Metric
from deltadock.compression.numerics.midrise import MidriseCodes

WIDTHS = (1, 2, 3, 4, 5, 6, 7, 8)
DISTORTION = {1: 0.3634, 2: 0.1188, 3: 0.0374, 4: 0.0115, 5: 0.0035, 6: 0.001, 8: 0.0001}
"""Mean square error of the best uniform quantizer of a unit Gaussian (Max, 1960), by width."""


def normal(rows: int, columns: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def steep(n: int, seed: int = 0) -> Metric:
    """A metric whose eigenvalues span five decades."""
    generator = torch.Generator().manual_seed(seed)
    turn = torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64)).Q
    moment = turn * torch.logspace(0, -5, n, dtype=torch.float64) @ turn.T
    moment.diagonal().add_(1e-6 * moment.diagonal().mean())
    return Metric(moment[None], torch.linalg.cholesky(moment)[None], [1e-6])


def quantize(values: Tensor, bits: Tensor, compensation: Tensor | None) -> MidriseCodes:
    """The codes of a single matrix, without the first dimension."""
    made = midrise.quantize(values[None], bits[None], compensation)
    return MidriseCodes(made.codes[0], made.bits[0], made.step[0])


def all_of(width: int, rows: int) -> Tensor:
    return torch.full((rows,), width)


def square_error(values: Tensor, codes: MidriseCodes) -> Tensor:
    return (values.double() - codes.decode().double()).square().sum(1)


@pytest.mark.parametrize("compensated", [False, True])
def test_codes_are_in_range_and_values_are_on_the_grid(compensated: bool) -> None:
    n = 133
    values, bits = normal(len(WIDTHS), n), torch.tensor(WIDTHS)
    codes = quantize(values, bits, steep(n).error_compensation() if compensated else None)
    assert codes.codes.dtype == torch.uint8
    assert codes.codes.shape == values.shape
    assert (codes.codes.amax(1) <= 2**bits - 1).all()
    for row, width in enumerate(WIDTHS):
        grid = codes.codes[row].double() - (2**width - 1) / 2
        torch.testing.assert_close(codes.units()[row].double(), grid)
        torch.testing.assert_close(codes.decode()[row].double(), codes.step[row].double() * grid)
    # The error decreases with width.
    error = square_error(values, codes) / values.double().square().sum(1)
    assert (error[1:] < error[:-1]).all()


def test_one_bit_is_a_sign_with_the_mean_magnitude() -> None:
    values = normal(3, 4000)
    codes = quantize(values, all_of(1, 3), None)
    assert torch.equal(codes.units().sign(), values.sign())
    best = 2 * values.abs().mean(1)
    torch.testing.assert_close(codes.step, best, rtol=0.15, atol=0)


@pytest.mark.parametrize("width", WIDTHS)
def test_the_step_beats_a_step_that_spans_the_largest_entry(width: int) -> None:
    values = normal(6, 600)
    codes = quantize(values, all_of(width, 6), None)
    highest = 2**width - 1
    spanning = 2 * values.abs().amax(1, keepdim=True) / highest
    plain = (
        (values / spanning + (highest + 1) / 2).floor().clamp(0, highest) - highest / 2
    ) * spanning
    lost = square_error(values, codes)
    assert (lost <= (values - plain).double().square().sum(1) * (1 + 1e-5)).all()
    if width in DISTORTION:  # finer grids lose 1e-4 or less, without an exact bound
        assert float((lost / values.double().square().sum(1)).mean()) < 1.35 * DISTORTION[width]


@pytest.mark.parametrize(("width", "share"), [(1, 0.85), (2, 0.5), (4, 0.3)])
def test_error_compensation_beats_rounding_under_a_steep_metric(width: int, share: float) -> None:
    n = 96
    values, metric = normal(8, n), steep(n)
    compensated_codes = quantize(values, all_of(width, 8), metric.error_compensation())
    rounded = quantize(values, all_of(width, 8), None)

    def weighted(codes: MidriseCodes) -> float:
        """Error under the metric with the optimal scale per row."""
        units, target = codes.units().double(), values.double()
        weighed = metric.times(units[None])[0]
        best = (weighed * target).sum(1) / (weighed * units).sum(1)
        residual = target - best[:, None] * units
        return float((metric.times(residual[None])[0] * residual).sum())

    assert weighted(compensated_codes) < share * weighted(rounded)


def test_error_compensation_equals_gptq_one_coordinate_at_a_time() -> None:
    n, width = 71, 3
    values, metric = normal(2, n), steep(n)
    codes = quantize(values, all_of(width, 2), metric.error_compensation())
    # OBQ's update, with the inverse of the remaining moment recomputed at every coordinate.
    work, highest = values.double(), 2**width - 1
    for j in range(n):
        inverse = torch.linalg.inv(metric.moment[0, j:, j:])
        position = work[:, j] / codes.step.double() + (highest + 1) / 2
        # On a boundary, float32 may round to either side.
        on_edge = (position - position.round()).abs() < 1e-3
        assert (on_edge | (position.floor().clamp(0, highest) == codes.codes[:, j])).all()
        error = work[:, j] - codes.decode()[:, j].double()
        work[:, j:] -= error[:, None] * inverse[0] / inverse[0, 0]


def test_under_a_diagonal_metric_codes_equal_plain_rounding() -> None:
    values = normal(4, 90)
    weights = torch.rand(90) + 0.1
    bits = torch.tensor([1, 2, 4, 8])
    compensated_codes = quantize(values, bits, Metric.of(weights.diag()[None]).error_compensation())
    assert torch.equal(compensated_codes.codes, quantize(values, bits, None).codes)


@pytest.mark.parametrize("compensated", [False, True])
def test_vectors_of_zero_stay_zero(compensated: bool) -> None:
    values = normal(3, 20)
    values[1] = 0
    upper = steep(20).error_compensation() if compensated else None
    codes = quantize(values, torch.tensor([2, 1, 8]), upper)
    assert torch.equal(codes.decode()[1], torch.zeros(20))
    assert torch.isfinite(codes.units()).all()
    assert codes.step[0] > 0


@given(
    rows=st.integers(1, 7),
    columns=st.integers(1, 70),
    seed=st.integers(0, 99),
    exponent=st.integers(-30, 30),
    compensated=st.booleans(),
)
@settings(max_examples=25, deadline=None)
def test_rows_are_quantized_independently(
    rows: int, columns: int, seed: int, exponent: int, compensated: bool
) -> None:
    values = normal(rows, columns, seed) * 10.0 ** torch.linspace(0, exponent, rows)[:, None]
    bits = torch.randint(1, 9, (rows,), generator=torch.Generator().manual_seed(seed))
    upper = steep(columns).error_compensation() if compensated and columns > 1 else None
    together = quantize(values, bits, upper)
    assert torch.isfinite(together.decode()).all()
    for row in range(rows):
        alone = quantize(values[row : row + 1], bits[row : row + 1], upper)
        assert torch.equal(alone.codes[0], together.codes[row])
        assert torch.equal(alone.step[0], together.step[row])
