"""The names that Python users import from `deltadock`."""

import subprocess
import sys

import pytest

import deltadock

NAMES = [
    "AsyncClient",
    "Client",
    "DeltadockError",
    "LoadedDelta",
    "__version__",
    "from_pretrained",
    "load_delta",
]


def test_the_public_names_are_pinned() -> None:
    assert sorted(deltadock.__all__) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_every_name_can_be_imported(name: str) -> None:
    assert getattr(deltadock, name) is not None


def test_other_names_raise_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="load_deltas"):
        _ = deltadock.load_deltas


@pytest.mark.parametrize(
    ("name", "absent"), [("__version__", {"torch", "httpx"}), ("Client", {"torch"})]
)
def test_names_import_no_more_than_they_need(name: str, absent: set[str]) -> None:
    code = f"import deltadock, sys; deltadock.{name}; assert {absent!r}.isdisjoint(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
