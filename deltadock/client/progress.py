"""Progress bars of jobs and transfers: in a terminal, in a notebook, or as lines in a log."""

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Final

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TransferSpeedColumn,
)
from rich.text import Text

from deltadock.client.resources import Job, duration_text

LINE_STEP: Final = 5.0
"""Percent after which another line is printed where there is no terminal."""


class _Times(ProgressColumn):
    """The job's own times: they count from its start on the server."""

    max_refresh = 0.5

    def render(self, task: Task) -> Text:
        job: Job | None = task.fields.get("job")
        if job is None or job.elapsed is None:
            return Text("")
        left = "" if job.remaining is None else f", {duration_text(job.remaining)} left"
        return Text(f"{duration_text(job.elapsed)}{left}", style="progress.elapsed")


@contextmanager
def job_bar(console: Console) -> Iterator[Callable[[Job], None]]:
    """A callback that shows a job's stage, blocks, steps, elapsed and remaining time.

    In a terminal it is a bar that moves; else a line for every stage and every 5 %.
    """
    if not console.is_terminal:
        yield _line_printer(console)
        return
    columns = (
        TextColumn("{task.percentage:3.0f} %"),
        BarColumn(bar_width=30),
        _Times(),
        TextColumn("{task.description}", markup=False),
    )
    with Progress(*columns, console=console, refresh_per_second=4) as bar:
        task = bar.add_task("queued", total=100.0, job=None)
        yield lambda job: bar.update(task, description=job.stage, completed=job.percent, job=job)


def _line_printer(console: Console) -> Callable[[Job], None]:
    last, printed = "", -LINE_STEP

    def show(job: Job) -> None:
        nonlocal last, printed
        stage = job.stage.partition(", ")[0] if job.state == "compressing" else job.state
        if stage != last or job.percent >= printed + LINE_STEP:
            console.print(f"{job.percent:3.0f} %  {job.stage}", markup=False, soft_wrap=True)
            last, printed = stage, job.percent

    return show


@contextmanager
def bytes_bar(console: Console, before: str) -> Iterator[Callable[[str, int, int], None]]:
    """A callback of transfers: a bar a file in a terminal, else nothing.

    `before` says what happens before the first byte is transferred.
    """
    lock, tasks = threading.Lock(), dict[str, Any]()
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=30),
        DownloadColumn(),
        TransferSpeedColumn(),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        waiting = bar.add_task(before, total=None)

        def show(name: str, done: int, total: int) -> None:
            with lock:
                bar.update(waiting, visible=False)
                if name not in tasks:
                    tasks[name] = bar.add_task(name, total=total)
            bar.update(tasks[name], completed=done)

        yield show


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
