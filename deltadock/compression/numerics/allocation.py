"""Bit allocation (AdaMix, Eq. 10): one width per rank under a budget, few distinct widths.

    minimise   sum_i errors[i, width_i]
    subject to sum_i width_i <= budget,  at most `f_max` distinct widths (0 counts as one).

Every rank of one matrix costs `width * (h_in + h_out)` bits, so the budget is in small integers:
a multiple-choice knapsack. Two solvers reach the same optimum:
- `exact`: a Lagrangian bound for each subset of widths prunes the subsets; reduced costs fix most
  ranks of those that remain; dynamic programming over the capacity decides the rest;
- `scip`: the 0/1 program as in the paper, solved by SCIP, which certifies the gap.
"""

import math
from dataclasses import dataclass
from itertools import combinations
from typing import Final

import numpy as np
import numpy.typing as npt

from deltadock.compression.options import Solver
from deltadock.errors import InvalidInput

Array = npt.NDArray[np.float64]

WIDTHS: Final = (0, 2, 3, 4, 5, 6, 7, 8)
PRECISION: Final = 1e-9
"""Relative width at which the multiplier search ends; any multiplier gives a valid bound."""
NEAR: Final = 16.0


@dataclass(frozen=True, slots=True)
class Allocation:
    """Widths (r,) in bits, their total error, and the relative optimality gap (0 = proven)."""

    widths: npt.NDArray[np.int64]
    error: float
    gap: float


def allocate(
    errors: Array,
    budget: int,
    widths: tuple[int, ...] = WIDTHS,
    f_max: int = 4,
    solver: Solver = "exact",
) -> Allocation:
    """Choose each rank's width.

    Args:
        errors: (r, len(widths)), error of each rank at each width, not negative.
        budget: upper bound of the widths' sum, in rank-bits.
        widths: candidate widths in bits.
        f_max: largest number of distinct widths.
        solver: `exact` or `scip`.

    Raises:
        InvalidInput: no allocation fits the budget.
    """
    if errors.shape[0] * min(widths) > budget:
        raise InvalidInput(f"No allocation of {errors.shape[0]} ranks fits {budget} rank-bits.")
    if errors.shape[0] == 0:
        return Allocation(np.zeros(0, np.int64), 0.0, 0.0)
    solve = _solve_scip if solver == "scip" else _solve_exact
    return solve(errors, budget, widths, f_max)


def _solve_exact(errors: Array, budget: int, widths: tuple[int, ...], f_max: int) -> Allocation:
    costs = np.asarray(widths, np.float64)
    subsets = [
        list(columns)
        for columns in combinations(range(len(widths)), min(f_max, len(widths)))
        if len(errors) * costs[list(columns)].min() <= budget
    ]
    # Any multiplier bounds every subset: that of all widths together prunes most of them.
    _, shared, _ = _relax(errors, costs, budget, None)
    priced = np.ascontiguousarray((errors + shared * costs).T)
    first = [float(priced[columns].min(axis=0).sum() - shared * budget) for columns in subsets]
    best_error, best_choice = np.inf, np.zeros(len(errors), np.int64)
    for rough, columns in sorted(zip(first, subsets, strict=True)):
        if rough >= best_error:
            break
        part, prices = errors[:, columns], costs[columns]
        bound, multiplier, choice = _relax(part, prices, budget, shared)
        error = float(np.take_along_axis(part, choice[:, None], 1).sum())
        if error < best_error:
            best_error, best_choice = error, np.asarray(columns)[choice]
        if bound < best_error:
            found = _decide(part, prices, budget, multiplier, bound, best_error)
            if found is not None:
                best_error, best_choice = found[0], np.asarray(columns)[found[1]]
    return Allocation(np.asarray(widths, np.int64)[best_choice], best_error, 0.0)


