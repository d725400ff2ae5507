"""Decompositions under two metrics, losses per width, and alternating refits."""

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from deltadock.compression.numerics import two_sided
from deltadock.compression.numerics.metric import Metric, weighted_errors
from deltadock.compression.numerics.two_sided import (
    WIDTHS,
    QuantizedFactors,
    Side,
    Spectrum,
    fit_scales,
    quantize_factors,
    weighted_svd,
    width_losses,
)
from tests.compression.matrices import make_moment, make_task

SHAPES = [(24, 40), (40, 24), (1, 5), (5, 1), (4, 3), (16, 16)]


def metrics(h_out: int, h_in: int, *, diagonal: bool = False) -> tuple[Metric, Metric]:
    rows, columns = make_moment(h_out, seed=1), make_moment(h_in, seed=2)
    return Metric.of((rows.diagonal() if diagonal else rows)[None]), Metric.of(columns[None])


def dense(metric: Metric) -> Tensor:
    return metric.moment[0].diag() if metric.diagonal else metric.moment[0]


def product(spectrum: Spectrum) -> Tensor:
    (whole,) = (spectrum.u * spectrum.s[:, :, None]).mT @ spectrum.v
    return whole


def decoded(coded: QuantizedFactors, sides: tuple[Side, Side]) -> Tensor:
    u, v = sides[0].units(coded.u), sides[1].units(coded.v)
    (whole,) = (u * coded.s[:, :, None]).mT @ v
    return whole


def widths(ranks: int, u: int, v: int) -> tuple[Tensor, Tensor]:
    return torch.full((1, ranks), u), torch.full((1, ranks), v)


def weighted_error(residual: Tensor, rows: Metric, columns: Metric) -> float:
    return float(weighted_errors(residual[None], rows, columns))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("diagonal", [False, True])
def test_the_ranks_sum_to_the_delta(shape: tuple[int, int], diagonal: bool) -> None:
    delta = make_task(*shape).delta
    rows, columns = metrics(*shape, diagonal=diagonal)
    spectrum = weighted_svd(delta[None], rows, columns)
    assert spectrum.s.dtype == spectrum.u.dtype == spectrum.v.dtype == torch.float64
    torch.testing.assert_close(product(spectrum), delta.double(), rtol=1e-6, atol=1e-6)
    assert torch.equal(spectrum.s, spectrum.s.sort(descending=True).values)
    # Plain numpy with symmetric roots: singular values do not depend on the choice of root.
    left, right = (_root(dense(metric)) for metric in (rows, columns))
    values = np.linalg.svd(left @ delta.double().numpy() @ right, compute_uv=False)
    np.testing.assert_allclose(
        spectrum.s[0].numpy(), values[: spectrum.s.shape[1]], rtol=1e-5, atol=1e-7 * values[0]
    )


def _root(moment: Tensor) -> np.ndarray[tuple[int, int], np.dtype[np.float64]]:
    values, vectors = np.linalg.eigh(moment.numpy())
    root: np.ndarray[tuple[int, int], np.dtype[np.float64]] = (
        vectors * np.sqrt(values)
    ) @ vectors.T
    return root


@pytest.mark.parametrize("shape", SHAPES)
def test_a_dropped_rank_costs_its_value_squared(shape: tuple[int, int]) -> None:
    delta = make_task(*shape).delta
    rows, columns = metrics(*shape)
    spectrum = weighted_svd(delta[None], rows, columns)
    for vectors, metric in ((spectrum.u, rows), (spectrum.v, columns)):
        torch.testing.assert_close(
            (vectors @ metric.moment @ vectors.mT)[0],
            torch.eye(vectors.shape[1], dtype=torch.float64),
            rtol=0,
            atol=1e-5,
        )
    for rank in range(spectrum.s.shape[1]):
        one = slice(None), slice(rank, rank + 1)
        part = Spectrum(spectrum.u[one], spectrum.s[one], spectrum.v[one])
        error = weighted_error(product(part), rows, columns)
        assert error == pytest.approx(float(spectrum.s[0, rank]) ** 2, rel=1e-5)
    kept = weighted_svd(delta[None], rows, columns, limit=2)
    lost = weighted_error(delta.double() - product(kept), rows, columns)
    expected = float(spectrum.s[0, 2:].square().sum())
    assert lost == pytest.approx(expected, rel=1e-5, abs=1e-12 * float(spectrum.s[0, 0]) ** 2)


def test_a_delta_of_one_rank_and_one_of_none() -> None:
    rows, columns = metrics(6, 9)
    outer = torch.randn(6, 1) @ torch.randn(1, 9)
    assert weighted_svd(outer[None], rows, columns).s.shape == (1, 1)
    nothing = weighted_svd(torch.zeros(1, 6, 9), rows, columns)
    assert [part.shape for part in (nothing.u, nothing.s, nothing.v)] == [
        (1, 0, 6),
        (1, 0),
        (1, 0, 9),
    ]
    side = Side(rows)
    assert width_losses(side, nothing.u).shape == (1, 0, len(WIDTHS))
    assert width_losses(side.with_scale(nothing.u, nothing.s), nothing.u).shape == (
        1,
        0,
        len(WIDTHS),
    )


