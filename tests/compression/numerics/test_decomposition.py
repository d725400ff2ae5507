"""Truncated decompositions against the full SVD in float64."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from benchmarks.operators import OperatorCounter
from deltadock.compression.numerics import decomposition
from deltadock.compression.numerics.decomposition import Decomposition, decompose
from tests.compression.matrices import make_task

Spectrum = Callable[[Tensor], Tensor]
SPECTRA: dict[str, Spectrum] = {
    "flat": lambda rank: 1 - rank / 400,
    "exponential": lambda rank: torch.exp(-rank / 12),
    "power": lambda rank: (1 + rank) ** -0.7,
}


def make_matrix(rows: int, columns: int, spectrum: Spectrum) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    left = torch.linalg.qr(torch.randn(rows, rows, generator=generator)).Q
    right = torch.linalg.qr(torch.randn(columns, rows, generator=generator)).Q
    return (left * spectrum(torch.arange(rows).float())) @ right.T


def lost(delta: Tensor, found: Decomposition) -> float:
    """Squared norm of the residual."""
    product = (found.u.double() * found.s.double()) @ found.v.double()
    return float((delta.double() - product).square().sum())


@pytest.fixture
def iterated(monkeypatch: pytest.MonkeyPatch) -> None:
    """Uses the iteration for small matrices too."""
    monkeypatch.setattr(decomposition, "DENSE_SIZE", 64)


@pytest.mark.parametrize("shape", [(48, 80), (80, 48), (4, 3), (1, 5)])
def test_all_ranks_reproduce_the_matrix_with_fixed_signs(shape: tuple[int, int]) -> None:
    delta = make_task(*shape).delta
    (found,) = decompose(delta[None], min(shape))
    values = torch.linalg.svdvals(delta.double())[: len(found.s)]
    torch.testing.assert_close(found.s.double(), values, rtol=1e-5, atol=0)
    torch.testing.assert_close((found.u * found.s) @ found.v, delta, rtol=1e-4, atol=1e-4)
    assert found.fallback is None
    peaks = found.v.abs().argmax(dim=1)
    assert (found.v[torch.arange(len(found.s)), peaks] > 0).all()
    (flipped,) = decompose(-delta[None], min(shape))
    torch.testing.assert_close(flipped.v, found.v)
    torch.testing.assert_close(flipped.u, -found.u)


@pytest.mark.usefixtures("iterated")
@pytest.mark.parametrize("name", SPECTRA)
@pytest.mark.parametrize("turned", [False, True])
def test_the_iteration_equals_the_truncated_svd(name: str, turned: bool) -> None:
    delta = make_matrix(300, 340, SPECTRA[name])
    delta = delta.T if turned else delta
    (found,) = decompose(delta[None], 40)
    values = torch.linalg.svdvals(delta.double())
    assert found.fallback is None
    assert len(found.s) == 40
    torch.testing.assert_close(found.s.double(), values[:40], rtol=2e-3, atol=0)
    assert lost(delta, found) < (1 + 1e-3) * float(values[40:].square().sum())
    eye = torch.eye(40)
    torch.testing.assert_close(found.u.T @ found.u, eye, rtol=0, atol=1e-5)
    torch.testing.assert_close(found.v @ found.v.T, eye, rtol=0, atol=1e-5)
    (again,) = decompose(delta[None], 40)
    assert all(torch.equal(a, b) for a, b in zip(found[:3], again[:3], strict=True))


@pytest.mark.usefixtures("iterated")
def test_a_spectrum_too_steep_for_float32_falls_back_with_a_note() -> None:
    delta = make_matrix(300, 340, lambda rank: torch.where(rank < 5, 1.0, 1e-4))
    (found,) = decompose(delta[None], 40)
    assert found.fallback is not None
    values = torch.linalg.svdvals(delta.double())
    torch.testing.assert_close(found.s.double(), values[:40], rtol=1e-3, atol=0)


@pytest.mark.usefixtures("iterated")
def test_a_batch_equals_each_alone_in_as_many_operators() -> None:
    """They converge after different numbers of passes, or not at all."""
    steep = make_matrix(120, 140, lambda rank: torch.where(rank < 5, 1.0, 1e-4))
    deltas = torch.stack(
        [*(make_matrix(120, 140, one) for one in SPECTRA.values()), torch.zeros(120, 140), steep]
    )
    with OperatorCounter() as five:
        together = decompose(deltas, 20)
    with OperatorCounter() as ten:
        decompose(deltas.repeat(2, 1, 1), 20)
    assert abs(ten.total - five.total) < 30, "a pass more or less"
    for delta, found in zip(deltas, together, strict=True):
        (alone,) = decompose(delta[None], 20)
        assert found.fallback == alone.fallback
        assert len(found.s) == len(alone.s)
        torch.testing.assert_close(found.s, alone.s, rtol=1e-4, atol=1e-9)
        torch.testing.assert_close(lost(delta, found), lost(delta, alone), rtol=1e-3, atol=1e-9)


@pytest.mark.usefixtures("iterated")
def test_an_unconverged_iteration_falls_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decomposition, "PASSES", 1)
    delta = make_matrix(300, 340, SPECTRA["power"])
    (found,) = decompose(delta[None], 40)
    assert found.fallback is not None
    values = torch.linalg.svdvals(delta.double())
    torch.testing.assert_close(found.s.double(), values[:40], rtol=1e-5, atol=0)


def test_ranks_at_rounding_level_are_dropped() -> None:
    delta = torch.outer(torch.linspace(-1, 1, 48), torch.linspace(0.1, 2, 80))
    (found,) = decompose(delta[None], 20)
    assert len(found.s) == 1
    torch.testing.assert_close((found.u * found.s) @ found.v, delta)


@pytest.mark.parametrize("size", [(6, 9), (2000, 8)])
def test_a_delta_of_zero_has_one_rank_of_zero(size: tuple[int, int]) -> None:
    (found,) = decompose(torch.zeros(1, *size), 5)
    assert found.s.tolist() == [0.0]
    assert torch.isfinite(found.u).all()
    assert torch.isfinite(found.v).all()
