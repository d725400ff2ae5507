"""Matrix products with unpacked factors against float64."""

import pytest
import torch
from torch import Tensor

from deltadock.kernels.svd_delta import DeltaTable, TensorCache, add_rows
from deltadock.kernels.svd_delta.matmul import add_products
from tests.kernels.svd_delta.support import make_delta, relative_error

SHAPE = (50, 90)
WIDTHS = [(2, 8, 8), (7, 3, 4), (3, 2, 2)]


@pytest.mark.parametrize("rows", [slice(1, 3), torch.tensor([3, 0])])
def test_products_with_unpacked_factors(rows: slice | Tensor) -> None:
    delta = make_delta(SHAPE, WIDTHS, scaled=True)
    packed = delta.packed.with_bias(torch.ones(SHAPE[0]))
    table = DeltaTable(2, SHAPE[1], [SHAPE[0]], max_rank=12)
    table.install(1, packed)
    y, x = torch.randn(4, SHAPE[0]), torch.randn(4, SHAPE[1])
    want = y.double()
    want[rows] += x[rows].double() @ delta.dense.T + 1
    add_products(y, x, table, {1: rows, 0: slice(0, 1)}, TensorCache(0))
    assert relative_error(y, want) < 1e-6


def test_rows_of_an_embedding() -> None:
    delta = make_delta((300, 70), [(1, 8, 7), (4, 5, 3), (3, 2, 1)], scaled=True)
    rows = torch.tensor([299, 0, 31, 31, 64, 33])
    y = torch.randn(len(rows), 70)
    got = y.clone()
    add_rows(got, rows, delta.packed, TensorCache(0))
    assert relative_error(got, y.double() + delta.dense[rows]) < 1e-6
