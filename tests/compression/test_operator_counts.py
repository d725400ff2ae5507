"""Calls of torch operators, which bound the time on a GPU from below: some 5 us each."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.operators import OperatorCounter
from deltadock.compression import distillation
from deltadock.compression.methods import optimix
from deltadock.compression.methods.base import MatrixResult, MatrixTask
from deltadock.compression.methods.registry import matrix_method
from deltadock.compression.numerics.global_allocation import allocate
from deltadock.compression.numerics.metric import Metric
from tests.compression.matrices import compress_matrices, make_task
from tests.compression.operators import counted_as_on_a_gpu
from tests.compression.test_distillation import Prepared

SHAPES = [(48, 64), (320, 640)]


def compress_by_optimix(
    tasks: Sequence[MatrixTask], *, together: bool = True
) -> list[MatrixResult]:
    """With dense moments on both sides, and one budget `together` or equal ones."""
    deltas = torch.stack([task.delta for task in tasks])
    rows = Metric.of(torch.stack([task.delta @ task.delta.T for task in tasks]))
    columns = Metric.of(torch.stack([task.moment for task in tasks]))
    decomposed, profiles = zip(*optimix.profile(deltas, rows, columns), strict=True)
    groups = [list(profiles)] if together else [[profile] for profile in profiles]
    weights = tasks[0].bits * deltas.numel() / len(groups)
    widths = [one for group in groups for one in allocate(group, weights).widths]
    return optimix.compress(deltas, decomposed, widths, rows, columns, ["BF16"] * len(tasks))


def operators(
    name: str, shape: tuple[int, int], count: int, monkeypatch: pytest.MonkeyPatch
) -> OperatorCounter:
    tasks = [make_task(*shape, seed=seed) for seed in range(count)]
    method = matrix_method(name)
    with counted_as_on_a_gpu(monkeypatch) as counter:
        compress_by_optimix(tasks) if method is None else compress_matrices(method, tasks)
    return counter


@pytest.mark.parametrize(
    ("name", "bounds", "synchronizations"),
    [
        ("adamix", (600, 640), 20), ("delta-come", (900, 930), 25), ("topk-2", (680, 880), 20),
        ("low-rank", (100, 100), 5), ("bitdelta", (60, 60), 5), ("delta-zip", (120, 350), 5),
        ("gpt-zip", (170, 310), 5), ("optimix", (1600, 1750), 100),
    ],
)  # fmt: skip
def test_operators_of_three_matrices(
    name: str, bounds: tuple[int, int], synchronizations: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One batch takes about as many as one matrix, and grows by blocks of columns, not columns.

    One by one and a column at a time, three of 320 x 640 took: adamix 6,129, gpt-zip 34,983. Of
    optimix's operators 420, and 74 synchronizations, search the price of a bit, once a model.
    """
    for shape, bound in zip(SHAPES, bounds, strict=True):
        counter = operators(name, shape, 3, monkeypatch)
        assert counter.total <= bound
        read = sum(counter.by_name[one] for one in ("_local_scalar_dense", "nonzero"))
        assert read <= synchronizations


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


@pytest.mark.parametrize(
    "name", ["adamix", "delta-come", "low-rank", "bitdelta", "delta-zip", "gpt-zip", "optimix"]
)
def test_a_batch_equals_each_matrix_alone(name: str) -> None:
    """Ranks kept differ, down to one for the last; sums in another order move a few codes."""
    tasks = [make_task(60, 70, seed=seed) for seed in range(3)]
    flat = torch.outer(torch.linspace(-1, 1, 60), torch.linspace(0.1, 2, 70))
    tasks.append(make_task(60, 70, delta=flat))
    method = matrix_method(name)
    compress = partial(compress_by_optimix, together=False)
    if method is not None:
        compress = partial(compress_matrices, method)
    for task, result in zip(tasks, compress(tasks), strict=True):
        (alone,) = compress([task])
        for field in ("rank", "widths", "fallbacks"):
            assert getattr(result, field) == getattr(alone, field)
        norm = torch.linalg.norm(alone.approximation)
        assert torch.linalg.norm(result.approximation - alone.approximation) < 0.02 * norm
