"""The tree of errors at the head of `deltadock/errors.py`."""

from collections.abc import Iterator

from deltadock import errors
from deltadock.errors import DeltadockError


def drawn(kind: type[DeltadockError], head: str = "", tail: str = "") -> Iterator[str]:
    """The lines of a class and those below it."""
    yield f"{head + kind.__name__:<36}{kind.status} {kind.code}"
    below = [child for child in kind.__subclasses__() if child.__module__ == errors.__name__]
    for child in below:
        last = child is below[-1]
        yield from drawn(
            child, tail + ("└── " if last else "├── "), tail + ("    " if last else "│   ")
        )


def test_the_tree_shows_every_error_with_its_status_and_code() -> None:
    assert errors.__doc__ is not None
    shown = [line.removeprefix("    ") for line in errors.__doc__.splitlines() if "  " in line]
    assert shown == list(drawn(DeltadockError))
