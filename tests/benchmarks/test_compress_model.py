"""The model of a compression's time: what it explains, and that its counts are the code's."""

import math

import pytest

from benchmarks.compress_model import (
    BLOCK,
    MEASURED,
    PRICES,
    SHAPES,
    Model,
    adamix_launches,
    explained,
    optimix_launches,
    stages,
)
from tests.compression.test_operator_counts import operators

BARS = {
    ("qwen2.5-7b", "adamix"): 180, ("qwen2.5-7b", "optimix"): 480,
    ("smollm2-135m", "adamix"): 20, ("smollm2-135m", "optimix"): 90,
}  # fmt: skip
"""Seconds on one H200."""


def test_it_explains_what_was_measured() -> None:
    for name, seconds in explained().items():
        assert seconds == pytest.approx(MEASURED[name], rel=0.15), name


@pytest.mark.parametrize(("name", "method"), BARS)
def test_predictions_are_below_the_bars(name: str, method: str) -> None:
    found = stages(Model(SHAPES[name]), method)
    assert math.fsum(stage.seconds for stage in found) < BARS[name, method]


def test_operators_are_those_that_the_code_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    called = operators("adamix", (64, 320), 3, monkeypatch).total
    # One block of ranks: the tasks' singular values fall steeply.
    assert adamix_launches(320, 3, BLOCK) == pytest.approx(called, rel=0.1)
    called = operators("optimix", (64, 128), 2, monkeypatch).total
    assert optimix_launches(64, 128, 2) + PRICES == pytest.approx(called, rel=0.1)
