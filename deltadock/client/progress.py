"""Progress bars of jobs and transfers: in a terminal, in a notebook, or as lines in a log."""

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, Final, Self

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    ProgressColumn,
    Task,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
)
from rich.table import Column
from rich.text import Text

from deltadock import words
from deltadock.client.resources import Job

QUIET_SECONDS: Final = 20.0
"""After so long without a line, one says where the work is."""


class Lines:
    """Progress where there is no terminal: a line for each stage, and every `QUIET_SECONDS`.

    A context manager. Lines end with the time since it was entered.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self._stage = self._line = ""
        self._lock, self._ended = threading.Lock(), threading.Event()
        self._thread = threading.Thread(target=self._repeat, name="progress", daemon=True)

    def __enter__(self) -> Self:
        self._began = time.monotonic()
        self._due = self._began + QUIET_SECONDS
        self._thread.start()
        return self

    def __exit__(self, *_error: object) -> None:
        self._ended.set()
        self._thread.join()

    def show(self, stage: str, line: str) -> None:
        """Note where the work is, and print it if the stage is new.

        A stage of "" is worth a line only if it takes long.
        """
        with self._lock:
            self._line = line
            if stage != self._stage:
                self._stage = stage
                if stage:
                    self._print()

    def put_off(self) -> None:
        """Count a line that someone else has printed as one of these."""
        with self._lock:
            self._due = time.monotonic() + QUIET_SECONDS

    def _print(self) -> None:
        now = time.monotonic()
        self._due = now + QUIET_SECONDS
        elapsed = f"  ({words.duration(now - self._began)})" if now - self._began >= 1 else ""
        if self._line:
            self._console.print(
                f"{self._line}{elapsed}", markup=False, highlight=False, soft_wrap=True
            )

    def _repeat(self) -> None:
        while not self._ended.wait(max(0.0, self._due - time.monotonic())):
            with self._lock:
                if time.monotonic() >= self._due:
                    self._print()


class _Times(ProgressColumn):
    """The job's own times: they count from its start on the server."""

    max_refresh = 0.5

    def render(self, task: Task) -> Text:
        job: Job | None = task.fields.get("job")
        if job is None or job.elapsed is None:
            return Text("")
        left = "" if job.remaining is None else f", {words.duration(job.remaining)} left"
        return Text(f"{words.duration(job.elapsed)}{left}", style="progress.elapsed")


@contextmanager
def job_bar(console: Console) -> Iterator[Callable[[Job], None]]:
    """A callback that shows a job's stage, blocks, steps, elapsed and remaining time.

    In a terminal it is a bar that moves; else a line for every stage and block, and every 20 s.
    """
    if not console.is_terminal:
        with Lines(console) as lines:
            yield partial(_show_line, lines)
        return
    columns = (
        TextColumn("{task.percentage:3.0f} %"),
        BarColumn(bar_width=30),
        _Times(Column(no_wrap=True)),  # the bar gets narrower instead
        TextColumn("{task.description}", markup=False),
    )
    with Progress(*columns, console=console, refresh_per_second=4) as bar:
        task = bar.add_task("", total=100.0, job=None, visible=False)
        yield lambda job: bar.update(
            task, description=job.stage, completed=job.percent, job=job, visible=True,
            refresh=True,  # else a line that is printed at once has the bar before under it
        )  # fmt: skip


@contextmanager
def log_lines(console: Console) -> Iterator[tuple[Callable[[Job], None], Callable[[], None]]]:
    """Callbacks beside a job's log where there is no terminal: for the job, and for each log line.

    The log has a line for every stage and block, so these are only of a job that waits, and where
    the job is when the log has been silent for long.
    """

    def show(job: Job) -> None:
        lines.show(job.stage if job.state == "queued" else "", _line(job))

    with Lines(console) as lines:
        yield show, lines.put_off


def _show_line(lines: Lines, job: Job) -> None:
    lines.show(job.stage.partition(", ")[0], _line(job))


def _line(job: Job) -> str:
    return f"{words.progress(job.percent):>5}  {job.stage}{left_text(job.remaining)}"


def left_text(seconds: float | None) -> str:
    """How long the work goes on, to follow what it does now; empty if that cannot be told."""
    return "" if seconds is None else f"; about {words.duration(seconds)} left"


class _Transferred(ProgressColumn):
    """Bytes of a file; nothing beside what has no size."""

    def render(self, task: Task) -> Text:
        known = task.total is not None
        text = f"{words.size(task.completed)} of {words.size(task.total)}" if known else ""
        return Text(text, style="progress.download")


class _Speed(ProgressColumn):
    """Bytes a second, once they are known."""

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        text = "" if speed is None else f"{words.size(speed)}/s"
        return Text(text, style="progress.data.speed")


@contextmanager
def bytes_bar(
    console: Console, before: str, during: str
) -> Iterator[Callable[[str, int, int], None]]:
    """A callback of transfers: a bar a file in a terminal, else lines with their sum.

    `before` says what happens before the first byte is transferred, `during` what from then on.
    """
    lock = threading.Lock()
    if not console.is_terminal:
        files = dict[str, tuple[int, int]]()
        with Lines(console) as lines:
            lines.show(before, before)

            def count(name: str, done: int, total: int) -> None:
                with lock:
                    files[name] = done, total
                    ready, known = (
                        words.size(sum(part)) for part in zip(*files.values(), strict=True)
                    )
                lines.show(during, during)
                lines.show(during, f"{during}: {ready} of {known}")

            yield count
        return
    tasks = dict[str, Any]()
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=30),
        _Transferred(table_column=Column(no_wrap=True)),
        _Speed(table_column=Column(no_wrap=True)),
    )
    with Progress(*columns, console=console) as bar:
        waiting = bar.add_task(before, total=None)

        def show(name: str, done: int, total: int) -> None:
            with lock:
                bar.update(waiting, visible=False)
                if name not in tasks:
                    tasks[name] = bar.add_task(name, total=total)
            bar.update(tasks[name], completed=done)

        yield show


@contextmanager
def work_bar(console: Console) -> Iterator[Callable[[str, str, float | None], None]]:
    """A callback of work in this process: its stage, what it does now, and the fraction done.

    A bar in a terminal, else lines. A stage of "" is worth a line only if it takes long.
    """
    if not console.is_terminal:
        with Lines(console) as lines:
            yield lambda stage, text, fraction: lines.show(
                stage, text if fraction is None else f"{words.progress(100 * fraction):>5}  {text}"
            )
        return
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TaskProgressColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("", total=None)
        yield lambda _stage, text, fraction: bar.update(
            task,
            description=text,
            total=None if fraction is None else 1.0,
            completed=fraction or 0.0,
        )


@contextmanager
def default_bar(given: Callable[[Job], None] | None) -> Iterator[Callable[[Job], None]]:
    """The callback that was given, else a bar where someone sees it."""
    console = Console(stderr=True)
    if given is not None:
        yield given
    elif in_notebook():
        yield _notebook_bar()
    elif console.is_terminal:
        with job_bar(console) as show:
            yield show
    else:
        yield lambda _: None


def in_notebook() -> bool:
    """Whether this process is the kernel of a notebook."""
    ipython = sys.modules.get("IPython")
    shell = None if ipython is None else ipython.get_ipython()
    return shell is not None and hasattr(shell, "kernel")


def _notebook_bar() -> Callable[[Job], None]:
    from IPython.display import display

    shown: Any = None

    def show(job: Job) -> None:
        nonlocal shown
        if shown is None:
            shown = display(job, display_id=True)
        else:
            shown.update(job)

    return show