@pytest.mark.parametrize("size", [1e-12, 1e12])
def test_the_decomposition_scales_with_the_delta(size: float) -> None:
    delta, (rows, columns) = make_task(12, 20).delta, metrics(12, 20)
    small, large = (weighted_svd(delta[None] * factor, rows, columns) for factor in (1.0, size))
    torch.testing.assert_close(large.s, size * small.s, rtol=1e-5, atol=0)
    sides = Side(rows), Side(columns)
    first, second = (
        quantize_factors(delta[None] * factor, spectrum, sides, widths(spectrum.s.shape[1], 3, 3))
        for factor, spectrum in ((1.0, small), (size, large))
    )
    assert float(second.error) == pytest.approx(float(first.error) * size**2, rel=0.2)


@pytest.mark.parametrize("diagonal", [False, True])
@pytest.mark.parametrize("scaled", [False, True])
def test_losses_equal_each_vectors_quantization_error_and_decrease_with_width(
    diagonal: bool, scaled: bool
) -> None:
    h_out, h_in = 40, 64
    rows, columns = metrics(h_out, h_in, diagonal=diagonal)
    spectrum = weighted_svd(make_task(h_out, h_in).delta[None], rows, columns)
    side, vectors = Side(rows), spectrum.u
    if scaled:
        side = side.with_scale(vectors, spectrum.s)
        assert side.scale is not None
        assert torch.equal(side.scale, side.scale.half().double())
        assert float(side.scale.max()) == 1
    lost = width_losses(side, vectors)
    assert lost.shape == (*vectors.shape[:2], len(WIDTHS))
    assert ((lost >= 0) & (lost <= 1)).all()
    assert (lost.mean((0, 1)).diff() < 0).all()
    for position, width in enumerate(WIDTHS):
        for rank in (0, 7, vectors.shape[1] - 1):
            one = vectors[:, rank : rank + 1]
            units = side.units(side.quantize(one, torch.tensor([[width]])))[0, 0]
            root = torch.linalg.cholesky(dense(rows))
            # The least squares multiple under the metric, with numpy.
            best = np.linalg.lstsq((units @ root)[:, None].numpy(), (one[0, 0] @ root).numpy())
            assert float(lost[0, rank, position]) == pytest.approx(float(best[1][0]), rel=1e-3)


