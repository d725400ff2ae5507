"""Delta-CoMe and Topk-x: widths by rank index, and GPTQ without correcting U."""

from collections.abc import Sequence

import numpy as np
import pytest
import torch

from deltadock.artifacts.encodings import decode_svd
from deltadock.compression.methods.fixed_widths import (
    DELTA_COME,
    TOP_2,
    TOP_32,
    FixedWidths,
    fixed_widths,
)
from deltadock.compression.numerics.decomposition import decompose
from deltadock.compression.numerics.gptq import quantize_columns, quantize_rows
from deltadock.compression.options import rank_budget
from tests.compression.matrices import check_result, compress_one, make_task, output_error

METHODS = {
    name: FixedWidths(leading)
    for name, leading in {"delta-come": DELTA_COME, "topk-2": TOP_2, "topk-32": TOP_32}.items()
}


def test_widths_equal_the_papers() -> None:
    # Delta-CoMe's published setting of a 4096 x 4096 matrix at 1 bit: 2, 32 and 968 ranks.
    widths = fixed_widths(rank_budget(1.0, 4096, 4096), DELTA_COME)
    assert widths == [8] * 2 + [3] * 32 + [2] * 968
    assert fixed_widths(2048, TOP_32) == [8] * 32 + [2] * 896


@pytest.mark.parametrize("budget", range(0, 130, 7))
@pytest.mark.parametrize("leading", [DELTA_COME, TOP_2, TOP_32])
def test_the_budget_is_used_and_not_exceeded(
    budget: int, leading: Sequence[tuple[int, int]]
) -> None:
    widths = fixed_widths(budget, leading)
    assert budget - 1 <= sum(widths) <= budget
    assert widths == sorted(widths, reverse=True)


def test_steps_against_float64() -> None:
    """V is quantized under G, then U width by width under the moment of its inputs."""
    task = make_task(60, 70, bits=2.0)
    result = compress_one(METHODS["delta-come"], task)
    check_result(result, task)
    widths = torch.tensor(fixed_widths(rank_budget(2.0, 60, 70), DELTA_COME))
    ((u, s, v, *_),) = decompose(task.delta[None], len(widths))
    v_hat, _ = quantize_rows(v[None], widths[None], task.moment[None])
    expected = torch.zeros(60, 70, dtype=torch.float64)
    for width in (8, 3, 2):
        of = widths == width
        right = s[of, None].double() * v_hat.decode()[0, of].double()
        hessian = right @ task.moment @ right.T
        part, _ = quantize_columns(u[None, :, of], widths[None, of], hessian[None])
        expected += part.decode()[0].double().T @ right
    torch.testing.assert_close(result.approximation.double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", METHODS)
def test_codes_and_report_agree(name: str) -> None:
    task = make_task(64, 96, bits=1.5)
    result = compress_one(METHODS[name], task)
    check_result(result, task)
    matrix = decode_svd(result.encoded)
    np.testing.assert_array_equal(matrix.u.bits, matrix.v.bits)
    assert matrix.v.bits.sum() <= rank_budget(1.5, 64, 96)
    counted = {str(b): int((matrix.v.bits == b).sum()) for b in set(matrix.v.bits.tolist())}
    assert result.widths == counted
    assert result.rank == len(matrix.s)
    values = torch.linalg.svdvals(task.delta.double())
    widths = [*matrix.v.bits.tolist(), *[0] * (64 - len(matrix.s))]
    assert result.spectrum == [
        (place, pytest.approx(float(values[place - 1]), rel=1e-3), *[widths[place - 1]] * 2)
        for place, *_ in result.spectrum
    ]
    assert result.spectrum[-1][0] > len(matrix.s), "those dropped too"


@pytest.mark.parametrize("name", METHODS)
def test_error_falls_with_the_budget(name: str) -> None:
    energies = []
    for bits in (0.25, 0.5, 1.0, 2.0, 4.0):
        task = make_task(bits=bits)
        approximation = compress_one(METHODS[name], task).approximation
        energies.append(output_error(task.delta, approximation, task.moment))
    assert energies == sorted(energies, reverse=True)
