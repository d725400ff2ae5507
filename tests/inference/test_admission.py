"""Admission limits and Retry-After."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deltadock.errors import InvalidInput, Overloaded
from deltadock.inference.admission import MAX_RETRY_SECONDS, Admission
from deltadock.model_target import ModelTarget


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


A, B, C = (ModelTarget("base", name) for name in "abc")


def target(tenant: str, delta: str = "delta") -> ModelTarget:
    return ModelTarget("base", delta, tenant)


def retry_after(admission: Admission, whose: ModelTarget, count: int = 1) -> object:
    with pytest.raises(Overloaded) as caught:
        admission.enter(whose, count)
    return caught.value.details["retry_after"]


def test_retry_after_is_estimated_from_the_recent_throughput() -> None:
    clock = Clock()
    admission = Admission(8, 8, clock=clock)
    admission.enter(A, 4)
    admission.enter(B, 4)
    assert retry_after(admission, C) == 1, "no sequence has ended yet"
    for _ in range(4):  # one every three seconds
        clock.now += 3
        admission.leave(A)
        admission.enter(A, 1)
    assert retry_after(admission, C) == 3
    assert retry_after(admission, C, 4) == 12
    clock.now += 20  # a slow one
    assert retry_after(admission, C, 4) == 39
    assert retry_after(admission, C, 8) == MAX_RETRY_SECONDS


def test_one_delta_does_not_fill_the_queue() -> None:
    admission = Admission(8, 3)
    admission.enter(A, 3)
    with pytest.raises(Overloaded, match="this delta"):
        admission.enter(A, 1)
    admission.enter(B, 3)
    admission.leave(A, 2)
    admission.enter(A, 2)
    with pytest.raises(InvalidInput, match="at most 3"):
        admission.enter(C, 4)


def fill(admission: Admission, tenant: str) -> int:
    """How many sequences a tenant has that sends all it can, on as many deltas as it likes."""
    for count in range(1000):
        try:
            admission.enter(target(tenant, str(count)), 1)
        except Overloaded:
            return count
    raise AssertionError


def test_tenants_that_send_all_they_can_leave_places_to_others() -> None:
    admission = Admission(80, 48, 16)
    assert fill(admission, "first") == 64
    assert fill(admission, "second") == 12
    for newcomer in ("third", "fourth"):
        admission.enter(target(newcomer), 1)
    held = {"first": 64, "second": 12}
    for number in range(64):  # what the first had ends, and both ask again at once
        admission.leave(target("first", str(number)))
        held["first"] -= 1
        for tenant in held:
            held[tenant] += fill(admission, tenant)
    assert held == {"first": 36, "second": 33}
    assert retry_after(admission, target("first")) == 1


def test_the_last_place_is_for_a_tenant_that_has_none() -> None:
    admission = Admission(80, 48, 16)
    assert [fill(admission, name) for name in ("first", "second", "third")] == [64, 12, 3]
    admission.enter(target("fourth"), 1)
    assert fill(admission, "fifth") == 0


def test_a_node_without_a_queue_to_share_is_one_tenants() -> None:
    assert fill(Admission(4, 4), "any") == 4


@given(
    st.lists(
        st.tuples(st.sampled_from("ab"), st.sampled_from("xyz"), st.integers(1, 4), st.booleans()),
        max_size=40,
    ),
    st.integers(0, 3),
)
def test_limits_hold_and_idle_keys_are_forgotten(
    moves: list[tuple[str, str, int, bool]], reserve: int
) -> None:
    admission = Admission(6, 4, reserve)
    inside = {(tenant, delta): 0 for tenant in "ab" for delta in "xyz"}
    for tenant, delta, count, enters in moves:
        whose, held = target(tenant, delta), inside[tenant, delta]
        total = sum(inside.values())
        of_tenant = sum(number for (name, _), number in inside.items() if name == tenant)
        if enters:
            fits = total + count <= 6 and held + count <= 4
            try:
                admission.enter(whose, count)
            except Overloaded:
                assert not fits or reserve
                assert not fits or of_tenant, "whoever has nothing there finds room"
            else:
                assert fits
                assert total + count <= 6 - reserve or of_tenant < total or not of_tenant
                inside[tenant, delta] += count
        elif held >= count:
            admission.leave(whose, count)
            inside[tenant, delta] -= count
        assert admission.admitted == sum(inside.values())
        kept = {target(*names).queue_key for names in inside if inside[names]}
        assert admission._delta_ends.keys() <= kept
        assert admission._of_tenant.keys() <= {name for name, _ in inside}
