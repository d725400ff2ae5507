"""Search for the budget that meets a goal: a size in bytes, or a bound on the KL or agreement."""

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final

from deltadock.compression.confidence import confidence_bound
from deltadock.compression.options import Goal, MethodInfo
from deltadock.compression.report import Quality, Report
from deltadock.errors import InvalidGoal

SIZE_TRIALS: Final = 6
CLOSE: Final = 0.995
"""Fraction of the byte limit at which the search ends."""
BOUND_TRIALS: Final = 9
FIRST_BITS: Final = 1.0
RESOLUTION: Final = 1.03
"""Factor between budgets at which the search ends."""


def fit_size(
    draft_bytes: Callable[[float], int], info: MethodInfo, limit: float, guess: float, weights: int
) -> float:
    """Find the budget whose artifact is the largest of at most `limit` bytes.

    Args:
        draft_bytes: size of the artifact at a budget.
        info: the method.
        limit: in bytes.
        guess: the first budget, code bits per weight.
        weights: number of weights that the budget is for.

    Raises:
        InvalidGoal: the method's smallest artifact is larger.
    """
    low, high = _range(info)
    bits = _nearest(info, guess)
    below, above = 0.0, math.inf
    # Bytes per bit of budget, from the codes alone.
    slope = max(weights, 1) / 8
    tried: dict[float, int] = {}
    for left in reversed(range(SIZE_TRIALS)):
        size = draft_bytes(bits)
        tried[bits] = size
        fits = size <= limit
        below, above = (bits, above) if fits else (below, bits)
        if (fits and (size >= CLOSE * limit or bits == high)) or (not fits and bits == low):
            break
        if info.budgets:
            between = [budget for budget in info.budgets if below < budget < above]
            if not between:
                break
            bits = between[-1] if fits else between[0]
            continue
        bits = min(max(_towards((CLOSE + 1) / 2 * limit, tried, below, above, slope), low), high)
        if left == 1 and below == 0.0:
            bits = low
        if bits in tried:
            break
    if below == 0.0:
        raise InvalidGoal(
            f"{info.name!r} cannot make an artifact of {limit:.0f} bytes of this model: its "
            f"smallest takes {min(tried.values())}. Allow more bytes, or take another method."
        )
    return below


def _towards(
    aim: float, tried: Mapping[float, int], below: float, above: float, slope: float
) -> float:
    """The next budget to try for `aim` bytes, by linear interpolation.

    Sizes grow in small jumps, which make the slope between close budgets meaningless: the line goes
    through the nearest budget that fits and the nearest that does not, and stops a fifth short
    if the last two trials missed on the same side (as in the Illinois method).
    """
    *_, last = tried
    if below in tried and above in tried:
        share = (aim - tried[below]) / max(tried[above] - tried[below], 1)
        sides = [budget >= above for budget in list(tried)[-2:]]
        if sides[0] == sides[1]:
            share = share * 0.8 if sides[0] else 1 - (1 - share) * 0.8
        return below + (above - below) * min(max(share, 0.05), 0.95)
    if len(tried) > 1:
        first, second = list(tried)[-2:]
        measured = (tried[second] - tried[first]) / (second - first)
        slope = measured if measured > 0 else slope
    bits = last + (aim - tried[last]) / slope
    return bits if below < bits < above else (below + above) / 2


def reach_bound(
    attempt: Callable[[float, Path], tuple[Report, Quality]],
    measure: Callable[[Report, Path], None],
    out: Path,
    info: MethodInfo,
    goal: Goal,
) -> Report:
    """Write the smallest artifact that keeps a bound on KL or agreement, and measure it.

    The search goes by the confidence bound of the figure on the choosing windows: of budgets that
    are near the smallest it would else take the one to which these windows happen to be kind. The
    reporting windows check what it found; if they miss the bound, the smallest larger budget that
    keeps it on both is looked for.

    Args:
        attempt: writes the artifact at a budget, and measures it on the choosing windows.
        measure: measures an artifact on the reporting windows, for its report.
        out: the delta file.
        info: the method.
        goal: of kind `max_kl` or `min_agreement`.

    Raises:
        InvalidGoal: not even the method's largest budget keeps it; the message says which figure
            was reached.
    """

    def choose(bits: float, path: Path) -> tuple[Report, float]:
        report, quality = attempt(bits, path)
        report.bound_reached = confidence_bound(goal, quality)
        return report, report.bound_reached

    def check(report: Report, path: Path) -> float:
        measure(report, path)
        assert report.quality is not None, "a bound needs calibration text, which measures too"
        return goal.figure(report.quality.kl, report.quality.agreement)

    def judge(bits: float, path: Path) -> tuple[Report, float]:
        report, bound = choose(bits, path)
        worse = max((check(report, path), bound), key=lambda f: (not goal.is_kept(f), goal.loss(f)))
        return report, worse

    bits, report = _smallest(choose, out, info, goal, _nearest(info, FIRST_BITS), {})
    figure = check(report, out)
    if goal.is_kept(figure):
        return report
    if bits == info.bits_max:
        raise _unreachable(goal, bits, figure)
    # Loss falls about as fast as the budget grows, or faster.
    excess = goal.loss(figure) / goal.loss(goal.value)
    larger = _nearest(info, bits * max(RESOLUTION, min(2.0, excess)), above=bits)
    _, report = _smallest(judge, out, info, goal, larger, {bits: figure})
    report.notes.append(
        f"The report's text checked the goal, {goal}: at {bits:.3g} bits it had {figure:.3g}, "
        "so the budget was raised."
    )
    return report


