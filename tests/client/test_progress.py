"""Progress where there is no terminal: lines, and never long without one."""

import io
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta

import pytest
from rich.console import Console

from deltadock.client import progress
from deltadock.client.progress import bytes_bar, job_bar, log_lines, work_bar
from deltadock.client.resources import Job

NOW = datetime.now(UTC)


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    monkeypatch.setattr(progress, "QUIET_SECONDS", 0.05)
    return io.StringIO()


def wait_for(found: Callable[[], bool]) -> None:
    end = time.monotonic() + 10
    while not found():
        assert time.monotonic() < end
        time.sleep(0.01)


def job(state: str, percent: float = 0.0, message: str = "", left: float | None = None) -> Job:
    return Job(
        id="job_1", delta="dlt_1", state=state, priority="normal", block=0, blocks=0,
        percent=percent, message=message, cancel_requested=False, attempt=1, created_at=NOW,
        updated_at=NOW, expected_at=None if left is None else NOW + timedelta(seconds=left),
    )  # fmt: skip


def test_a_job_has_a_line_for_each_stage_and_block_and_one_when_it_is_long_silent(
    log: io.StringIO, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "QUIET_SECONDS", 20.0)
    with job_bar(Console(file=log)) as show:
        show(job("queued"))
        for matrix in (1, 2):
            show(job("compressing", 40.0, f"block 1 of 2, matrix {matrix} of 2"))
        show(job("compressing", 55.0, "block 2 of 2, matrix 1 of 2", left=5.5 * 86_400))
        show(job("ready", 100.0))
    assert log.getvalue().splitlines() == [
        "  0 %  queued",
        " 40 %  compressing: block 1 of 2, matrix 1 of 2",
        " 55 %  compressing: block 2 of 2, matrix 1 of 2; about 5 days left",
        "100 %  ready",
    ]


def test_a_silent_job_says_again_where_it_is(log: io.StringIO) -> None:
    with job_bar(Console(file=log)) as show:
        show(job("assembling", 80.0, "distillation, step 1 of 100"))
        show(job("assembling", 81.0, "distillation, step 5 of 100"))
        wait_for(lambda: log.getvalue().count("step 5 of 100") >= 2)
    ended = log.getvalue()
    assert ended.count("step 1 of 100") == 1
    time.sleep(0.1)
    assert log.getvalue() == ended


def test_beside_a_log_only_what_it_lacks_is_told(
    log: io.StringIO, monkeypatch: pytest.MonkeyPatch
) -> None:
    with log_lines(Console(file=log)) as (show, printed):
        show(job("queued").model_copy(update={"queue_position": 2}))
        assert log.getvalue() == "  0 %  queued: number 2\n"
        wait_for(lambda: log.getvalue().count("number 2") >= 2)
        monkeypatch.setattr(progress, "QUIET_SECONDS", 20.0)
        show(job("compressing", 40.0, "block 1 of 2, matrix 1 of 2"))
        show(job("compressing", 55.0, "block 2 of 2, matrix 1 of 2"))
        printed()
        told = log.getvalue()
        time.sleep(0.1)
        assert log.getvalue() == told
    assert "block" not in told


def test_transfers_are_summed(log: io.StringIO) -> None:
    with bytes_bar(Console(file=log), "hashing", "uploading") as show:
        assert log.getvalue() == "hashing\n"
        show("a", 10**6, 3 * 10**6)
        show("b", 10**6, 10**6)
        wait_for(lambda: "2.00 MB of 4.00 MB" in log.getvalue())
    assert log.getvalue().splitlines()[1] == "uploading"


def test_work_in_this_process_is_told_of(log: io.StringIO, monkeypatch: pytest.MonkeyPatch) -> None:
    waits, wait = [], threading.Event.wait

    def counted(event: threading.Event, timeout: float | None = None) -> bool:
        waits.append(timeout)
        return wait(event, timeout)

    monkeypatch.setattr(threading.Event, "wait", counted)
    with work_bar(Console(file=log)) as show:
        time.sleep(0.2)
        assert len(waits) < 20, "it sleeps while there is nothing to tell of"
        show("", "merging", None)
        assert log.getvalue() == ""
        wait_for(lambda: "merging" in log.getvalue())
        show("comparing", "comparing outputs", 0.25)
    assert " 25 %  comparing outputs" in log.getvalue().splitlines()


def test_a_terminal_has_bars(log: io.StringIO) -> None:
    console = Console(file=log, force_terminal=True, width=120)
    with job_bar(console) as show:
        show(job("compressing", 55.0, "block 2 of 2, matrix 1 of 2"))
    with bytes_bar(console, "hashing", "uploading") as transferred:
        transferred("model.safetensors", 10**6, 10**6)
    with work_bar(console) as work:
        work("comparing", "comparing outputs", 0.25)
    for words in ("block 2 of 2", "model.safetensors", "comparing outputs"):
        assert words in log.getvalue()


def test_a_narrow_terminal_has_a_narrow_bar(log: io.StringIO) -> None:
    text = "block 12 of 28, matrix 3 of 7"
    for width in (100, 80):
        console = Console(file=log, force_terminal=True, width=width, _environ={})
        with job_bar(console) as show:
            shown = job("compressing", 55.0, text, left=3 * 3600 + 59 * 60)
            show(shown.model_copy(update={"started_at": NOW - timedelta(hours=3, minutes=58)}))
        *_, line, _ending = log.getvalue().splitlines()
        assert text in line
        assert "min left" in line
