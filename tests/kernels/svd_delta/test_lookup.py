"""Rows of an embedding's delta against float64."""

import torch

from deltadock.kernels.svd_delta import TensorCache, add_rows
from tests.kernels.svd_delta.support import make_delta, relative_error


def test_rows_of_an_embedding() -> None:
    delta = make_delta((300, 70), [(1, 8, 7), (4, 5, 3), (3, 2, 1)], scaled=True)
    rows = torch.tensor([299, 0, 31, 31, 64, 33])
    y = torch.randn(len(rows), 70)
    got = y.clone()
    add_rows(got, rows, delta.packed, TensorCache(0))
    assert relative_error(got, y.double() + delta.dense[rows]) < 1e-6
