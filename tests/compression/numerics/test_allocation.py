"""Both allocation solvers against exhaustive search, and against each other."""

from itertools import product

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deltadock.compression.numerics.allocation import WIDTHS, Allocation, allocate
from deltadock.compression.options import rank_budget
from deltadock.errors import InvalidInput

Array = npt.NDArray[np.float64]


def check(found: Allocation, errors: Array, budget: int, widths: tuple[int, ...], f: int) -> None:
    assert found.widths.sum() <= budget
    assert len(set(found.widths.tolist())) <= f
    column = [widths.index(width) for width in found.widths.tolist()]
    assert found.error == pytest.approx(errors[np.arange(len(errors)), column].sum(), rel=1e-12)


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 4).flatmap(
        lambda r: st.tuples(
            st.lists(st.lists(st.floats(0, 100), min_size=5, max_size=5), min_size=r, max_size=r),
            st.integers(0, 8 * r),
            st.integers(1, 4),
        )
    )
)
def test_exact_equals_exhaustive_search(case: tuple[list[list[float]], int, int]) -> None:
    rows, budget, f_max = case
    errors, widths = np.asarray(rows), (0, 2, 3, 5, 8)
    best = min(
        sum(errors[i, k] for i, k in enumerate(choice))
        for choice in product(range(5), repeat=len(rows))
        if sum(widths[k] for k in choice) <= budget and len(set(choice)) <= f_max
    )
    found = allocate(errors, budget, widths, f_max)
    check(found, errors, budget, widths, f_max)
    assert found.error == pytest.approx(best, rel=1e-9, abs=1e-12)


def spectrum(ranks: int, seed: int) -> Array:
    """Typical errors: decaying energies, a factor of four per bit, some noise."""
    rng = np.random.default_rng(seed)
    energy = np.exp(-np.arange(ranks) / ranks * 6) * (1 + 0.2 * rng.random(ranks))
    noise = np.exp(0.3 * rng.standard_normal((ranks, len(WIDTHS))))
    share = np.asarray([1.0] + [1.5 * 4.0**-width for width in WIDTHS[1:]])
    result: Array = energy[:, None] * share * noise
    return result


@pytest.mark.parametrize("ranks", [12, 60])
@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("unit", [1.0, 1e-9, 1e7])
def test_scip_reaches_the_same_optimum(ranks: int, seed: int, unit: float) -> None:
    errors = spectrum(ranks, seed) * unit
    budget = int(2.2 * ranks)
    exact = allocate(errors, budget)
    certified = allocate(errors, budget, solver="scip")
    check(exact, errors, budget, WIDTHS, 4)
    check(certified, errors, budget, WIDTHS, 4)
    assert certified.gap == 0
    assert exact.error == pytest.approx(certified.error, rel=1e-9)


def test_f_max_binds() -> None:
    errors = spectrum(40, 5)
    free, bound = (allocate(errors, 120, f_max=f) for f in (8, 2))
    check(bound, errors, 120, WIDTHS, 2)
    assert free.error < bound.error


def test_more_budget_is_never_worse() -> None:
    errors = spectrum(50, 7)
    found = [allocate(errors, budget).error for budget in range(0, 400, 25)]
    assert found == sorted(found, reverse=True)


def test_no_ranks_or_no_budget() -> None:
    assert allocate(np.zeros((0, 8)), 5).error == 0
    with pytest.raises(InvalidInput, match="No allocation"):
        allocate(np.ones((3, 1)), 5, widths=(2,))


def test_budget_in_rank_bits() -> None:
    assert rank_budget(1.0, 256, 256) == 128
    assert rank_budget(0.5, 768, 256) == 96