def _relax(
    errors: Array, costs: Array, budget: int, near: float | None
) -> tuple[float, float, npt.NDArray[np.int64]]:
    """Lagrangian relaxation of the budget.

    Args:
        errors: (r, k).
        costs: (k,).
        budget: upper bound of the costs' sum.
        near: initial guess of the multiplier, if there is one.

    Returns:
        The bound `max_m sum_i min_k(errors + m * costs) - m * budget`, its multiplier `m`, and
        the choice (r,) at the smallest feasible multiplier, which fits the budget.
    """
    columns, prices = np.ascontiguousarray(errors.T), costs[:, None]
    choice = np.argmin(columns, axis=0)
    if costs[choice].sum() <= budget:
        return float(errors.min(axis=1).sum()), 0.0, choice

    def spent(multiplier: float) -> float:
        return float(costs[np.argmin(columns + multiplier * prices, axis=0)].sum())

    ceiling = float(errors.max()) + float(np.finfo(np.float64).tiny)
    low, high = ceiling * 1e-18, ceiling
    if near:
        below, above = max(near / NEAR, low), min(near * NEAR, high)
        low = below if spent(below) > budget else low
        high = above if spent(above) <= budget else high
    while high > low * (1 + PRECISION):
        middle = math.sqrt(low * high)
        low, high = (middle, high) if spent(middle) > budget else (low, middle)
    bound, multiplier = max(
        (float((columns + m * prices).min(axis=0).sum() - m * budget), m) for m in (low, high)
    )
    choice = np.argmin(columns + high * prices, axis=0)
    if costs[choice].sum() > budget:
        # No multiplier up to the ceiling is feasible: take the cheapest width for every rank.
        choice = np.full(len(errors), np.argmin(costs))
    return bound, multiplier, choice


def _decide(
    errors: Array, costs: Array, budget: int, multiplier: float, bound: float, limit: float
) -> tuple[float, npt.NDArray[np.int64]] | None:
    """The best choice within one subset of widths if its error is below `limit`, else None.

    A choice whose reduced cost lifts the bound over `limit` cannot be part of a better solution
    (with a margin for rounding); ranks left with one choice are fixed, dynamic programming
    over the capacity decides the others.
    """
    rows = len(errors)
    priced = errors + multiplier * costs
    reduced = priced - priced.min(axis=1, keepdims=True)
    margin = 1e-12 * (abs(limit) + multiplier * budget)
    allowed = reduced <= limit - bound + margin
    choice = np.argmin(np.where(allowed, priced, np.inf), axis=1)
    open_rows = np.flatnonzero(allowed.sum(axis=1) > 1)
    fixed = np.setdiff1d(np.arange(rows), open_rows)
    capacity = int(budget - costs[choice[fixed]].sum())
    if capacity < 0:
        return None
    # best[c]: least error of the open ranks so far within capacity c.
    best = np.zeros(capacity + 1)
    taken = np.zeros((len(open_rows), capacity + 1), np.int8)
    for step, row in enumerate(open_rows.tolist()):
        following = np.full(capacity + 1, np.inf)
        for k in np.flatnonzero(allowed[row]).tolist():
            cost = int(costs[k])
            if cost > capacity:
                continue
            candidate = best[: capacity + 1 - cost] + errors[row, k]
            better = candidate < following[cost:]
            following[cost:][better] = candidate[better]
            taken[step, cost:][better] = k
        best = following
    if not np.isfinite(best[capacity]):
        return None
    for step in range(len(open_rows) - 1, -1, -1):
        k = int(taken[step, capacity])
        choice[open_rows[step]] = k
        capacity -= int(costs[k])
    error = float(np.take_along_axis(errors, choice[:, None], 1).sum())
    return (error, choice) if error < limit else None


def _solve_scip(errors: Array, budget: int, widths: tuple[int, ...], f_max: int) -> Allocation:
    import pyscipopt  # optional: not installed everywhere

    ranks, count = errors.shape
    # SCIP's tolerances are absolute, so the objective is scaled to about one.
    unit = float(errors.sum()) / errors.size or 1.0
    model = pyscipopt.Model()
    model.hideOutput()
    model.setParam("limits/gap", 0.0)
    model.setParam("numerics/epsilon", 1e-13)
    choose = [[model.addVar(vtype="B") for _ in range(count)] for _ in range(ranks)]
    used = [model.addVar(vtype="B") for _ in range(count)]
    for i in range(ranks):
        model.addCons(pyscipopt.quicksum(choose[i]) == 1)
    for k in range(count):
        model.addCons(pyscipopt.quicksum(choose[i][k] for i in range(ranks)) <= ranks * used[k])
    model.addCons(pyscipopt.quicksum(used) <= f_max)
    model.addCons(
        pyscipopt.quicksum(widths[k] * choose[i][k] for i in range(ranks) for k in range(count))
        <= budget
    )
    model.setObjective(
        pyscipopt.quicksum(
            float(errors[i, k] / unit) * choose[i][k] for i in range(ranks) for k in range(count)
        )
    )
    # Release the GIL: long solves must not block a worker's heartbeat thread.
    model.optimizeNogil()
    choice = np.asarray(
        [max(range(count), key=lambda k: model.getVal(choose[i][k])) for i in range(ranks)]
    )
    error = float(np.take_along_axis(errors, choice[:, None], 1).sum())
    return Allocation(np.asarray(widths, np.int64)[choice], error, float(model.getGap()))
