"""The delta without a GPU."""

import pytest
import torch

from kernels.svd_delta import Chunks, DeltaTable, TensorCache, add_rows, svd_delta
from tests.kernels.support import expected, make_delta, relative_error

SHAPE = (50, 90)
WIDTHS = [(2, 8, 8), (7, 3, 4), (3, 2, 2)]


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float32, 1e-6), (torch.float16, 1e-3), (torch.bfloat16, 5e-3)],
)
@pytest.mark.parametrize("limit", [0, 10**6])
def test_rows_of_several_slots(limit: int, dtype: torch.dtype, tolerance: float) -> None:
    deltas = {
        1: make_delta(SHAPE, WIDTHS, seed=1),
        2: make_delta(SHAPE, WIDTHS, seed=2, midrise=True, scaled=True),
    }
    table = DeltaTable(4, SHAPE[1], [SHAPE[0]], max_rank=12)
    for slot, delta in deltas.items():
        table.install(slot, delta.packed)
    row_slots = [2, 0, 1, 3, 1]
    chunks = Chunks(8, 4, [table])
    chunks.assign(row_slots)
    y, x = torch.randn(5, SHAPE[0]).to(dtype), torch.randn(5, SHAPE[1]).to(dtype)
    want = expected(y, x, row_slots, {slot: delta.dense for slot, delta in deltas.items()})
    got = y.clone()
    svd_delta(got, x, table, chunks, TensorCache(limit))
    assert relative_error(got, want) < tolerance
    assert torch.equal(got[[1, 3]], y[[1, 3]])


def test_rows_of_an_embedding() -> None:
    delta = make_delta((300, 70), [(1, 8, 7), (4, 5, 3), (3, 2, 1)], scaled=True)
    rows = torch.tensor([299, 0, 31, 31, 64, 33])
    y = torch.randn(len(rows), 70)
    got = y.clone()
    add_rows(got, rows, delta.packed, TensorCache(0))
    assert relative_error(got, y.double() + delta.dense[rows]) < 1e-6


def test_arguments_that_do_not_fit_are_refused() -> None:
    table = DeltaTable(2, SHAPE[1], [SHAPE[0]], max_rank=12)
    chunks = Chunks(4, 2, [table])
    chunks.assign([1, 0])
    cache = TensorCache(0)
    y, x = torch.zeros(2, SHAPE[0]), torch.zeros(2, SHAPE[1])
    svd_delta(y, x, table, chunks, cache)
    wrong = [
        (y[:1], x),
        (y, x[:, 1:]),
        (y.half(), x),
        (y.T.contiguous().T, x),
    ]
    for bad_y, bad_x in wrong:
        with pytest.raises(ValueError, match="x and y need"):
            svd_delta(bad_y, bad_x, table, chunks, cache)
    small = Chunks(4, 2, [])
    small.assign([1, 0])
    with pytest.raises(ValueError, match="chunks"):
        svd_delta(y, x, table, small, cache)
