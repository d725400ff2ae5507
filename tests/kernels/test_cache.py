"""The cache stays within its limit and keeps what a pass uses; pool rows keep their places."""

from collections import Counter
from collections.abc import Callable

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from deltadock.kernels.cache import PAGE_ROWS, ROW_BYTES, PooledRows, RowPool, TensorCache

SIZE = 16


def counted(calls: Counter[int], key: int) -> Callable[[], Tensor]:
    def unpack() -> Tensor:
        calls[key] += 1
        return torch.full((SIZE,), key, dtype=torch.uint8)

    return unpack


def test_a_value_is_cached_and_discarded() -> None:
    calls: Counter[int] = Counter()
    cache = TensorCache(2 * SIZE)
    first = cache.get(1, counted(calls, 1))
    assert cache.get(1, counted(calls, 1)) is first
    assert (calls[1], cache.nbytes) == (1, SIZE)
    cache.discard(1)
    cache.discard(1)
    assert cache.nbytes == 0
    assert cache.get(1, counted(calls, 1)) is not first


def test_a_pass_over_too_many_layers_keeps_those_that_fit() -> None:
    calls: Counter[int] = Counter()
    cache = TensorCache(3 * SIZE)
    for _ in range(5):
        cache.begin_step()
        for layer in range(4):
            cache.get(layer, counted(calls, layer))
    assert calls == {0: 1, 1: 1, 2: 1, 3: 5}


def test_unused_entries_are_evicted_after_a_step() -> None:
    calls: Counter[int] = Counter()
    cache = TensorCache(2 * SIZE)
    for key in (0, 1):
        cache.get(key, counted(calls, key))
    for _ in range(3):
        cache.begin_step()
        for key in (1, 2):
            cache.get(key, counted(calls, key))
    # In the first of these steps the previous step's entries were still protected.
    assert calls == {0: 1, 1: 1, 2: 2}


def test_a_value_over_the_limit_is_not_cached() -> None:
    calls: Counter[int] = Counter()
    cache = TensorCache(SIZE - 1)
    cache.get(1, counted(calls, 1))
    cache.get(1, counted(calls, 1))
    assert (calls[1], cache.nbytes) == (2, 0)


@given(
    st.integers(0, 5),
    st.lists(st.tuples(st.sampled_from(["get", "discard", "step"]), st.integers(0, 7))),
)
def test_the_cache_stays_within_its_limit(room: int, operations: list[tuple[str, int]]) -> None:
    calls: Counter[int] = Counter()
    cache = TensorCache(room * SIZE)
    for operation, key in operations:
        if operation == "get":
            assert int(cache.get(key, counted(calls, key))[0]) == key
        elif operation == "discard":
            cache.discard(key)
        else:
            cache.begin_step()
        assert 0 <= cache.nbytes <= room * SIZE
    for key in range(8):
        cache.discard(key)
    assert cache.nbytes == 0


def test_a_failed_allocation_uses_no_pages() -> None:
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
def test_allocated_rows_keep_their_contents(calls: list[int]) -> None:
    """A number allocates that many rows; -1 frees the oldest allocation."""
    pool = RowPool(8 * PAGE_ROWS * ROW_BYTES)
    held: list[tuple[PooledRows, Tensor]] = []
    for value, call in enumerate(calls):
        if call < 0:
            del held[:1]
            continue
        rows = torch.full((call, ROW_BYTES), value, dtype=torch.uint8)
        pages = sum(-(-len(other) // PAGE_ROWS) for _, other in held)
        pooled = pool.put(rows)
        assert (pooled is not None) == (pages - (-call // PAGE_ROWS) <= 8)
        if pooled is not None:
            held.append((pooled, rows))
        del pooled
        for kept, want in held:
            assert torch.equal(pool.table[kept.numbers.long()], want)
