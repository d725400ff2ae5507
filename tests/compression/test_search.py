"""Search of the budget for a goal, on known functions of size and loss."""

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deltadock.compression import confidence
from deltadock.compression.confidence import (
    STANDARD_ERRORS,
    check_tokens,
    confidence_bound,
    least_share,
)
from deltadock.compression.options import METHODS, Goal, MethodInfo
from deltadock.compression.report import Quality, Report
from deltadock.compression.search import (
    BOUND_TRIALS,
    RESOLUTION,
    SIZE_TRIALS,
    fit_size,
    reach_bound,
)
from deltadock.errors import Cancelled, InvalidGoal

INFO = METHODS["optimix"]
DISCRETE = MethodInfo("two", "Two sizes only", bits_min=1.0, bits_max=2.0, budgets=(1.0, 2.0))
WEIGHTS = 10_000_000
Curve = Callable[[float], float]


class Drafts:
    """A size function that records the budgets it is called with."""

    def __init__(self, size: Callable[[float], float], info: MethodInfo = INFO) -> None:
        self.size, self.info = size, info
        self.asked: list[float] = []

    def __call__(self, bits: float) -> int:
        assert self.info.bits_min is not None
        assert self.info.bits_max is not None
        assert self.info.bits_min <= bits <= self.info.bits_max
        assert bits not in self.asked
        self.asked.append(bits)
        return int(self.size(bits))


def linear(slope: float = 1.0, overhead: float = 400_000) -> Callable[[float], float]:
    return lambda bits: overhead + slope * bits * WEIGHTS / 8


@pytest.mark.parametrize("slope", [0.4, 0.9, 1.0, 1.1, 2.5])
@pytest.mark.parametrize("wanted", [0.06, 0.5, 1.0, 4.0, 7.9])
@pytest.mark.parametrize("guess", [0.5, 0.95, 1.0, 1.1, 2.0])
def test_finds_the_largest_artifact_under_the_limit(
    slope: float, wanted: float, guess: float
) -> None:
    draft = Drafts(linear(slope))
    limit = linear(slope)(wanted)
    bits = fit_size(draft, INFO, limit, guess * wanted, WEIGHTS)
    assert 0.995 * limit <= draft.size(bits) <= limit
    assert bits in draft.asked
    assert len(draft.asked) <= SIZE_TRIALS


@given(
    wanted=st.floats(0.1, 8),
    guess=st.floats(0, 20),
    bend=st.floats(0.7, 1.3),
    slope=st.floats(0.5, 2),
)
@settings(max_examples=80, deadline=None)
def test_the_limit_holds_for_nonlinear_sizes(
    wanted: float, guess: float, bend: float, slope: float
) -> None:
    draft = Drafts(lambda bits: 50_000 + slope * bits**bend * WEIGHTS / 8)
    limit = draft.size(wanted)
    bits = fit_size(draft, INFO, limit, guess, WEIGHTS)
    assert int(draft.size(bits)) <= limit  # an artifact has whole bytes
    assert bits == max(asked for asked in draft.asked if int(draft.size(asked)) <= limit)
    assert len(draft.asked) <= SIZE_TRIALS


def test_a_limit_above_the_largest_size_selects_the_largest() -> None:
    draft = Drafts(linear())
    assert fit_size(draft, INFO, 1e12, 3.0, WEIGHTS) == INFO.bits_max
    assert len(draft.asked) == 2


def test_finds_the_smallest_from_far_above() -> None:
    draft = Drafts(linear(0.05, 10_000))
    limit = draft.size(0.052)
    assert draft.size(fit_size(draft, INFO, limit, 8.0, WEIGHTS)) <= limit


@pytest.mark.parametrize("guess", [0.05, 1.0, 8.0])
def test_a_limit_below_the_smallest_size_is_rejected(guess: float) -> None:
    draft = Drafts(linear())
    smallest = int(draft.size(0.05))
    with pytest.raises(InvalidGoal, match=rf"{smallest - 1} bytes .* smallest takes {smallest}\."):
        fit_size(draft, INFO, smallest - 1, guess, WEIGHTS)
    assert min(draft.asked) == INFO.bits_min


