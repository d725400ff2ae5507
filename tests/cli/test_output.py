"""What tables look like in a narrow terminal."""

import pytest
from rich.console import Console

from deltadock.cli import output
from deltadock.cli.output import print_table

JOB = "job_iwfe2n6rfpzitcqp27lnvyuwq4"


def table(
    capsys: pytest.CaptureFixture[str], headings: tuple[str, ...], row: tuple[str, ...]
) -> list[str]:
    """The lines of a table with one row."""
    print_table(headings, [row], "nothing")
    return capsys.readouterr().out.splitlines()


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
