"""AdaMix: each step against plain float64, and edge cases."""

import numpy as np
import pytest
import torch

from deltadock.artifacts.encodings import decode_factors, decode_svd
from deltadock.compression.methods.adamix import (
    CANDIDATES,
    AdaMix,
    refit_left_factors,
    simulated_errors,
)
from deltadock.compression.methods.base import MatrixTask
from deltadock.compression.numerics.allocation import WIDTHS
from deltadock.compression.numerics.decomposition import decompose
from deltadock.compression.numerics.gptq import quantize_rows
from deltadock.compression.options import rank_budget
from tests.compression.matrices import compress_one, make_task, output_error


def test_simulated_errors_equal_the_output_errors() -> None:
    """`E[i, b]` is the layer's output error when only rank i is quantized to b bits."""
    task = make_task()
    ((u, s, v, *_),) = decompose(task.delta[None], 6)
    widths = torch.tensor(CANDIDATES).repeat_interleave(6)
    simulated, _ = quantize_rows(
        v.repeat(len(CANDIDATES), 1)[None], widths[None], task.moment[None]
    )
    (errors,) = simulated_errors(v[None], s[None], simulated, task.moment[None])
    (decoded,) = simulated.decode()
    for i in (0, 5):
        whole = torch.outer(u[:, i], s[i] * v[i])
        dropped = output_error(whole, torch.zeros_like(whole), task.moment)
        assert float(errors[i, 0]) == pytest.approx(dropped, rel=1e-4)
        for k in range(len(CANDIDATES)):
            part = torch.outer(u[:, i], s[i] * decoded[k * 6 + i])
            assert float(errors[i, k + 1]) == pytest.approx(
                output_error(whole, part, task.moment), rel=1e-4
            )


def test_target_correction_is_the_least_squares_solution() -> None:
    task = make_task()
    ((u, s, v, *_),) = decompose(task.delta[None], 12)
    right = s[:, None] * (
        v + 0.1 * torch.randn(v.shape, generator=torch.Generator().manual_seed(1))
    )
    (corrected,), (hessian,), (fallback,) = refit_left_factors(
        task.delta[None], u[None], right[None], task.moment[None]
    )
    root = torch.linalg.cholesky(task.moment)
    expected = torch.linalg.lstsq(
        (right.double() @ root).T, (task.delta.double() @ root).T, driver="gelsd"
    ).solution.T
    torch.testing.assert_close(corrected.double(), expected, rtol=2e-3, atol=2e-4)
    assert fallback is None
    torch.testing.assert_close(hessian, right.double() @ task.moment @ right.double().T)
    before = output_error(task.delta, u @ right, task.moment)
    assert output_error(task.delta, corrected @ right, task.moment) < 0.9 * before


def test_a_fallback_is_reported() -> None:
    task = make_task()
    ((u, s, v, *_),) = decompose(task.delta[None], 12)
    # Not a second moment: too indefinite for every ridge.
    indefinite = torch.diag(torch.tensor([1.0] * 48 + [-1.0] * 32, dtype=torch.float64))
    (corrected,), _, (fallback,) = refit_left_factors(
        task.delta[None], u[None], (s[:, None] * v)[None], indefinite[None]
    )
    assert fallback is not None
    assert torch.isfinite(corrected).all()


@pytest.mark.parametrize("shape", [(48, 80), (33, 7), (80, 48)])
@pytest.mark.parametrize("bits", [0.5, 1.0, 3.0])
def test_the_budget_holds_and_is_reported(shape: tuple[int, int], bits: float) -> None:
    result = compress_one(AdaMix(), make_task(*shape, bits=bits))
    matrix = decode_svd(result.encoded)
    np.testing.assert_array_equal(matrix.u.bits, matrix.v.bits)
    assert matrix.v.bits.sum() <= rank_budget(bits, *shape)
    assert len({*matrix.v.bits.tolist(), 0}) <= 4
    assert set(matrix.v.bits.tolist()) <= set(WIDTHS)
    assert sum(result.widths.values()) == result.rank == len(matrix.s)
    dense = torch.from_numpy(decode_factors(result.encoded).dense())
    torch.testing.assert_close(dense, result.approximation, rtol=1e-4, atol=1e-4)


def test_error_falls_with_the_budget_and_beats_truncation() -> None:
    energies = []
    for bits in (0.25, 0.5, 1.0, 2.0, 4.0):
        task = make_task(bits=bits)
        result = compress_one(AdaMix(), task)
        energies.append(output_error(task.delta, result.approximation, task.moment))
    assert energies == sorted(energies, reverse=True)
    task = make_task()
    rank = 48 * 80 // (16 * (48 + 80))  # bf16 factors of the same size
    ((u, s, v, *_),) = decompose(task.delta[None], rank)
    truncated = output_error(task.delta, (u * s) @ v, task.moment)
    assert energies[2] < 0.25 * truncated


def test_a_rank_one_delta() -> None:
    task = make_task()
    delta = torch.outer(torch.linspace(-1, 1, 48), torch.linspace(0.1, 2, 80))
    result = compress_one(AdaMix(), MatrixTask("w", delta, task.moment, "BF16", 1.0, "exact"))
    assert result.rank >= 1
    whole = output_error(delta, torch.zeros_like(delta), task.moment)
    assert output_error(delta, result.approximation, task.moment) < 1e-3 * whole


def test_both_solvers_give_the_same_error() -> None:
    task = make_task(24, 40)
    exact = compress_one(AdaMix(), task)
    scip = compress_one(AdaMix(), MatrixTask("w", task.delta, task.moment, "BF16", 1.0, "scip"))
    assert scip.gap == 0
    assert exact.widths == scip.widths
