"""Calls of torch operators, which bound the time on a GPU from below: some 5 us each."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.operators import OperatorCounter
from deltadock.compression import distillation
from deltadock.compression.methods.base import compress_matrices
from deltadock.compression.methods.registry import matrix_method
from deltadock.kernels.error_compensation import BLOCK
from tests.compression.matrices import make_task
from tests.compression.operators import counted_as_on_a_gpu
from tests.compression.test_distillation import Prepared

SHAPES = [(48, 64), (320, 640)]


def launches_of_matrices(
    name: str, shape: tuple[int, int], count: int, monkeypatch: pytest.MonkeyPatch
) -> int:
    """Operators that compress `count` matrices of a shape, without those of a sweep's blocks."""
    method = matrix_method(name)
    assert method is not None
    tasks = [make_task(*shape, seed=seed) for seed in range(count)]
    with counted_as_on_a_gpu(monkeypatch) as counter:
        compress_matrices(method, tasks)
    # V's sweep: a product and a launch for each block of columns.
    return counter.total - 2 * math.ceil(shape[1] / BLOCK["cuda"])


@pytest.mark.parametrize(
    ("name", "bound"), [("adamix", 450), ("delta-come", 850), ("topk-2", 800), ("low-rank", 40)]
)
@pytest.mark.parametrize("shape", SHAPES)
def test_operators_of_a_matrix(
    name: str, bound: int, shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A search for each column took adamix 707 operators at 48 x 64 and 2,043 at 320 x 640."""
    assert launches_of_matrices(name, shape, 1, monkeypatch) <= bound


@pytest.mark.parametrize("shape", SHAPES)
def test_three_matrices_take_few_more_operators_than_one(
    shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert launches_of_matrices("adamix", shape, 3, monkeypatch) <= 540


def test_operators_of_a_distillation_step(
    make_pair: Callable[..., tuple[Path, Path]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two blocks, embedding and head; blocks run again for the backward pass: 803 operators."""
    prepared = Prepared(*make_pair(tied=False))
    monkeypatch.setattr(distillation, "STEPS", 2)
    counts: list[int] = []
    step = distillation._accumulate

    def counted(*args: Any) -> None:
        with OperatorCounter() as counter:
            step(*args)
        counts.append(counter.total)

    monkeypatch.setattr(distillation, "_accumulate", counted)
    prepared.distill()
    # The first step prepares masks and positions.
    assert counts[-1] <= 720


@pytest.mark.parametrize("name", ["adamix", "delta-come", "low-rank"])
def test_a_batch_equals_each_matrix_alone(name: str) -> None:
    """Ranks kept differ, down to one for the last; sums in another order move a few codes."""
    method = matrix_method(name)
    assert method is not None
    tasks = [make_task(60, 70, seed=seed) for seed in range(3)]
    flat = torch.outer(torch.linspace(-1, 1, 60), torch.linspace(0.1, 2, 70))
    tasks.append(make_task(60, 70, delta=flat))
    together = compress_matrices(method, tasks)
    assert len({result.notes["rank"] for result in together}) > 1
    for task, result in zip(tasks, together, strict=True):
        (alone,) = compress_matrices(method, [task])
        assert result.notes == alone.notes
        norm = torch.linalg.norm(alone.approximation)
        assert torch.linalg.norm(result.approximation - alone.approximation) < 0.02 * norm
