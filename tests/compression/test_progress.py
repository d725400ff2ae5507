"""Shares of a compression's phases by the work expected of them."""

from itertools import pairwise

import pytest

from deltadock.compression import progress
from deltadock.compression.options import METHODS, Goal
from deltadock.compression.progress import (
    READING,
    Forecast,
    Phase,
    Progress,
    ProgressReporter,
)
from deltadock.compression.work import ExpectedWork, mean_side


@pytest.fixture
def seen() -> list[Progress]:
    return []


@pytest.fixture
def reporter(seen: list[Progress]) -> ProgressReporter:
    reporter = ProgressReporter(seen.append)
    reporter.report("reading", 1, 2, "reading")
    return reporter


def test_phases_share_the_rest_by_their_work(
    reporter: ProgressReporter, seen: list[Progress]
) -> None:
    reporter.expect({"inputs": 3.0, "comparing": 1.0})
    reporter.report("inputs", 1, 2, "block 2 of 2")
    reporter.report("comparing", 0, 1, "comparing")
    reporter.report("comparing", 1, 1, "comparing")
    rest = 1 - READING
    fractions = [READING / 2, READING + 0.375 * rest, READING + 0.75 * rest, 1.0]
    assert [progress.fraction for progress in seen] == pytest.approx(fractions)
    assert seen[0].worked == 0.0
    assert seen[-1].worked == pytest.approx(rest)
    assert [progress.stage for progress in seen[-2:]] == ["verifying"] * 2


def test_less_work_moves_on_and_more_slows_down(
    reporter: ProgressReporter, seen: list[Progress]
) -> None:
    reporter.expect({"encoding": 1.0, "later": 2.0, "comparing": 1.0})
    reporter.report("encoding", 1, 1, "block 1 of 1")
    worked = seen[-1].worked
    reporter.expect({"comparing": 1.0})  # the search has ended
    reporter.report("comparing", 0, 2, "comparing")
    assert seen[-1].fraction == pytest.approx(1 - (1 - READING) / 4)
    assert seen[-1].worked == worked
    reporter.expect({"encoding": 3.0, "comparing": 1.0})
    reporter.report("encoding", 1, 1, "block 1 of 1")
    assert seen[-1].fraction == pytest.approx(1 - (1 - READING) / 16)


def test_what_was_saved_is_not_worked(reporter: ProgressReporter, seen: list[Progress]) -> None:
    reporter.expect({"encoding": 2.0, "comparing": 2.0})
    reporter.report("encoding", 1, 1, "block 1 of 1", saved=True)
    reporter.report("comparing", 1, 1, "comparing")
    assert seen[-1].fraction == 1.0
    assert seen[-1].worked == pytest.approx((1 - READING) / 2)


def test_the_rate_of_this_run_predicts_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(progress.time, "monotonic", lambda: now)
    forecast = Forecast()

    def left(fraction: float, worked: float) -> float | None:
        return forecast.seconds_left(Progress("encoding", 0, 1, fraction, worked, ""))

    now = 110.0  # reading, which is no work
    assert left(0.5, 0.0) is None
    now = 111.0
    assert left(0.52, 0.02) is None, "too little to tell"
    now = 120.0
    assert left(0.75, 0.25) == pytest.approx(10.0)
    assert left(1.0, 0.5) == 0.0


def test_a_long_search_for_a_bound_moves_on_to_its_end(
    reporter: ProgressReporter, seen: list[Progress]
) -> None:
    """Of nine budgets, a check by the report's text that fails, and four more."""
    work = ExpectedWork(METHODS["optimix"], Goal("max_kl", 0.02), 300.0, 6e3, train=5e4, choose=3e3)
    reporter.expect(work.calibration() | work.trials())
    ends = [0.0]

    def work_through(phases: dict[Phase, float]) -> None:
        reporter.expect(phases)
        for phase in phases:
            if phase != "later":
                reporter.report(phase, 1, 1, phase)
        ends.append(seen[-1].fraction)

    for done in range(13):
        work_through(work.trials(done))
        if done == 8:
            work_through(work.check())
    assert all(after - before > 0.0005 for before, after in pairwise(ends))
    assert ends[-1] < 0.995
    reporter.finish()
    assert seen[-1] == seen[-2]._replace(fraction=1.0)


@pytest.mark.parametrize("goal", [None, Goal("ratio", 8.0), Goal("max_kl", 0.01)], ids=str)
@pytest.mark.parametrize("name", [name for name, one in METHODS.items() if not one.imports_adapter])
def test_work_is_expected_of_every_method(name: str, goal: Goal | None) -> None:
    work = ExpectedWork(METHODS[name], goal, 300.0, 6e3, train=5e4, choose=3e3)
    whole = work.calibration() | work.trials()
    assert all(amount >= 0 for amount in whole.values())
    assert ("gradients" in whole) == (name == "optimix")
    later = [work.trials(done).get("later", 0.0) for done in range(10)]
    assert later == sorted(later, reverse=True)
    assert (later[0] > later[-1]) == (goal is not None)


def test_the_mean_side_counts_what_changed() -> None:
    shapes = [((8, 8), True), ((2, 8, 8), False), ((5,), True), ((0, 4), True)]
    assert mean_side(shapes) == pytest.approx(64 * 8 / 192)
    assert mean_side([((1000, 10), True)]) == pytest.approx(2 * 1000 * 10 / 1010)
    assert mean_side([]) == 0.0