def test_losses_between_the_simulated_ranks_are_interpolated(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rows, columns = metrics(30, 30)
    spectrum = weighted_svd(make_task(30, 30).delta[None], rows, columns)
    whole = width_losses(Side(rows), spectrum.u)
    monkeypatch.setattr(two_sided, "SIMULATED", 10)
    some = width_losses(Side(rows), spectrum.u)
    count = spectrum.u.shape[1]
    picked = np.round(np.linspace(0, count - 1, 10))
    for position in range(len(WIDTHS)):
        chosen = whole[0, torch.from_numpy(picked).long(), position].numpy()
        expected = np.interp(np.arange(count), picked, chosen)
        np.testing.assert_allclose(some[0, :, position].numpy(), expected, atol=1e-6)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("width", [1, 2, 8])
def test_codes_beat_dropping_ranks_and_report_their_error(
    shape: tuple[int, int], width: int
) -> None:
    delta, (rows, columns) = make_task(*shape).delta, metrics(*shape)
    spectrum, sides = weighted_svd(delta[None], rows, columns), (Side(rows), Side(columns))
    coded = quantize_factors(
        delta[None], spectrum, sides, widths(spectrum.s.shape[1], width, width)
    )
    whole = float(spectrum.s.square().sum())
    assert float(coded.error) < whole
    assert torch.isfinite(coded.s).all()
    residual = delta.double() - decoded(coded, sides)
    assert float(coded.error) == pytest.approx(weighted_error(residual, rows, columns), rel=1e-6)
    if width == 8:
        assert float(coded.error) < 1e-3 * whole


@pytest.mark.parametrize("diagonal", [False, True])
@pytest.mark.parametrize("scaled", [False, True])
def test_the_error_does_not_increase_with_refinements_or_bits(diagonal: bool, scaled: bool) -> None:
    delta, (rows, columns) = make_task(32, 48).delta, metrics(32, 48, diagonal=diagonal)
    spectrum = weighted_svd(delta[None], rows, columns, limit=12)
    sides = Side(rows), Side(columns)
    if scaled:
        sides = sides[0].with_scale(spectrum.u, spectrum.s), sides[1]
    errors = [
        float(quantize_factors(delta[None], spectrum, sides, widths(12, 2, 2), count).error)
        for count in range(4)
    ]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.97 * errors[0]
    by_width = [
        float(quantize_factors(delta[None], spectrum, sides, widths(12, w, w)).error)
        for w in (1, 2, 4)
    ]
    assert by_width == sorted(by_width, reverse=True)


def test_kept_ranks_are_refitted_to_the_full_delta() -> None:
    delta, (rows, columns) = make_task(32, 48).delta, metrics(32, 48)
    spectrum, sides = weighted_svd(delta[None], rows, columns), (Side(rows), Side(columns))
    kept = Spectrum(spectrum.u[:, :4], spectrum.s[:, :4], spectrum.v[:, :4])
    coded = quantize_factors(delta[None], kept, sides, widths(4, 6, 6))
    dropped = float(spectrum.s[:, 4:].square().sum())
    # Four ranks cannot beat the four largest, and fine codes approach them.
    assert dropped <= float(coded.error) < 1.05 * dropped + 0.01 * float(kept.s.square().sum())


def test_ranks_of_zeros_change_nothing_and_get_no_scale() -> None:
    delta, (rows, columns) = make_task(20, 30).delta, metrics(20, 30)
    spectrum, sides = weighted_svd(delta[None], rows, columns, limit=6), (Side(rows), Side(columns))
    alone = quantize_factors(delta[None], spectrum, sides, widths(6, 2, 3))
    filled = Spectrum(
        F.pad(spectrum.u, (0, 0, 0, 4)), F.pad(spectrum.s, (0, 4)), F.pad(spectrum.v, (0, 0, 0, 4))
    )
    coded = quantize_factors(delta[None], filled, sides, widths(10, 2, 3))
    assert torch.equal(coded.s[:, 6:], torch.zeros(1, 4, dtype=torch.float64))
    torch.testing.assert_close(decoded(coded, sides), decoded(alone, sides))
    lost = width_losses(sides[0], filled.u)
    torch.testing.assert_close(lost[:, :6], width_losses(sides[0], spectrum.u))


@pytest.mark.parametrize("diagonal", [False, True])
def test_scales_are_the_least_squares_optimum(diagonal: bool) -> None:
    h_out, h_in, ranks = 7, 9, 4
    generator = torch.Generator().manual_seed(0)
    target = torch.randn(h_out, h_in, generator=generator, dtype=torch.float64)
    u = torch.randn(ranks, h_out, generator=generator, dtype=torch.float64)
    v = torch.randn(ranks, h_in, generator=generator, dtype=torch.float64)
    rows, columns = metrics(h_out, h_in, diagonal=diagonal)
    left, right = (torch.linalg.cholesky(dense(m)) for m in (rows, columns))
    design = torch.stack([(left.T @ u[j].outer(v[j]) @ right).flatten() for j in range(ranks)], 1)
    wanted = (left.T @ target @ right).flatten()
    best = np.linalg.lstsq(design.numpy(), wanted.numpy())[0]
    found = fit_scales(target[None], u[None], v[None], rows, columns)[0]
    np.testing.assert_allclose(found.numpy(), best, rtol=1e-6)


def test_equal_codes_share_their_scale() -> None:
    target = torch.randn(5, 6, dtype=torch.float64)
    u, v = torch.ones(2, 5, dtype=torch.float64), torch.ones(2, 6, dtype=torch.float64)
    rows, columns = metrics(5, 6)
    found = fit_scales(target[None], u[None], v[None], rows, columns)
    alone = fit_scales(target[None], u[None, :1], v[None, :1], rows, columns)
    assert torch.isfinite(found).all()
    assert float(found.sum()) == pytest.approx(float(alone), rel=1e-6)


def test_coordinates_of_scale_zero_decode_to_zero() -> None:
    delta = make_task(20, 24).delta
    delta[3] = 0
    rows, columns = metrics(20, 24, diagonal=True)
    spectrum = weighted_svd(delta[None], rows, columns)
    side = Side(rows).with_scale(spectrum.u, spectrum.s)
    assert side.scale is not None
    assert side.scale[0, 3] == 0
    sides = side, Side(columns)
    coded = quantize_factors(delta[None], spectrum, sides, widths(spectrum.s.shape[1], 2, 2))
    assert torch.equal(decoded(coded, sides)[3], torch.zeros(24, dtype=torch.float64))
    assert float(coded.error) < float(spectrum.s.square().sum())


def test_a_singular_refit_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    delta, (rows, columns) = make_task(8, 12).delta, metrics(8, 12)
    spectrum, sides = weighted_svd(delta[None], rows, columns), (Side(rows), Side(columns))
    plain = quantize_factors(delta[None], spectrum, sides, widths(spectrum.s.shape[1], 3, 3))
    assert plain.fallbacks == [[]]

    def failing(matrix: Tensor) -> tuple[Tensor, Tensor]:
        return matrix, torch.ones(len(matrix))

    monkeypatch.setattr(torch.linalg, "cholesky_ex", failing)
    coded = quantize_factors(delta[None], spectrum, sides, widths(spectrum.s.shape[1], 3, 3))
    assert coded.fallbacks == [["refit by eigendecomposition"]]
    assert float(coded.error) == pytest.approx(float(plain.error), rel=0.05)
