"""The Triton kernel against the reference: on a GPU, or in Triton's interpreter."""

import os

import pytest
import torch
from torch import Tensor

from deltadock.kernels import error_compensation
from deltadock.kernels.error_compensation import BLOCK, reference, round_with_error_compensation
from deltadock.kernels.error_compensation.triton import ROWS, prune_block, round_block
from tests.kernels.error_compensation.cases import check, make

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"
pytestmark = pytest.mark.skipif(
    DEVICE == "cpu" and not INTERPRETED,
    reason="no GPU; test_interpreter.py runs these in Triton's interpreter",
)


def run(inputs: tuple[Tensor, Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Codes and errors of one block of one problem."""
    values, factor, zero, top = inputs
    codes, errors = run_problems(values[None], factor[None], zero, top)
    return codes[0], errors[0]


def run_problems(
    values: Tensor, factor: Tensor, zero: Tensor, top: Tensor
) -> tuple[Tensor, Tensor]:
    """Codes and errors of one block of each problem; the codes are poisoned first."""
    values, factor = values.to(DEVICE, copy=True), factor.to(DEVICE)
    codes = torch.full(values.shape, 255, dtype=torch.uint8, device=DEVICE)
    zero, top = (one.to(DEVICE).expand_as(values) for one in (zero, top))
    round_block(values, codes, factor, zero, top)
    return codes, values


@pytest.mark.parametrize(("rows", "vectors"), [(1, 1), (5, 33), (ROWS - 1, 32), (ROWS, 70)])
def test_a_block_equals_the_reference(rows: int, vectors: int) -> None:
    inputs = make(rows, vectors, seed=rows)
    codes, errors = run(inputs)
    check(codes, errors, inputs)


def test_a_vector_does_not_depend_on_its_neighbours() -> None:
    values, factor, zero, top = make(20, 40)
    codes, errors = run((values, factor, zero, top))
    other_codes, other_errors = run((values[:, :9].contiguous(), factor, zero[:9], top[:9]))
    assert torch.equal(other_codes, codes[:, :9])
    assert torch.equal(other_errors, errors[:, :9])


def test_problems_with_a_grid_for_every_coordinate() -> None:
    """As for U; values, codes and factors are pieces of larger tensors."""
    problems = [make(30, 33, seed=seed) for seed in range(3)]
    values, factor = (torch.stack([one[k] for one in problems]) for k in (0, 1))
    wide = torch.zeros(3, 50, 33).index_copy(1, torch.arange(10, 40), values)[:, 10:40]
    large = torch.full((3, 40, 40), torch.nan)
    large[:, 5:35, 5:35] = factor
    top = 2.0 ** (torch.arange(90).view(3, 30, 1) % 8 + 1) - 1
    zero = (top / 3).round()
    codes, errors = run_problems(wide, large[:, 5:35, 5:35], zero, top)
    for k in range(3):
        check(codes[k], errors[k], (values[k], factor[k], zero[k], top[k]))


@pytest.mark.parametrize(("rows", "vectors"), [(1, 1), (7, 33), (ROWS, 32)])
def test_a_pruned_block_equals_the_other_path(rows: int, vectors: int) -> None:
    """Blocks are pieces of larger tensors; where costs are equal, the first are kept."""
    problems = [make(rows, vectors, seed=seed) for seed in range(2)]
    values, factor = (torch.stack([one[k] for one in problems]) for k in (0, 1))
    values[:, :2, 0] = 0.0
    large = torch.full((2, rows + 9, rows + 9), torch.nan)
    large[:, 3 : rows + 3, 3 : rows + 3] = factor
    top = problems[0][3].expand(2, -1).contiguous()
    codes = torch.full((2, rows + 5, vectors), 255, dtype=torch.uint8)[:, 2 : rows + 2]
    kept = torch.ones(2, rows + 5, vectors, dtype=torch.bool)[:, 2 : rows + 2]
    made = [one.to(DEVICE) for one in (values.clone(), codes, kept)]
    prune_block(*made, large.to(DEVICE)[:, 3 : rows + 3, 3 : rows + 3], top.to(DEVICE))
    errors, codes, kept = (one.cpu() for one in made)
    for k in range(2):
        expected = reference.prune_with_error_compensation(values[k], factor[k], top[k])
        same = (codes[k] == expected[0]).all(0) & (kept[k] == expected[1]).all(0)
        assert same.double().mean() > 0.9
        torch.testing.assert_close(
            errors[k][:, same].double(), expected[2][:, same], rtol=2e-3, atol=2e-3
        )
    assert (kept[:, :4].sum(1) == min(rows, error_compensation.KEPT)).all()


@pytest.mark.skipif(DEVICE == "cpu", reason="the blocked GPU path needs a GPU")
@pytest.mark.parametrize(("n", "r"), [(BLOCK["cuda"] + 1, 5), (500, 300)])
def test_all_blocks_equal_the_reference(n: int, r: int) -> None:
    inputs = make(n, r)
    values, factor, zero, top = (tensor.to(DEVICE) for tensor in inputs)
    values = values.clone()
    (codes,) = round_with_error_compensation(values[None], factor[None], zero, top)
    check(codes, values, inputs)
