"""What tables and help look like in a narrow terminal."""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import typer
from rich.console import Console

from deltadock.cli import output
from deltadock.cli.app import app
from deltadock.cli.output import print_table
from tests.cli.support import Command

JOB = "job_iwfe2n6rfpzitcqp27lnvyuwq4"


def table(
    capsys: pytest.CaptureFixture[str], headings: tuple[str, ...], row: tuple[str, ...]
) -> list[str]:
    """The lines of a table with one row."""
    print_table(headings, [row], "nothing")
    return capsys.readouterr().out.splitlines()


def commands(group: Any = None, path: str = "deltadock") -> Iterator[tuple[str, Any]]:
    """Every command with its path."""
    group = group or typer.main.get_command(app)
    for name, command in group.commands.items():
        yield f"{path} {name}", command
        if hasattr(command, "commands"):
            yield from commands(command, f"{path} {name}")


@pytest.mark.parametrize(("path", "command"), [*commands()], ids=[path for path, _ in commands()])
def test_help_has_no_broken_lines(
    deltadock: Command, monkeypatch: pytest.MonkeyPatch, path: str, command: Any
) -> None:
    """A second paragraph keeps its line breaks, and a cell breaks types that are too long."""
    assert all("\n" not in text for text in (command.help or "").split("\n\n")[1:])
    monkeypatch.setenv("COLUMNS", "80")
    for line in deltadock(*path.split()[1:], "-h").stdout.splitlines():
        assert line.count("[") == line.count("]"), line
        assert not re.search(r"<(?!int range|float range)[\w|\[]+ ", line), line


@pytest.fixture(autouse=True)
def _narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(output, "output", Console(force_terminal=True, width=80))


def test_names_and_ids_stay_whole_in_a_narrow_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    headings = ("job", "delta", "state", "done", "created")
    row = (JOB, "demo/exercises:1", "failed: storage_full", "31 %", "3 min ago")
    lines = table(capsys, headings, row)
    assert lines[1].split()[:3] == [JOB, "demo/exercises:1", "failed:"]
    assert lines[2].split()[0] == "storage_full"
    assert max(map(len, lines)) <= 80
    assert not any("…" in line for line in lines)


def test_a_number_keeps_its_unit_in_a_narrow_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    headings = ("name", "words", "size", "ratio")
    lines = table(capsys, headings, ("project/model:1", "many words " * 9, "418 kB", "13.2 ×"))
    assert lines[1].endswith("418 kB  13.2 ×")
    assert max(map(len, lines)) <= 80


JOBS = ("job", "delta", "state", "done", "elapsed", "left", "created")
RUNNING = (
    JOB, "demo/exercises:1", "compressing: block 2 of 5, matrix 3 of 7", "31 %", "1 min 26 s",
    "2 min 5 s", "3 min ago",
)  # fmt: skip


def test_a_narrow_terminal_does_without_spare_columns(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only without as many as it must; a pipe has them all."""

    def shown() -> list[str]:
        print_table(JOBS, [RUNNING], "nothing", spare=("elapsed", "created", "left", "done"))
        lines = capsys.readouterr().out.splitlines()
        assert lines[1].startswith(f"{JOB}  demo/exercises:1  compressing:")
        assert max(map(len, lines)) <= output._screen_width()
        return lines[0].split()

    assert shown() == ["job", "delta", "state", "done", "left"]
    monkeypatch.setattr(output, "output", Console(force_terminal=True, width=85))
    assert shown() == ["job", "delta", "state", "done", "left", "created"]
    monkeypatch.setattr(output, "output", Console(force_terminal=True, width=93))
    assert shown() == list(JOBS)
    monkeypatch.setattr(output, "output", Console(force_terminal=False, width=80))
    assert shown() == list(JOBS)


def test_a_line_of_long_names_is_longer_than_the_terminal(
    capsys: pytest.CaptureFixture[str],
) -> None:
    name = f"project/{'a-long-model' * 4}:12"
    lines = table(capsys, ("job", "delta", "state"), (JOB, name, "ready"))
    assert lines[1:] == [f"{JOB}  {name}  ready"]


def test_digests_are_folded_in_a_narrow_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    digests = "0123456789abcdef" * 4, "fedcba9876543210" * 4
    lines = table(capsys, ("a/b:1", "a/b:2"), digests)
    assert max(map(len, lines)) <= 80
    assert "".join(line.split()[0] for line in lines[1:]) == digests[0]


def test_a_terminal_of_another_encoding_gets_what_it_can_show() -> None:
    """Where the table has a dash, and `doctor` a tick, for example."""
    shown = subprocess.run(
        [sys.executable, "-m", "deltadock", "methods"], capture_output=True, check=True,
        env={**os.environ, "PYTHONIOENCODING": "ascii"},
    )  # fmt: skip
    assert re.search(rb"^bitdelta +\? ", shown.stdout, re.MULTILINE)
