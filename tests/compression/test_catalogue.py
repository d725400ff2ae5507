"""The catalogue says what each method accepts."""

import math
import subprocess
import sys

import pytest

from compression.catalogue import METHODS, check_method
from deltadock.errors import BitsOutOfRange, UnknownMethod


def test_methods_go_by_their_names() -> None:
    assert {name: method.name for name, method in METHODS.items()} == {n: n for n in METHODS}
    assert {"adamix", "exact"} <= METHODS.keys()


@pytest.mark.parametrize(("name", "bits"), [("adamix", 0.1), ("adamix", 8.0), ("exact", None)])
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
