"""Metrics against plain float64 linear algebra."""

import numpy as np
import pytest
import torch
from torch import Tensor

from deltadock.compression.numerics.metric import DAMPING, Metric, weighted_errors
from deltadock.errors import InvalidCalibration
from tests.compression.matrices import make_moment

N = 12
ROWS = torch.randn(5, N, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


def moment_of(*, diagonal: bool) -> Tensor:
    moment = make_moment(N)
    return moment.diagonal().clone() if diagonal else moment


def dense(metric: Metric) -> Tensor:
    return metric.moment[0].diag() if metric.diagonal else metric.moment[0]


@pytest.fixture(params=[False, True], ids=["dense", "diagonal"])
def metric(request: pytest.FixtureRequest) -> Metric:
    return Metric.of(moment_of(diagonal=request.param)[None])


@pytest.mark.parametrize("diagonal", [False, True])
def test_a_fraction_of_the_mean_diagonal_is_added(diagonal: bool) -> None:
    moment = moment_of(diagonal=diagonal)
    metric = Metric.of(moment.float()[None])
    assert metric.damping == [DAMPING]
    assert metric.diagonal == diagonal
    added = DAMPING * make_moment(N).diagonal().mean()
    expected = (moment.diag() if diagonal else moment) + added * torch.eye(N)
    torch.testing.assert_close(dense(metric), expected, rtol=1e-6, atol=1e-6)
    factor = metric.factor[0].diag() if diagonal else metric.factor[0]
    torch.testing.assert_close(factor @ factor.T, dense(metric))
    assert torch.equal(factor, factor.tril())


def test_products_and_solves(metric: Metric) -> None:
    moment = dense(metric)
    factor = torch.linalg.cholesky(moment)
    torch.testing.assert_close(metric.whiten(ROWS[None])[0], ROWS @ factor)
    torch.testing.assert_close(metric.unwhiten(ROWS[None])[0], ROWS @ torch.linalg.inv(factor))
    torch.testing.assert_close(metric.times(ROWS[None])[0], ROWS @ moment)


def test_a_scaled_metric_preserves_the_norm_of_divided_coordinates(metric: Metric) -> None:
    scale = torch.logspace(-6, 1, N, dtype=torch.float64)
    scaled = metric.scaled(scale[None])
    torch.testing.assert_close(dense(scaled), scale[:, None] * dense(metric) * scale)
    # Coordinates divided by the scale have the same norm under the scaled metric.
    torch.testing.assert_close(
        scaled.whiten((ROWS / scale)[None]).square().sum(2),
        metric.whiten(ROWS[None]).square().sum(2),
    )


@pytest.mark.parametrize("smallest", [1.0, 1e-7])
def test_error_compensation_is_the_upper_factor_of_the_inverse(smallest: float) -> None:
    # Half-precision scales may span seven decades.
    scale = torch.logspace(float(np.log10(smallest)), 0, N, dtype=torch.float64)
    metric = Metric.of(make_moment(N)[None]).scaled(scale[None])
    (upper,) = metric.error_compensation()
    assert upper.dtype == torch.float32
    assert torch.equal(upper, upper.triu())
    inverse = torch.linalg.inv(Metric.of(make_moment(N)[None]).moment[0]) / scale[:, None] / scale
    scaled = scale[:, None] * (upper.double().T @ upper.double()) * scale
    torch.testing.assert_close(scaled, scale[:, None] * inverse * scale, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("shape", [(4, 4), (4,)])
def test_a_zero_moment_gives_the_identity(shape: tuple[int, ...]) -> None:
    metric = Metric.of(torch.zeros(shape)[None])
    torch.testing.assert_close(dense(metric), torch.eye(4, dtype=torch.float64))
    assert metric.damping == [DAMPING]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("shape", [(3, 3), (3,)])
def test_a_non_finite_moment_is_rejected(bad: float, shape: tuple[int, ...]) -> None:
    moment = torch.ones(shape)
    moment[1] = bad
    with pytest.raises(InvalidCalibration, match="NaN"):
        Metric.of(moment[None])


@pytest.mark.parametrize(
    ("negative", "damping"), [(0.0, DAMPING), (0.05, 10 * DAMPING), (0.5, 100 * DAMPING)]
)
def test_damping_rises_until_the_moment_is_positive(negative: float, damping: float) -> None:
    """Of that moment alone, among others."""
    values = torch.ones(N, dtype=torch.float64)
    values[0], values[1] = -negative, 1 + negative
    turn = torch.linalg.qr(torch.randn(N, N, dtype=torch.float64)).Q
    metric = Metric.of(torch.stack([make_moment(N), turn * values @ turn.T]))
    assert metric.damping == pytest.approx([DAMPING, damping])
    assert torch.linalg.eigvalsh(metric.moment[1])[0] > 0


def test_a_moment_that_stays_indefinite_is_rejected() -> None:
    with pytest.raises(InvalidCalibration, match="not positive"):
        Metric.of(torch.tensor([[[10.0, 20.0], [20.0, 10.0]]]))


@pytest.mark.parametrize("diagonal", [False, True])
def test_weighted_errors_are_traces(diagonal: bool) -> None:
    residual = torch.randn(7, N, dtype=torch.float64)
    moment = make_moment(7)
    rows = Metric.of((moment.diagonal() if diagonal else moment)[None])
    columns = Metric.of(make_moment(N)[None])
    expected = torch.trace(dense(rows) @ residual @ columns.moment[0] @ residual.T)
    (error,) = weighted_errors(residual[None], rows, columns).tolist()
    assert error == pytest.approx(float(expected))