@pytest.mark.parametrize("guess", [0.3, 1.0, 1.4, 1.6, 9.0])
def test_sizes_at_discrete_budgets(guess: float) -> None:
    law = linear()
    for limit, expected in ((law(1.0), 1.0), (law(1.99), 1.0), (law(2.0), 2.0), (law(5), 2.0)):
        assert fit_size(Drafts(law, DISCRETE), DISCRETE, limit, guess, WEIGHTS) == expected
    with pytest.raises(InvalidGoal, match="smallest"):
        fit_size(Drafts(law, DISCRETE), DISCRETE, law(0.99), guess, WEIGHTS)


def agreement(kl: float) -> float:
    return 1 - kl / 100


MANY = 10**12
"""Tokens of which agreement is certain."""


@pytest.fixture(autouse=True)
def _certain_of_many(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whose sum would take long."""
    monkeypatch.setattr(
        confidence,
        "least_share",
        lambda hits, count: hits / count if count == MANY else least_share(hits, count),
    )


class Makes:
    """KL functions of the budget that write files and record the budgets they are called with.

    Attributes:
        curve: on the choosing windows, with a standard error of `error` times it.
        reported: on the reporting windows, `curve` unless given.
    """

    def __init__(
        self, curve: Curve, out: Path, error: float = 0.0, reported: Curve | None = None
    ) -> None:
        self.curve, self.out, self.error, self.reported = curve, out, error, reported or curve
        self.asked: list[float] = []

    def __call__(self, bits: float, path: Path) -> tuple[Report, Quality]:
        self.asked.append(bits)
        path.write_text(f"{bits}")
        report = Report("optimix", bits, int(1000 * bits), 10**6, 10**6, "", None)
        kl = self.curve(bits)
        return report, Quality(kl, 1.0, agreement(kl), 0.0, 0.0, 0.0, MANY, self.error * kl, 0.0)

    def measure(self, report: Report, path: Path) -> None:
        assert path.name.startswith(self.out.name)
        assert path.read_text() == f"{report.nominal_bits}"
        assert report.nominal_bits is not None
        kl = self.reported(report.nominal_bits)
        report.quality = Quality(kl, 1.0, agreement(kl), 0.0, 0.0, 0.0, 1, 0.0, 0.0)


def reach(make: Makes, goal: Goal, info: MethodInfo = INFO) -> float:
    """Returns the chosen budget; checks that other trials' files are deleted."""
    report = reach_bound(make, make.measure, make.out, info, goal)
    bits = report.nominal_bits
    assert bits is not None
    kl = make.curve(bits) * (1 + STANDARD_ERRORS * make.error)
    expected = kl if goal.kind == "max_kl" else agreement(kl)
    assert report.bound_reached == pytest.approx(expected, abs=1e-11)
    assert report.quality is not None
    for figure in (
        report.bound_reached,
        goal.figure(report.quality.kl, report.quality.agreement),
    ):
        assert figure is not None
        assert goal.is_kept(figure)
    assert make.out.read_text() == f"{bits}"
    assert list(make.out.parent.iterdir()) == [make.out]
    if make.reported is make.curve:
        assert report.notes == []
        assert len(make.asked) <= BOUND_TRIALS
        assert len(set(make.asked)) == len(make.asked)
    return bits


@pytest.mark.parametrize("kind", ["max_kl", "min_agreement"])
@pytest.mark.parametrize("power", [0.7, 1.5, 3.0])
@pytest.mark.parametrize("wanted", [0.06, 0.3, 0.99, 1.0, 2.7, 7.5])
def test_finds_the_smallest_budget_within_the_bound(
    kind: str, power: float, wanted: float, tmp_path: Path
) -> None:
    make = Makes(lambda bits: 0.01 * bits**-power, tmp_path / "out")
    kl = make.curve(wanted) * (1 + 1e-9)
    goal = Goal("max_kl", kl) if kind == "max_kl" else Goal("min_agreement", agreement(kl))
    assert 1 - 1e-6 <= reach(make, goal) / wanted <= RESOLUTION * 1.001


@pytest.mark.parametrize("seed", range(6))
def test_on_a_noisy_curve_the_bound_holds_and_the_budget_is_near_the_smallest(
    seed: int, tmp_path: Path
) -> None:
    def curve(bits: float) -> float:
        return 0.02 * math.pow(bits, -1.2) * (1 + 0.1 * math.sin(37 * bits + seed))

    make, limit = Makes(curve, tmp_path / "out"), 0.02 * (0.4 + 0.3 * seed) ** -1.2
    bits = reach(make, Goal("max_kl", limit))
    assert curve(bits) <= limit
    failed = [asked for asked in make.asked if curve(asked) > limit]
    assert bits <= max(b for b in failed if b < bits) * 1.1
    assert all(asked >= bits for asked in make.asked if curve(asked) <= limit)


@pytest.mark.parametrize("error", [0.05, 0.5])
def test_an_uncertain_figure_must_keep_the_bound_with_confidence(
    error: float, tmp_path: Path
) -> None:
    make = Makes(lambda bits: 0.01 * bits**-2, tmp_path / "out", error)
    bits = reach(make, Goal("max_kl", 0.01))
    assert 1 - 1e-6 <= bits / math.sqrt(1 + STANDARD_ERRORS * error) <= RESOLUTION * 1.001


def test_the_bound_of_a_kl_counts_tokens_that_the_text_may_lack() -> None:
    quality = Quality(0.1, 1.0, 0.9, 0.0, 0.0, 0.0, 1000, 0.01, 5.0)
    bound = confidence_bound(Goal("max_kl", 0.5), quality)
    assert bound == pytest.approx(0.1 + 1.645 * 0.01 + math.log(20) * 5.0 / 1000)


def test_the_bound_of_a_skewed_kl_is_kept_where_standard_errors_are_not() -> None:
    """Half of the sum is in one token of a hundred, as of deltas."""
    random, tokens, texts = np.random.default_rng(0), 1024, 4000
    kls = random.lognormal(0.0, 2.3, (texts, tokens))
    kept = naive = 0
    for kl in kls:
        error = float(kl.std()) / math.sqrt(tokens)
        quality = Quality(float(kl.mean()), 1.0, 1.0, 0.0, 0.0, 0.0, tokens, error, float(kl.max()))
        kept += confidence_bound(Goal("max_kl", 1.0), quality) >= math.exp(2.3**2 / 2)
        naive += quality.kl + STANDARD_ERRORS * error >= math.exp(2.3**2 / 2)
    assert naive < 0.82 * texts
    assert kept > 0.9 * texts


# Quantiles of the beta distribution of (hits, count - hits + 1), by SciPy 1.17.
@pytest.mark.parametrize(
    ("hits", "count", "expected"),
    [
        (16, 16, 0.8292502770175191), (15, 16, 0.7360426027114314), (1, 16, 0.0032006977101884967),
        (100, 128, 0.7126005006479916), (3500, 3840, 0.903553402415822),
        (500_000, 1_000_000, 0.4991770739494771), (0, 16, 0.0),
    ],
)  # fmt: skip
def test_the_bound_of_an_agreement_is_exact(hits: int, count: int, expected: float) -> None:
    assert least_share(hits, count) == pytest.approx(expected, rel=1e-9)
    quality = Quality(0.1, 1.0, hits / count, 0.0, 0.0, 0.0, count, 0.01, 1.0)
    assert confidence_bound(Goal("min_agreement", 0.5), quality) == least_share(hits, count)


@pytest.mark.parametrize(
    ("goal", "least"),
    [
        (Goal("max_kl", 1e-6), 512), (Goal("max_kl", 10.0), 512), (Goal("min_agreement", 0.95), 59),
        (Goal("min_agreement", 0.99), 299),
    ],
    ids=str,
)  # fmt: skip
def test_a_text_too_short_to_vouch_for_a_bound_is_refused(
    goal: Goal, least: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(confidence, "LEAST_TOKENS", 512)
    check_tokens(goal, least, 1)
    check_tokens(goal, 1, least)
    with pytest.raises(
        InvalidGoal, match=rf" {least} tokens .* gives {least - 1}\..* {16 * least} "
    ):
        check_tokens(goal, least - 1, 1)
    with pytest.raises(InvalidGoal, match=rf"gives 50\. .* of {16 * 50 * -(-least // 50)} tokens"):
        check_tokens(goal, 1, 50)
    if goal.kind == "min_agreement":
        assert goal.is_kept(least_share(least, least))
        assert not goal.is_kept(least_share(least - 1, least - 1))


@pytest.mark.parametrize("kind", ["max_kl", "min_agreement"])
@pytest.mark.parametrize("excess", [1.001, 1.05, 1.2, 1.7, 5.0])
@pytest.mark.parametrize(
    "curve",
    [lambda bits: 0.02 / bits, lambda bits: 0.02 / bits**3, lambda bits: 0.1 * math.exp(-bits)],
    ids=["inverse", "cube", "exponential"],
)
@pytest.mark.parametrize("allowed", [0.9, 1.001, 1.04, 1.5])
def test_a_bound_that_the_report_misses_takes_the_smallest_larger_budget(
    kind: str, excess: float, curve: Curve, allowed: float, tmp_path: Path
) -> None:
    """The text that decides is kinder than the report's."""

    def reported(bits: float) -> float:
        return excess * curve(bits)

    make = Makes(curve, tmp_path / "out", reported=reported)
    limit = allowed * curve(1.0)
    goal = Goal("max_kl", limit) if kind == "max_kl" else Goal("min_agreement", agreement(limit))
    bits = reach(make, goal)
    assert reported(bits / (RESOLUTION * 1.001)) > limit
    assert len(make.asked) <= BOUND_TRIALS + 5


def test_a_raised_budget_says_so(tmp_path: Path) -> None:
    make = Makes(lambda bits: 0.01 / bits, tmp_path / "out", reported=lambda bits: 0.013 / bits)
    report = reach_bound(make, make.measure, make.out, INFO, Goal("max_kl", 0.01))
    assert report.notes
    assert all("KL at most 0.01: at 1" in note for note in report.notes)


@pytest.mark.parametrize("info", [INFO, DISCRETE])
@pytest.mark.parametrize("kl", [0.02, math.nan])
def test_a_bound_that_the_report_never_keeps_is_rejected(
    kl: float, info: MethodInfo, tmp_path: Path
) -> None:
    make = Makes(lambda bits: 0.01 / bits, tmp_path / "out", reported=lambda _: kl)
    with pytest.raises(InvalidGoal, match=rf"not kept even at {info.bits_max:g} bits: {kl:g} is"):
        reach_bound(make, make.measure, make.out, info, Goal("max_kl", 0.01))


def test_a_curve_with_a_step(tmp_path: Path) -> None:
    make = Makes(lambda bits: 1e-4 if bits >= 0.71 else 2.0, tmp_path / "out")
    assert 0.71 <= reach(make, Goal("max_kl", 0.01)) <= 0.71 * 1.15


@pytest.mark.parametrize("kl", [0.0, 1e-5])
def test_the_smallest_budget_may_suffice(kl: float, tmp_path: Path) -> None:
    make = Makes(lambda _: kl, tmp_path / "out")
    assert reach(make, Goal("max_kl", 0.01)) == INFO.bits_min


def test_discrete_budgets(tmp_path: Path) -> None:
    for kl, expected in ((0.5, 2.0), (1.0, 1.0), (3.0, 1.0)):
        make = Makes(lambda bits: 1 / bits, tmp_path / "out")
        assert reach(make, Goal("max_kl", kl), DISCRETE) == expected
        assert set(make.asked) <= {1.0, 2.0}
    make = Makes(lambda bits: 1 / bits, tmp_path / "out", reported=lambda bits: 1.5 / bits)
    assert reach(make, Goal("max_kl", 1.0), DISCRETE) == 2.0


@pytest.mark.parametrize("curve", [lambda bits: 1 / bits, lambda bits: math.nan])
@pytest.mark.parametrize("info", [INFO, DISCRETE])
def test_an_unreachable_bound_is_rejected(curve: Curve, info: MethodInfo, tmp_path: Path) -> None:
    make = Makes(curve, tmp_path / "out")
    reached = f"{curve(info.bits_max or 0):.4g}"
    with pytest.raises(InvalidGoal, match=rf"KL at most 0.1 .* {info.bits_max:g} bits: {reached}"):
        reach_bound(make, make.measure, make.out, info, Goal("max_kl", 0.1))
    assert list(tmp_path.iterdir()) == []


def test_a_failed_trial_leaves_no_file(tmp_path: Path) -> None:
    def stopped(bits: float, path: Path) -> tuple[Report, Quality]:
        path.write_text("half")
        raise Cancelled("stop")

    with pytest.raises(Cancelled):
        reach_bound(stopped, lambda *_: None, tmp_path / "out", INFO, Goal("max_kl", 0.1))
    assert list(tmp_path.iterdir()) == []
