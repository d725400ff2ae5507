"""Methods, the budgets that they accept, and goals."""

import math
import subprocess
import sys
from typing import Any

import pytest

from deltadock.compression.options import (
    DEFAULT_BITS,
    GOAL_KINDS,
    METHODS,
    Goal,
    check_goal,
    check_method,
    default_method,
    goal_for,
)
from deltadock.errors import BitsOutOfRange, InvalidGoal, UnknownMethod

GOOD = {"bits": 0.5, "target_bytes": 10**9, "ratio": 13.5, "max_kl": 0.01, "min_agreement": 0.98}


@pytest.mark.parametrize("kind", GOAL_KINDS)
def test_each_goal_is_accepted_alone(kind: str) -> None:
    assert check_goal(**{kind: GOOD[kind]}) == Goal(kind, GOOD[kind])  # type: ignore[arg-type]
    method, goal = goal_for("adamix", **{kind: GOOD[kind]})
    assert method.name == "adamix"
    assert goal is not None
    assert (goal.kind, goal.value, goal.bits) == (kind, GOOD[kind], 0.5 if kind == "bits" else None)


def test_the_default_goal_is_a_budget() -> None:
    assert check_goal() == Goal("bits", DEFAULT_BITS)
    assert goal_for("adamix")[1] == Goal("bits", 1.0)


def test_two_goals_are_rejected_by_name() -> None:
    for first in GOAL_KINDS:
        for second in GOAL_KINDS:
            if first != second:
                both = {first: GOOD[first], second: GOOD[second]}
                with pytest.raises(InvalidGoal, match="exclude each other"):
                    check_goal(**both)
                with pytest.raises(InvalidGoal, match=first):
                    goal_for("adamix", **both)


@pytest.mark.parametrize(
    ("goals", "error"),
    [
        *(({"bits": value}, BitsOutOfRange) for value in (0, -1, 17, math.nan, math.inf)),
        *(({"target_bytes": value}, InvalidGoal) for value in (0, -1, 1.5, 2**63, math.nan)),
        *(({"ratio": value}, InvalidGoal) for value in (1, 0.5, math.inf, math.nan)),
        *(({"max_kl": value}, InvalidGoal) for value in (0, -1e-3, math.inf, math.nan)),
        *(({"min_agreement": value}, InvalidGoal) for value in (0, 1, 98, -0.1, math.nan)),
    ],
)
def test_goals_out_of_range_are_rejected(goals: dict[str, Any], error: type[Exception]) -> None:
    with pytest.raises(error):
        check_goal(**goals)
    with pytest.raises(error):
        goal_for("adamix", **goals)


def test_a_budget_must_lie_in_its_methods_range() -> None:
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
    for goals in ({}, {"bits": 1.0}, {"ratio": 10.0}):
        with pytest.raises(UnknownMethod, match="'zip'"):
            goal_for("zip", **goals)


def test_goals_as_text() -> None:
    words = [str(check_goal(**{kind: GOOD[kind]})) for kind in GOAL_KINDS]
    assert words == [
        "0.5 bit",
        "1,000,000,000 bytes",
        "ratio 13.5",
        "KL at most 0.01",
        "agreement at least 0.98",
    ]


def test_there_is_one_default() -> None:
    assert [info for info in METHODS.values() if info.default] == [default_method()]


def test_methods_have_a_range_of_budgets_or_none() -> None:
    for info in METHODS.values():
        assert (info.bits_min is None) == (info.bits_max is None)
        if info.budgets:
            assert (info.bits_min, info.bits_max) == (min(info.budgets), max(info.budgets))
        for bits in (info.bits_min, info.bits_max):
            assert check_method(info.name, bits) is info


@pytest.mark.parametrize(
    ("name", "bits"),
    [("adamix", 0.1), ("adamix", 8.0), ("exact", None), ("delta-zip", 2.0), ("bitdelta", None)],
)
def test_accepted_budgets(name: str, bits: float | None) -> None:
    assert check_method(name, bits) is METHODS[name]


@pytest.mark.parametrize(
    ("name", "bits"),
    [
        ("adamix", None),
        ("adamix", 0.0999),
        ("adamix", 8.001),
        ("adamix", math.nan),
        ("adamix", math.inf),
        ("exact", 1.0),
        ("delta-zip", 1.5),
        ("delta-zip", None),
        ("bitdelta", 1.0),
    ],
)
def test_rejected_budgets(name: str, bits: float | None) -> None:
    with pytest.raises(BitsOutOfRange, match=name):
        check_method(name, bits)


def test_an_unknown_methods_error_lists_the_known_ones() -> None:
    with pytest.raises(UnknownMethod, match="adamix"):
        check_method("AdaMix", 1.0)


def test_options_import_without_torch() -> None:
    modules = "options, deltadock.compression.preview"
    code = f"import deltadock.compression.{modules}, sys; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
