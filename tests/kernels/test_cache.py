"""What is unpacked stays within its limit, and what a pass uses is not evicted by the pass."""

from collections import Counter
from collections.abc import Callable

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from deltadock.kernels.cache import TensorCache

SIZE = 16


def counted(made: Counter[int], key: int) -> Callable[[], Tensor]:
    def make() -> Tensor:
        made[key] += 1
        return torch.full((SIZE,), key, dtype=torch.uint8)

    return make


def test_what_was_unpacked_is_kept_and_forgotten() -> None:
    made: Counter[int] = Counter()
    cache = TensorCache(2 * SIZE)
    first = cache.get(1, counted(made, 1))
    assert cache.get(1, counted(made, 1)) is first
    assert (made[1], cache.nbytes) == (1, SIZE)
    cache.discard(1)
    cache.discard(1)
    assert cache.nbytes == 0
    assert cache.get(1, counted(made, 1)) is not first


def test_a_pass_over_more_than_fits_keeps_what_does() -> None:
    made: Counter[int] = Counter()
    cache = TensorCache(3 * SIZE)
    for _ in range(5):
        cache.begin_step()
        for layer in range(4):
            cache.get(layer, counted(made, layer))
    assert made == {0: 1, 1: 1, 2: 1, 3: 5}


def test_what_no_pass_uses_any_more_makes_room() -> None:
    made: Counter[int] = Counter()
    cache = TensorCache(2 * SIZE)
    for key in (0, 1):
        cache.get(key, counted(made, key))
    for _ in range(3):
        cache.begin_step()
        for key in (1, 2):
            cache.get(key, counted(made, key))
    # In the first of these steps what the one before had used was still kept.
    assert made == {0: 1, 1: 1, 2: 2}


def test_a_limit_too_small_for_one_keeps_none() -> None:
    made: Counter[int] = Counter()
    cache = TensorCache(SIZE - 1)
    cache.get(1, counted(made, 1))
    cache.get(1, counted(made, 1))
    assert (made[1], cache.nbytes) == (2, 0)


@given(
    st.integers(0, 5),
    st.lists(st.tuples(st.sampled_from(["get", "discard", "step"]), st.integers(0, 7))),
)
def test_the_limit_holds(room: int, calls: list[tuple[str, int]]) -> None:
    made: Counter[int] = Counter()
    cache = TensorCache(room * SIZE)
    for call, key in calls:
        if call == "get":
            found = cache.get(key, counted(made, key))
            assert int(found[0]) == key
        elif call == "discard":
            cache.discard(key)
        else:
            cache.begin_step()
        assert 0 <= cache.nbytes <= room * SIZE
    for key in range(8):
        cache.discard(key)
    assert cache.nbytes == 0
