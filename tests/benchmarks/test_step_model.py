"""The model of a node's decode step."""

import os

import pytest

from benchmarks.kernel_model import QUICK, SLOW, codes
from benchmarks.step_model import (
    LAYERS,
    layer,
    roofline_milliseconds,
    saved_by_a_second_stream,
    step_milliseconds,
)
from deltadock.kernels.svd_delta.triton.forms import DEFAULT

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter compiles nothing"
)


@pytest.mark.parametrize(("deltas", "fraction"), [(0, 0.7), (12, 0.6)])
def test_the_model_expects_a_step_near_what_its_bytes_take(deltas: int, fraction: float) -> None:
    now = layer(12, deltas, codes(DEFAULT, 90), QUICK)
    assert roofline_milliseconds(deltas) / step_milliseconds(now.total) > fraction


def test_overlapping_launches_between_the_products_pay() -> None:
    compiled = codes(DEFAULT, 90)
    before, now = (layer(12, 12, compiled, QUICK, overlap=overlap) for overlap in (False, True))
    assert now.between < before.between / 2
    assert step_milliseconds(now.total) < 0.96 * step_milliseconds(before.total)


@pytest.mark.parametrize(("deltas", "fraction"), [(0, 0.78), (12, 0.7)])
def test_products_that_overlap_would_pay(deltas: int, fraction: float) -> None:
    """If they read as fast as cuBLAS's: see ADR 48."""
    compiled = codes(DEFAULT, 90)
    for bound in (QUICK, SLOW):
        now, ours = (
            layer(12, deltas, compiled, bound, after_products=after_products)
            for after_products in (False, True)
        )
        assert step_milliseconds(ours.total) < 0.96 * step_milliseconds(now.total)
    quick = layer(12, deltas, compiled, QUICK, after_products=True)
    assert roofline_milliseconds(deltas) / step_milliseconds(quick.total) > fraction


@pytest.mark.parametrize("deltas", [8, 12])
def test_a_second_stream_does_not_pay(deltas: int) -> None:
    """Unless an SM has room for all, and the kernels are slow: see ADR 41."""
    compiled = codes(DEFAULT, 90)
    for bound in (QUICK, SLOW):
        step = step_milliseconds(layer(deltas, deltas, compiled, bound).total)
        none, one = (
            LAYERS * saved_by_a_second_stream(deltas, deltas, compiled, bound, room) / 1e3 / step
            for room in (0, 1)
        )
        assert none < 0
        assert one < 0.08
