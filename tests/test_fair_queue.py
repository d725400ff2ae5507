"""Tenants' turns, for any order of arrivals, services and departures."""

from collections import Counter, defaultdict, deque

from hypothesis import given
from hypothesis import strategies as st

from deltadock.fair_queue import FairQueue

TENANTS = st.sampled_from("abcd")
STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("put"), TENANTS),
        st.tuples(st.just("leave"), TENANTS),
        st.tuples(st.just("take"), st.frozensets(TENANTS, max_size=2)),
    ),
    max_size=60,
)


@given(STEPS)
def test_no_tenant_waits_while_another_is_served_twice(steps: list[tuple[str, str]]) -> None:
    """Nor does one that cannot be served, or an item that leaves, cost a tenant its turn."""
    queue: FairQueue[int] = FairQueue()
    waiting: defaultdict[str, deque[int]] = defaultdict(deque)
    passed: dict[str, Counter[str]] = {}
    """How often others were served since a tenant waits for its turn, by these."""
    for number, (step, one) in enumerate(steps):
        if step == "put":
            queue.put(one, number)
            waiting[one].append(number)
            passed.setdefault(one, Counter())
        elif step == "leave":
            if waiting[one]:
                queue.remove(one, waiting[one].pop())
            queue.remove(one, -1)
        else:
            refused = set(one)
            taken = queue.take(lambda tenant, _, refused=refused: tenant not in refused)
            served = {tenant for tenant, items in waiting.items() if items} - refused
            if taken is None:
                assert not served
                continue
            tenant, item = taken
            assert tenant in served
            assert item == waiting[tenant].popleft(), "a tenant's own are in order of arrival"
            passed[tenant].clear()
            for other in served - {tenant}:
                passed[other][tenant] += 1
                assert passed[other][tenant] == 1
            for other in refused & passed.keys():
                passed[other].clear()  # its turn is the next once it may
        for tenant, items in waiting.items():
            if not items:
                passed.pop(tenant, None)
        assert bool(queue) == any(waiting.values())


def test_a_turn_that_cannot_be_taken_is_kept() -> None:
    queue: FairQueue[str] = FairQueue()
    for name in ("a1", "b1", "c1", "b2", "c2"):
        queue.put(name[0], name)
    order = [queue.take(lambda _, item: item != "a1") for _ in range(2)]
    order += [queue.take(lambda *_: True) for _ in range(3)]
    assert [item for _, item in filter(None, order)] == ["b1", "c1", "a1", "b2", "c2"]
    assert queue.take(lambda *_: True) is None


def test_the_first_of_a_tenants_items_that_can_be_served_is() -> None:
    queue: FairQueue[str] = FairQueue()
    for name in ("a1", "a2", "a3"):
        queue.put("a", name)
    assert queue.take(lambda _, item: item != "a1") == ("a", "a2")
    assert queue.take(lambda *_: True) == ("a", "a1")


def test_idle_time_is_no_credit() -> None:
    queue: FairQueue[str] = FairQueue()
    order = []
    for turn in range(6):
        queue.put("busy", f"busy{turn}")
    for turn in range(6):
        if turn == 3:
            for number in range(3):
                queue.put("idle", f"idle{number}")
        taken = queue.take(lambda *_: True)
        assert taken is not None
        order.append(taken[0])
    assert order == ["busy", "busy", "busy", "busy", "idle", "busy"]
