"""One budget for all ranks: against exhaustive search, SCIP and the Lagrangian bound."""

from itertools import product

import pyscipopt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from deltadock.compression.numerics.global_allocation import (
    SCALE_BITS,
    GlobalAllocation,
    RankProfile,
    RankWidths,
    allocate,
)
from deltadock.compression.numerics.two_sided import WIDTHS
from deltadock.errors import InvalidInput

CHOICES = 1 + len(WIDTHS) ** 2


def make_losses(ranks: int, generator: torch.Generator) -> Tensor:
    """Losses that decay with width like a quantizer's."""
    decay = 0.4 + 2 * torch.rand(ranks, 1, generator=generator, dtype=torch.float64)
    return torch.exp(-decay * torch.tensor(WIDTHS, dtype=torch.float64))


def make_profile(
    ranks: int, seed: int = 0, shape: tuple[int, int] = (32, 64), overhead: int = 0
) -> RankProfile:
    generator = torch.Generator().manual_seed(seed)
    s = torch.rand(ranks, generator=generator, dtype=torch.float64).sort(descending=True).values
    losses = make_losses(ranks, generator), make_losses(ranks, generator)
    return RankProfile(shape, s, *losses, overhead)


def spent(profiles: list[RankProfile], allocation: GlobalAllocation) -> float:
    """Bits used, counted from the shapes."""
    total = 0.0
    for profile, widths in zip(profiles, allocation.widths, strict=True):
        h_out, h_in = (-(-n // 32) * 32 for n in profile.shape)
        total += float((widths.u * h_out + widths.v * h_in + SCALE_BITS).sum()) + profile.overhead
    return total


def lost(profiles: list[RankProfile], allocation: GlobalAllocation) -> float:
    """Error in nats, summed over ranks."""
    total = 0.0
    for profile, widths in zip(profiles, allocation.widths, strict=True):
        chosen = dict(
            zip(
                widths.kept.tolist(),
                zip(widths.u.tolist(), widths.v.tolist(), strict=True),
                strict=True,
            )
        )
        for rank, value in enumerate(profile.s.tolist()):
            share_lost = 1.0
            if rank in chosen:
                u, v = (WIDTHS.index(width) for width in chosen[rank])
                share_lost = 1 - (1 - float(profile.u_losses[rank, u])) * (
                    1 - float(profile.v_losses[rank, v])
                )
            total += share_lost * value**2 / 2
    return total


def optimum(profiles: list[RankProfile], budget: float) -> float:
    """The smallest error, by exhaustive search."""
    ranks = [
        (errors.tolist(), profile.costs().tolist())
        for profile in profiles
        for errors in profile.errors()
    ]
    best = float("inf")
    for picked in product(range(CHOICES), repeat=len(ranks)):
        cost = sum(costs[p] for (_, costs), p in zip(ranks, picked, strict=True))
        if cost <= budget:
            best = min(best, sum(errors[p] for (errors, _), p in zip(ranks, picked, strict=True)))
    return best


def test_errors_and_costs_of_a_rank() -> None:
    profile = make_profile(3, shape=(33, 64))
    errors, costs = profile.errors(), profile.costs()
    assert errors.shape == (3, CHOICES)
    assert costs.shape == (CHOICES,)
    torch.testing.assert_close(errors[:, 0], profile.s.square() / 2)
    assert costs[0] == 0
    for (i, u), (j, v) in product(enumerate(WIDTHS), repeat=2):
        at = 1 + i * len(WIDTHS) + j
        assert costs[at] == u * 64 + v * 64 + SCALE_BITS  # rows are padded to whole words
        kept = (1 - profile.u_losses[:, i]) * (1 - profile.v_losses[:, j])
        torch.testing.assert_close(errors[:, at], (1 - kept) * profile.s.square() / 2)


@given(seed=st.integers(0, 999), budget=st.integers(0, 1600))
@settings(max_examples=60, deadline=None)
def test_the_error_is_within_the_gap_of_the_optimum(seed: int, budget: int) -> None:
    profiles = [make_profile(1, seed), make_profile(1, seed + 1, (64, 32))]
    allocation, best = allocate(profiles, budget), optimum(profiles, budget)
    assert spent(profiles, allocation) <= budget
    assert allocation.error * (1 - allocation.gap) <= best * (1 + 1e-9)
    assert best <= allocation.error * (1 + 1e-9)


@given(
    sizes=st.lists(
        st.tuples(st.integers(0, 30), st.integers(1, 100), st.integers(1, 100)), max_size=4
    ),
    bits=st.floats(0, 9),
    overhead=st.integers(0, 500),
)
@settings(max_examples=60, deadline=None)
def test_invariants(sizes: list[tuple[int, int, int]], bits: float, overhead: int) -> None:
    profiles = [
        make_profile(ranks, seed, (h_out, h_in), overhead)
        for seed, (ranks, h_out, h_in) in enumerate(sizes)
    ]
    budget = len(profiles) * overhead + bits * sum(h_out * h_in for _, h_out, h_in in sizes)
    allocation = allocate(profiles, budget)
    assert spent(profiles, allocation) <= budget
    assert allocation.error == pytest.approx(lost(profiles, allocation), rel=1e-9, abs=1e-300)
    assert 0 <= allocation.gap <= 1
    for profile, widths in zip(profiles, allocation.widths, strict=True):
        assert len(widths.kept) == len(widths.u) == len(widths.v)
        assert widths.kept.tolist() == sorted(set(widths.kept.tolist()))
        assert all(0 <= rank < len(profile.s) for rank in widths.kept.tolist())
        assert {*widths.u.tolist(), *widths.v.tolist()} <= set(WIDTHS)
    more = allocate(profiles, 2 * budget + 100)
    assert more.error * (1 - more.gap) <= allocation.error * (1 + 1e-9)


def test_the_gap_is_small_for_many_ranks() -> None:
    profiles = [make_profile(80, seed, (96, 160)) for seed in range(4)]
    for bits in (0.1, 0.5, 1.0, 3.0):
        allocation = allocate(profiles, bits * 4 * 96 * 160)
        assert allocation.gap < 0.01
        assert spent(profiles, allocation) > 0.95 * bits * 4 * 96 * 160


def test_a_large_budget_selects_the_widest_codes() -> None:
    profiles = [make_profile(5), make_profile(3, 1)]
    allocation = allocate(profiles, 1e6)
    assert all((widths.u == 8).all() and (widths.v == 8).all() for widths in allocation.widths)
    assert [len(widths.kept) for widths in allocation.widths] == [5, 3]
    assert allocation.gap < 1e-6


def test_overhead_counts_towards_the_budget() -> None:
    profiles = [make_profile(2, overhead=300), make_profile(2, 1, overhead=200)]
    with pytest.raises(InvalidInput, match="Allow more bits"):
        allocate(profiles, 499)
    for budget in (500, 611, 700, 1500):
        allocation = allocate(profiles, budget)
        assert spent(profiles, allocation) <= budget
    assert [len(widths.kept) for widths in allocate(profiles, 500).widths] == [0, 0]


def test_an_allocation_without_ranks() -> None:
    assert allocate([], 0) == GlobalAllocation([], 0.0, 0.0)
    none = torch.zeros(0, len(WIDTHS), dtype=torch.float64)
    empty = RankProfile((4, 4), none[:, 0], none, none)
    allocation = allocate([empty], 100)
    assert (allocation.error, allocation.gap) == (0.0, 0.0)
    assert isinstance(allocation.widths[0], RankWidths)
    assert len(allocation.widths[0].kept) == 0


@pytest.mark.parametrize("value", [0.0, 1e-30, 1e10])
def test_the_allocation_is_invariant_to_the_scale_of_errors(value: float) -> None:
    plain = make_profile(6)
    scaled = RankProfile(plain.shape, value * plain.s, plain.u_losses, plain.v_losses)
    allocation, same = allocate([scaled], 900), allocate([plain], 900)
    assert spent([scaled], allocation) <= 900
    assert allocation.error == pytest.approx(value**2 * same.error, rel=1e-6)


@pytest.mark.parametrize("seed", range(3))
def test_scip_finds_no_better_than_the_bound(seed: int) -> None:
    """The same problem as a 0/1 program, solved to optimality by SCIP."""
    profiles = [make_profile(3, seed), make_profile(3, seed + 10, (64, 64), overhead=64)]
    budget = 1500
    model = pyscipopt.Model()
    model.hideOutput()
    model.setParam("limits/gap", 0.0)
    cost, error = [], []
    for profile in profiles:
        for errors in profile.errors().tolist():
            chosen = [model.addVar(vtype="B") for _ in errors]
            model.addCons(pyscipopt.quicksum(chosen) == 1)
            cost += [x * c for x, c in zip(chosen, profile.costs().tolist(), strict=True)]
            error += [x * e for x, e in zip(chosen, errors, strict=True)]
    model.addCons(pyscipopt.quicksum(cost) <= budget - 64)
    model.setObjective(pyscipopt.quicksum(error), "minimize")
    model.optimize()
    assert model.getStatus() == "optimal"
    best = model.getObjVal()
    allocation = allocate(profiles, budget)
    assert allocation.error * (1 - allocation.gap) <= best * (1 + 1e-6)
    assert best <= allocation.error * (1 + 1e-6)
