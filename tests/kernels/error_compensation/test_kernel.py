"""The Triton kernel against the reference: on a GPU, or in Triton's interpreter."""

import os

import pytest
import torch
from torch import Tensor

from deltadock.kernels.error_compensation import BLOCK, round_with_error_compensation
from deltadock.kernels.error_compensation.triton import ROWS, round_block
from tests.kernels.error_compensation.cases import check, make

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"
pytestmark = pytest.mark.skipif(
    DEVICE == "cpu" and not INTERPRETED,
    reason="no GPU; test_interpreter.py runs these in Triton's interpreter",
)


def run(inputs: tuple[Tensor, Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Codes and errors of one block; the codes are poisoned first."""
    values, factor, zero, top = (tensor.to(DEVICE) for tensor in inputs)
    values = values.clone()
    codes = torch.full(values.shape, 255, dtype=torch.uint8, device=DEVICE)
    round_block(values, codes, factor.contiguous(), zero, top)
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


@pytest.mark.skipif(DEVICE == "cpu", reason="the blocked GPU path needs a GPU")
@pytest.mark.parametrize(("n", "r"), [(BLOCK["cuda"] + 1, 5), (500, 300)])
def test_all_blocks_equal_the_reference(n: int, r: int) -> None:
    inputs = make(n, r)
    values, factor, zero, top = (tensor.to(DEVICE) for tensor in inputs)
    values = values.clone()
    codes = round_with_error_compensation(values, factor, zero, top)
    check(codes, values, inputs)
