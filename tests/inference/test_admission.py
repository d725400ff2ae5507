"""Admission limits and Retry-After."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deltadock.errors import InvalidInput, Overloaded
from deltadock.inference.admission import MAX_RETRY_SECONDS, Admission


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def retry_after(admission: Admission, queue_key: str, count: int = 1) -> object:
    with pytest.raises(Overloaded) as caught:
        admission.enter(queue_key, count)
    return caught.value.details["retry_after"]


def test_retry_after_is_estimated_from_the_recent_throughput() -> None:
    clock = Clock()
    admission = Admission(8, 8, clock)
    admission.enter("a", 4)
    admission.enter("b", 4)
    assert retry_after(admission, "c") == 1, "no sequence has ended yet"
    for _ in range(4):  # one every three seconds
        clock.now += 3
        admission.leave("a")
        admission.enter("a", 1)
    assert retry_after(admission, "c") == 3
    assert retry_after(admission, "c", 4) == 12
    clock.now += 20  # a slow one
    assert retry_after(admission, "c", 4) == 39
    assert retry_after(admission, "c", 8) == MAX_RETRY_SECONDS


def test_one_delta_does_not_fill_the_queue() -> None:
    admission = Admission(8, 3)
    admission.enter("a", 3)
    with pytest.raises(Overloaded, match="this delta"):
        admission.enter("a", 1)
    admission.enter("b", 3)
    admission.leave("a", 2)
    admission.enter("a", 2)
    with pytest.raises(InvalidInput, match="at most 3"):
        admission.enter("c", 4)


@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(1, 4), st.booleans()), max_size=40))
def test_limits_hold_and_idle_keys_are_forgotten(
    moves: list[tuple[str, int, bool]],
) -> None:
    admission, inside = Admission(6, 4), dict.fromkeys("abc", 0)
    for queue_key, count, enters in moves:
        if enters:
            fits = sum(inside.values()) + count <= 6 and inside[queue_key] + count <= 4
            try:
                admission.enter(queue_key, count)
            except Overloaded:
                assert not fits
            else:
                assert fits
                inside[queue_key] += count
        elif inside[queue_key] >= count:
            admission.leave(queue_key, count)
            inside[queue_key] -= count
        assert admission.admitted == sum(inside.values())
        assert admission._delta_ends.keys() <= {name for name in inside if inside[name]}
