"""One goal, and only one, within its range."""

import math
from typing import Any

import pytest

from deltadock.compression.goal import DEFAULT_BITS, GOAL_KINDS, Goal, check_goal, goal_for
from deltadock.errors import BitsOutOfRange, InvalidGoal, UnknownMethod

GOOD = {"bits": 0.5, "target_bytes": 10**9, "ratio": 13.5, "max_kl": 0.01, "min_agreement": 0.98}


@pytest.mark.parametrize("kind", GOAL_KINDS)
def test_each_goal_alone_is_taken(kind: str) -> None:
    assert check_goal(**{kind: GOOD[kind]}) == Goal(kind, GOOD[kind])  # type: ignore[arg-type]
    method, goal = goal_for("adamix", **{kind: GOOD[kind]})
    assert method.name == "adamix"
    assert goal is not None
    assert (goal.kind, goal.value, goal.bits) == (kind, GOOD[kind], 0.5 if kind == "bits" else None)


def test_without_a_goal_there_is_a_budget() -> None:
    assert check_goal() == Goal("bits", DEFAULT_BITS)
    assert goal_for("adamix")[1] == Goal("bits", 1.0)


def test_two_goals_are_refused_by_name() -> None:
    for first in GOAL_KINDS:
        for second in GOAL_KINDS:
            if first != second:
                both = {first: GOOD[first], second: GOOD[second]}
                with pytest.raises(InvalidGoal, match="exclude each other"):
                    check_goal(**both)
                with pytest.raises(InvalidGoal, match=first):
                    goal_for("adamix", **both)


@pytest.mark.parametrize(
    ("wish", "error"),
    [
        *(({"bits": value}, BitsOutOfRange) for value in (0, -1, 17, math.nan, math.inf)),
        *(({"target_bytes": value}, InvalidGoal) for value in (0, -1, 1.5, 2**63, math.nan)),
        *(({"ratio": value}, InvalidGoal) for value in (1, 0.5, math.inf, math.nan)),
        *(({"max_kl": value}, InvalidGoal) for value in (0, -1e-3, math.inf, math.nan)),
        *(({"min_agreement": value}, InvalidGoal) for value in (0, 1, 98, -0.1, math.nan)),
    ],
)
def test_what_lies_outside_is_refused(wish: dict[str, Any], error: type[Exception]) -> None:
    with pytest.raises(error):
        check_goal(**wish)
    with pytest.raises(error):
        goal_for("adamix", **wish)


def test_a_budget_is_held_to_its_methods_range() -> None:
    with pytest.raises(BitsOutOfRange, match=r"between 0\.1 and 8"):
        goal_for("adamix", bits=9)


def test_methods_without_a_budget_have_no_goal() -> None:
    assert goal_for("exact")[1] is None
    with pytest.raises(BitsOutOfRange):
        goal_for("exact", bits=1.0)
    for kind in GOAL_KINDS[1:]:
        with pytest.raises(InvalidGoal, match="one size only"):
            goal_for("exact", **{kind: GOOD[kind]})


def test_an_unknown_method_is_named() -> None:
    for wish in ({}, {"bits": 1.0}, {"ratio": 10.0}):
        with pytest.raises(UnknownMethod, match="'zip'"):
            goal_for("zip", **wish)


def test_goals_read_as_words() -> None:
    words = [str(check_goal(**{kind: GOOD[kind]})) for kind in GOAL_KINDS]
    assert words == [
        "0.5 bit",
        "1000000000 bytes",
        "ratio 13.5",
        "KL at most 0.01",
        "agreement at least 0.98",
    ]
