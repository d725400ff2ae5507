"""Properties of every method: edge cases of matrices and moments."""

from collections.abc import Callable
from functools import partial

import pytest
import torch

from deltadock.compression.methods.base import MatrixResult, MatrixTask
from deltadock.compression.methods.registry import matrix_method
from deltadock.compression.options import METHODS
from deltadock.errors import InvalidCalibration
from tests.compression.matrices import (
    check_result,
    compress_one,
    make_moment,
    make_task,
    output_error,
)

NAMES = [
    name for name, info in METHODS.items() if not info.imports_adapter and not info.needs_gradients
]
NAMES.remove("exact")
CALIBRATED = [name for name in NAMES if METHODS[name].needs_calibration]
CALIBRATED.remove("bitdelta-distilled")  # uses it only to distill its scales afterwards


def method_of(name: str) -> Callable[[MatrixTask], MatrixResult]:
    method = matrix_method(name)
    assert method is not None
    return partial(compress_one, method)


def test_exact_and_lora_have_no_matrix_method() -> None:
    assert matrix_method("exact") is None
    assert matrix_method("lora") is None


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shape", [(4, 3), (1, 1), (3, 40), (40, 3)])
def test_tiny_matrices(name: str, shape: tuple[int, int]) -> None:
    task = make_task(*shape)
    check_result(method_of(name)(task), task)


@pytest.mark.parametrize("name", NAMES)
def test_a_delta_of_zero_stays_zero(name: str) -> None:
    task = make_task(delta=torch.zeros(48, 80))
    assert check_result(method_of(name)(task), task).abs().max() == 0


@pytest.mark.parametrize("name", ["adamix", "delta-come", "topk-2", "topk-32", "low-rank"])
def test_factor_methods_reproduce_a_rank_one_delta(name: str) -> None:
    delta = torch.outer(torch.linspace(-1, 1, 48), torch.linspace(0.1, 2, 80))
    task = make_task(delta=delta)
    result = method_of(name)(task)
    check_result(result, task)
    whole = output_error(delta, torch.zeros_like(delta), task.moment)
    assert output_error(delta, result.approximation, task.moment) < 1e-3 * whole


@pytest.mark.parametrize("name", NAMES)
def test_the_approximation_scales_with_the_delta(name: str) -> None:
    """A power of two only shifts the exponents of the scales."""
    task = make_task(24, 40)
    plain = method_of(name)(task).approximation
    for exponent in (-30, 20):
        scaled = make_task(24, 40, delta=task.delta * 2.0**exponent)
        approximation = method_of(name)(scaled).approximation
        torch.testing.assert_close(approximation * 2.0**-exponent, plain, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", CALIBRATED)
def test_columns_without_inputs(name: str) -> None:
    moment = make_moment(80)
    moment[5] = moment[:, 5] = 0
    moment[40:44] = moment[:, 40:44] = 0
    task = make_task(moment=moment)
    result = method_of(name)(task)
    check_result(result, task)
    whole = output_error(task.delta, torch.zeros_like(task.delta), moment)
    assert output_error(task.delta, result.approximation, moment) < 0.8 * whole


@pytest.mark.parametrize("name", CALIBRATED)
def test_a_moment_with_nan_is_rejected(name: str) -> None:
    moment = make_moment(80)
    moment[2, 3] = torch.nan
    with pytest.raises(InvalidCalibration, match="NaN"):
        method_of(name)(make_task(moment=moment))


@pytest.mark.parametrize("name", NAMES)
def test_methods_are_deterministic(name: str) -> None:
    def run(task: MatrixTask) -> tuple[object, dict[str, bytes]]:
        encoded = method_of(name)(task).encoded
        return encoded.record, {key: data.tobytes() for key, data in encoded.segments.items()}

    assert run(make_task()) == run(make_task())
