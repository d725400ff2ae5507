"""Low rank is the Eckart-Young truncation, in bfloat16."""

import pytest
import torch

from deltadock.compression.methods.low_rank import LowRank, rank_of
from tests.compression.matrices import check_result, compress_one, make_task


@pytest.mark.parametrize("shape", [(48, 80), (80, 48)])
def test_the_approximation_is_the_truncated_svd(shape: tuple[int, int]) -> None:
    task = make_task(*shape, bits=5.0)
    result = compress_one(LowRank(), task)
    check_result(result, task)
    rank = rank_of(5.0, *shape)
    u, s, v = torch.linalg.svd(task.delta.double(), full_matrices=False)
    expected = (u[:, :rank] * s[:rank]) @ v[:rank]
    error = torch.linalg.matrix_norm(result.approximation.double() - expected)
    # bfloat16 has 8 significant bits.
    assert error < 2**-8 * torch.linalg.matrix_norm(expected)
    assert result.rank == rank
    assert {place <= rank: width for place, _, width, _ in result.spectrum} == {
        True: 16, False: 0,
    }  # fmt: skip


@pytest.mark.parametrize("bits", [0.3, 1.0, 2.0, 8.0])
def test_factors_fill_the_budget(bits: float) -> None:
    task = make_task(64, 96, bits=bits)
    result = compress_one(LowRank(), task)
    spent = 8 * result.encoded.nbytes
    assert spent <= bits * 64 * 96 < spent + 16 * (64 + 96)


def test_a_budget_below_one_rank_is_reported() -> None:
    task = make_task(4, 3)
    result = compress_one(LowRank(), task)
    assert result.encoded.nbytes == 0
    assert check_result(result, task).abs().max() == 0
    assert "no rank" in result.fallbacks[0]
