"""Rows keep their places while somebody holds them, and nobody else gets these."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from deltadock.kernels.cache import PAGE_ROWS, ROW_BYTES, PooledRows, RowPool


def test_what_does_not_fit_takes_nothing() -> None:
    pool = RowPool(2 * PAGE_ROWS * ROW_BYTES)
    assert len(pool.table) == 2 * PAGE_ROWS
    held = pool.put(torch.ones(PAGE_ROWS, ROW_BYTES, dtype=torch.uint8))
    assert held is not None
    assert pool.put(torch.ones(PAGE_ROWS + 1, ROW_BYTES, dtype=torch.uint8)) is None
    rest = pool.put(torch.ones(PAGE_ROWS, ROW_BYTES, dtype=torch.uint8))
    assert rest is not None
    assert pool.put(torch.ones(1, ROW_BYTES, dtype=torch.uint8)) is None
    del held
    assert pool.put(torch.ones(PAGE_ROWS, ROW_BYTES, dtype=torch.uint8)) is not None


@given(st.lists(st.one_of(st.integers(0, 3 * PAGE_ROWS), st.just(-1)), max_size=30))
def test_rows_stay_as_they_were_put(calls: list[int]) -> None:
    """A number puts so many rows; -1 lets the oldest go."""
    pool = RowPool(8 * PAGE_ROWS * ROW_BYTES)
    held: list[tuple[PooledRows, torch.Tensor]] = []
    for value, call in enumerate(calls):
        if call < 0:
            del held[:1]
            continue
        rows = torch.full((call, ROW_BYTES), value, dtype=torch.uint8)
        pages = sum(-(-len(other) // PAGE_ROWS) for _, other in held)
        found = pool.put(rows)
        assert (found is not None) == (pages - (-call // PAGE_ROWS) <= 8)
        if found is not None:
            held.append((found, rows))
        del found
        for kept, want in held:
            assert torch.equal(pool.table[kept.numbers.long()], want)
