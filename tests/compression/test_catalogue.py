"""The catalogue says what each method accepts."""

import math
import subprocess
import sys

import pytest

from deltadock.compression.catalogue import METHODS, check_method, default_method
from deltadock.errors import BitsOutOfRange, UnknownMethod


def test_methods_go_by_their_names() -> None:
    assert {name: method.name for name, method in METHODS.items()} == {n: n for n in METHODS}
    assert {"adamix", "exact"} <= METHODS.keys()


def test_there_is_one_default() -> None:
    assert [info for info in METHODS.values() if info.default] == [default_method()]


def test_bounds_and_budgets_agree() -> None:
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
def test_what_is_accepted(name: str, bits: float | None) -> None:
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
def test_budgets_that_are_not(name: str, bits: float | None) -> None:
    with pytest.raises(BitsOutOfRange, match=name):
        check_method(name, bits)


def test_unknown_methods_are_told_the_known_ones() -> None:
    with pytest.raises(UnknownMethod, match="adamix"):
        check_method("AdaMix", 1.0)


def test_the_catalogue_needs_no_torch() -> None:
    code = "import compression.catalogue, sys; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
