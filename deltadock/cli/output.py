"""What the commands print: tables and messages for people, JSON for programs."""

import json
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import TYPE_CHECKING, Annotated, Any, Final, TypeVar

import typer
from rich.cells import cell_len
from rich.console import Console
from rich.table import Column, Table

if TYPE_CHECKING:
    from deltadock.client.resources import Resource

T = TypeVar("T")

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON only.")]

WIDE: Final = 1_000
"""Columns of a table that goes to a file or a pipe."""

GAP: Final = 2
"""Spaces between columns."""

LONGEST_WORD: Final = 60
"""Characters that a table keeps together in a narrow terminal: names and ids, but not digests."""

_WORD: Final = re.compile(r"[\d.,]+ \S+|\S+")
"""What a cell is not broken in: a number keeps its unit."""

# Progress and messages go to stderr: with --json, stdout holds only JSON. Markup is off: names of
# tensors, files and models come from others.
errors: Final = Console(stderr=True, markup=False, highlight=False)
output: Final = Console(markup=False, highlight=False)


def say(text: str) -> None:
    """Print a message for people on stderr."""
    errors.print(text, soft_wrap=True)


def print_json(data: object) -> None:
    """Print a JSON document on stdout."""
    sys.stdout.write(json.dumps(data, indent=2) + "\n")


def print_resources(found: "Resource | Iterable[Resource]") -> None:
    """Print what the server answered as JSON."""
    if isinstance(found, Iterable) and not hasattr(found, "model_dump"):
        print_json([one.model_dump(mode="json") for one in found])
    else:
        print_json(found.model_dump(mode="json"))


def print_changed(changed: "Resource", said: str, *, as_json: bool) -> None:
    """Print what a change made: as JSON, or a message for people."""
    if as_json:
        print_resources(changed)
    else:
        say(said)


@contextmanager
def up_to(limit: int, found: Iterator[T]) -> Iterator[list[T]]:
    """The first `limit` of a list; says, after they were printed, how to see more if there are."""
    shown = list(islice(found, limit))
    more = next(found, None) is not None
    yield shown
    if more:
        say(f"There are more: --limit {4 * limit} shows up to {4 * limit}.")


def print_rows(rows: Iterable[tuple[str, str]]) -> None:
    """Print labels and values."""
    table = Table(
        Column(no_wrap=True), Column(overflow="fold"), show_header=False, box=None, pad_edge=False
    )
    for row in rows:
        table.add_row(*row)
    _print_wide(table)


def print_table(
    headings: Sequence[str],
    rows: Iterable[Sequence[str]],
    empty: str,
    spare: Iterable[str] = (),
    piped: int = WIDE,
) -> None:
    """Print a table, or else on stderr what to do about it being empty.

    A terminal that is too narrow for all columns shows none of `spare`, which the first leaves
    first. Where no one looks at a screen, lines wrap after `piped` characters.
    """
    cells, screen = list(rows), _screen_width(piped)
    if not cells:
        say(empty)
        return
    columns = list(zip(headings, *cells, strict=True))
    for heading in spare:
        if _width(map(_least, columns)) <= screen:
            break
        columns = [column for column in columns if column[0] != heading]
    table = Table(
        *(
            Column(column[0], width=width, overflow="fold")
            for column, width in zip(columns, _widths(columns, screen), strict=True)
        ),
        box=None,
        pad_edge=False,
    )
    for row in zip(*(column[1:] for column in columns), strict=True):
        table.add_row(*row)
    _print_wide(table)


def _widths(columns: Sequence[Sequence[str]], screen: int) -> list[int]:
    """Widths of a table's columns: the widest wrap first, between words only.

    So names and ids stay whole, if need be in lines that are longer than the terminal is wide.
    """
    widths = [max(map(cell_len, column)) for column in columns]
    least = list(map(_least, columns))
    for _ in range(_width(widths) - screen):
        spare = [number for number, width in enumerate(widths) if width > least[number]]
        if spare:
            widths[max(spare, key=widths.__getitem__)] -= 1
    return widths


def _least(column: Sequence[str]) -> int:
    """The width of a column that wraps between all words; those that are no names may be cut."""
    sizes = [cell_len(word) for text in column for word in _WORD.findall(text)]
    return max((size for size in sizes if size <= LONGEST_WORD), default=1)


def _width(columns: Iterable[int]) -> int:
    """The width of a table whose columns are so wide."""
    widths = list(columns)
    return sum(widths) + GAP * (len(widths) - 1)


def _screen_width(piped: int = WIDE) -> int:
    """Columns of the terminal, or `piped` where no one looks at a screen."""
    return output.width if output.is_terminal else piped


def _print_wide(table: Table) -> None:
    """Print a table without cutting its cells."""
    width = sum(column.width or 0 for column in table.columns) + GAP * len(table.columns)
    lines = Console(markup=False, highlight=False, width=max(_screen_width(), width))
    with lines.capture() as capture:
        lines.print(table)
    sys.stdout.write("".join(f"{line.rstrip()}\n" for line in capture.get().splitlines()))


@contextmanager
def working(text: str) -> Iterator[Callable[[str], None]]:
    """Say, in a terminal or if it takes long, what is at work; the callback says something else."""
    from deltadock.client.progress import work_bar

    with work_bar(errors) as show:
        show("", text, None)
        yield lambda other: show("", other, None)


def as_dict(found: Any) -> dict[str, Any]:
    """What the server answered, as JSON objects are."""
    dumped: dict[str, Any] = found.model_dump(mode="json")
    return dumped
