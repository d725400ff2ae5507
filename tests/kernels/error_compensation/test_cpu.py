"""The blocked CPU path against the float64 reference."""

import pytest
import torch

from deltadock.kernels.error_compensation import (
    BLOCK,
    prune_with_error_compensation,
    reference,
    round_with_error_compensation,
)
from tests.kernels.error_compensation.cases import check, make


@pytest.mark.parametrize(("n", "r"), [(1, 1), (7, 3), (BLOCK["cpu"], 16), (133, 40)])
def test_equals_the_reference(n: int, r: int) -> None:
    inputs = make(n, r, seed=n)
    values = inputs[0].clone()
    (codes,) = round_with_error_compensation(values[None], inputs[1][None], *inputs[2:])
    assert codes.dtype == torch.uint8
    assert (codes <= inputs[3]).all()
    check(codes, values, inputs)


def test_vectors_do_not_interact() -> None:
    values, factor, zero, top = make(70, 24)
    (together,) = round_with_error_compensation(values.clone()[None], factor[None], zero, top)
    for column in (0, 5, 23):
        one = slice(column, column + 1)
        (alone,) = round_with_error_compensation(
            values[None, :, one].clone(), factor[None], zero[one], top[one]
        )
        assert (alone == together[:, one]).double().mean() > 0.98  # sums in another order


@pytest.mark.parametrize("error", ["shape", "type", "layout"])
def test_invalid_arguments_are_rejected(error: str) -> None:
    values, factor, zero, top = make(8, 8)
    match error:
        case "shape":
            zero = zero[:-1]
        case "type":
            factor = factor.double()
        case "layout":
            values = values.t()
    with pytest.raises(ValueError, match=r"values|float32"):
        round_with_error_compensation(values[None], factor[None], zero, top)


def test_problems_do_not_interact() -> None:
    """Each with a grid of its own for every coordinate, as for U."""
    problems = [make(70, 24, seed=seed) for seed in range(3)]
    values, factor = (torch.stack([one[k] for one in problems]) for k in (0, 1))
    top = 2.0 ** (torch.arange(210).view(3, 70, 1) % 8 + 1) - 1
    zero = (top / 3).round()
    together = round_with_error_compensation(values.clone(), factor, zero, top)
    for k, alone in enumerate(values):
        codes = round_with_error_compensation(alone[None].clone(), factor[[k]], zero[k], top[k])
        assert torch.equal(codes[0], together[k])
        expected, _ = reference.round_with_error_compensation(alone, factor[k], zero[k], top[k])
        assert (expected == together[k]).double().mean() > 0.98


@pytest.mark.parametrize(("n", "r"), [(1, 1), (3, 2), (7, 3), (BLOCK["cpu"], 16), (133, 40)])
def test_two_of_four_are_kept_as_in_the_reference(n: int, r: int) -> None:
    problems = [make(n, r, seed=seed) for seed in range(2)]
    values, factor = (torch.stack([one[k] for one in problems]) for k in (0, 1))
    top = problems[0][3].expand(2, -1).contiguous()
    codes, kept = prune_with_error_compensation(values.clone(), factor, top)
    for k in range(2):
        found = reference.prune_with_error_compensation(values[k], factor[k], top[k])
        for one, other in zip((codes, kept), found[:2], strict=True):
            assert (one[k] == other).double().mean() > 0.98
    most = torch.full((-(-n // 4),), 2)
    most[-1] = min(2, (n - 1) % 4 + 1)
    for group, count in zip(kept.split(4, dim=1), most, strict=True):
        assert (group.sum(1) == count).all()
    assert not codes[~kept].any()