def _smallest(
    judge: Callable[[float, Path], tuple[Report, float]],
    out: Path,
    info: MethodInfo,
    goal: Goal,
    bits: float,
    missed: Mapping[float, float],
) -> tuple[float, Report]:
    """Write the artifact of the smallest budget that keeps the bound; returns the budget too.

    Args:
        judge: writes the artifact at a budget; its report, and the figure that the bound is on.
        out: the delta file.
        info: the method.
        goal: the bound.
        bits: the first budget to try.
        missed: figures of smaller budgets, which miss the bound.
    """
    low, high = _range(info)
    best: Report | None = None
    trial = out.with_name(out.name + ".trial")
    reached = dict(missed)
    failing, holding = max(missed, default=low / RESOLUTION), math.inf
    for _ in range(BOUND_TRIALS):
        try:
            report, reached[bits] = judge(bits, trial)
        except BaseException:
            trial.unlink(missing_ok=True)
            raise
        held = goal.is_kept(reached[bits])
        if held:
            trial.replace(out)
            best, holding = report, bits
        else:
            trial.unlink()
            failing = bits
        if bits == high and not held:
            break
        if holding <= failing * RESOLUTION or (bits == low and held):
            break
        bits = _next(reached, goal, failing, holding, low, high)
        if info.budgets:
            left = [b for b in info.budgets if failing < b < holding]
            if not left:
                break
            bits = left[len(left) // 2]
    if best is None:
        raise _unreachable(goal, max(reached), reached[max(reached)])
    return holding, best


def _unreachable(goal: Goal, bits: float, figure: float) -> InvalidGoal:
    return InvalidGoal(
        f"{goal} is not kept even at {bits:g} bits: {figure:.4g} is all that the calibration text "
        "vouches for. Loosen the bound, give more text, or keep the fine-tune itself with the "
        "method 'exact'."
    )


def _next(
    reached: Mapping[float, float],
    goal: Goal,
    failing: float,
    holding: float,
    low: float,
    high: float,
) -> float:
    """The next budget: where a power law through the nearest two meets the bound, away from the
    ends of the open interval."""
    if holding == math.inf:
        return min(failing * 2, high)
    if failing < low:
        return max(holding / 2, low)
    losses = {b: max(goal.loss(figure), 1e-12) for b, figure in reached.items()}
    wanted = max(goal.loss(goal.value), 1e-12)
    first, second = math.log(losses[failing]), math.log(losses[holding])
    middle = 0.5
    if first > second:
        # Slightly to the safe side, as an artifact that fails is useless.
        middle = min(max((first - math.log(wanted)) / (first - second) + 0.05, 0.15), 0.85)
    return math.exp(math.log(failing) * (1 - middle) + math.log(holding) * middle)


def _range(info: MethodInfo) -> tuple[float, float]:
    assert info.bits_min is not None, "a method without a budget has no goal"
    assert info.bits_max is not None
    return info.bits_min, info.bits_max


def _nearest(info: MethodInfo, bits: float, above: float = 0.0) -> float:
    """The budget nearest to `bits` that the method takes; of few budgets, one above `above`."""
    low, high = _range(info)
    if info.budgets:
        larger = [budget for budget in info.budgets if budget > above]
        return min(larger, key=lambda budget: abs(budget - bits))
    return min(max(bits, low), high)
