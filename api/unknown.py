"""Names that nothing has: the error says which known name was probably meant."""

from collections.abc import Iterable
from difflib import get_close_matches
from typing import Final

from deltadock.errors import NotFound

MOST_NAMES: Final = 50
"""Known names before and after an unknown one that it is compared with: 100 take about 10 ms."""


def unknown(what: str, given: str, lists: str, known: Iterable[str], name: str = "") -> NotFound:
    """The error of a name that nothing has.

    Args:
        what: a noun.
        given: as the caller wrote it.
        lists: the route that lists what there is.
        known: names of what there is.
        name: the part of `given` to compare with them; by default all of it.
    """
    similar = get_close_matches(name or given, known, n=1)
    if similar:
        return NotFound(
            f"There is no {what} {given!r}. Did you mean {similar[0]!r}? GET {lists} lists them."
        )
    return NotFound(f"There is no {what} {given!r}; GET {lists} lists them.")
