"""`deltadock jobs`, `logs`, `cancel` and `retry`."""

from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated

import typer

from deltadock import words
from deltadock.cli.outcome import JOB_FAILED, on_interrupt, report
from deltadock.cli.output import (
    AsJson,
    errors,
    output,
    print_changed,
    print_resources,
    print_table,
    say,
    up_to,
)
from deltadock.cli.server import STATES, JobReference, State, Url, complete_model, connect
from deltadock.errors import Cancelled, NotFound, Unavailable
from deltadock.names import parse_reference

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from deltadock.client.blocking import Client
    from deltadock.client.resources import Job


def follow(client: "Client", job: str) -> None:
    """Follow a job to its end with a bar.

    Raises:
        typer.Exit: it failed or was cancelled, or Ctrl-C was pressed or the server stopped; it goes
            on then.
    """
    from deltadock.client.progress import job_bar

    hint = f"The job goes on. Follow it: deltadock logs -f {job}; end it: deltadock cancel {job}"
    try:
        with on_interrupt(hint), job_bar(errors) as show:
            ended = client.wait(job, show)
    except Unavailable as error:
        status = report(error)
        say(f"The job goes on once the server runs again. Follow it: deltadock logs -f {job}")
        raise typer.Exit(status) from None
    _exit_if_failed(client, ended)


def _exit_if_failed(client: "Client", job: "Job") -> None:
    if (failure := job.failure) is None:
        return
    try:
        client.delta(job.delta)
    except NotFound as error:  # a deleted delta's job is cancelled, and cannot be retried
        if job.state == "cancelled":
            failure = Cancelled(f"Job {job.id} was cancelled. {error.message}")
        report(failure)
    else:
        report(failure)
        if job.can_retry:
            say(f"Continue it: deltadock retry {job.id}")
    raise typer.Exit(JOB_FAILED)


def job_of(client: "Client", reference: str) -> str:
    """The id of a job, named by itself or by its delta; of a bare name, its newest version's."""
    if reference.startswith("job_"):
        return reference
    named = parse_reference(reference)
    if named is not None and named.name == reference:
        for newest in client.deltas(name=reference, limit=1):
            return newest.job
    return client.delta(reference).job


def jobs(
    state: Annotated[
        list[State] | None,
        typer.Option(metavar="STATE", help=f"Only in this state: {STATES}. May be repeated."),
    ] = None,
    delta: Annotated[
        str | None, typer.Option(help="Only of this delta.", autocompletion=complete_model)
    ] = None,
    limit: Annotated[int, typer.Option("--limit", "-n", min=1, help="At most so many.")] = 20,
    as_json: AsJson = False,
    url: Url = None,
) -> None:
    """List the jobs, newest first."""
    with connect(url) as client:
        listed = client.jobs(state=state, delta=delta, limit=min(limit + 1, 200))
        with up_to(limit, listed) as found:
            if as_json:
                print_resources(found)
            else:
                names = {one.delta: _name(client, one.delta) for one in found}
                _print_jobs(found, names, filtered=bool(state or delta))


def _print_jobs(found: "list[Job]", names: dict[str, str], *, filtered: bool) -> None:
    print_table(
        ("job", "delta", "state", "done", "elapsed", "left", "created"),
        (
            (
                job.id,
                names[job.delta],
                _state(job),
                words.progress(job.percent),
                words.duration(job.elapsed),
                words.duration(job.remaining),
                words.ago(job.created_at),
            )
            for job in found
        ),
        "No job matches. `deltadock jobs` lists all."
        if filtered
        else "There is no job yet. `deltadock push DIR --base BASE` starts one.",
        spare=("elapsed", "created", "left", "done"),
    )


def _state(job: "Job") -> str:
    if job.error is None:
        return job.stage
    return job.state if job.error.code == job.state else f"{job.state}: {job.error.code}"


def _name(client: "Client", delta: str) -> str:
    try:
        return client.delta(delta).reference
    except NotFound as error:  # whose bytes may have been given up, and its name with them
        return f"{error.details.get('deleted') or delta} (deleted)"


def logs(
    job: JobReference,
    follow: Annotated[
        bool, typer.Option("--follow", "-f", help="Go on until the job has ended.")
    ] = False,
    as_json: AsJson = False,
    url: Url = None,
) -> None:
    """Print a job's log: attempts, stages, blocks, the reason of a failure."""
    with connect(url) as client:
        found = job_of(client, job)
        with (
            on_interrupt("The job goes on." if follow else ""),
            _progress_beside_log(follow=follow, as_json=as_json) as (show, printed),
        ):
            lines = client.log(found, follow=follow, progress=show)
            if as_json:
                print_resources(lines)
            else:
                for line in lines:
                    output.print(f"{words.moment(line.at)}  {line.message}", soft_wrap=True)
                    printed()
        if follow:
            _exit_if_failed(client, client.job(found))


@contextmanager
def _progress_beside_log(
    *, follow: bool, as_json: bool
) -> "Iterator[tuple[Callable[[Job], None], Callable[[], None]]]":
    """What shows a followed job beside its log, and what is to be called after each line."""
    from deltadock.client.progress import job_bar, log_lines

    if not follow:
        yield lambda _: None, lambda: None
    elif as_json:  # whose lines are printed at the end
        with job_bar(errors) as show:
            yield show, lambda: None
    elif output.is_terminal:
        with job_bar(output) as show:  # the console of the lines, which it prints above the bar
            yield show, lambda: None
    else:
        with log_lines(errors) as callbacks:
            yield callbacks


def cancel(job: JobReference, as_json: AsJson = False, url: Url = None) -> None:
    """Cancel a job; what it has finished is kept for `retry`."""
    with connect(url) as client:
        cancelled = client.cancel(job_of(client, job))
    if as_json:
        print_resources(cancelled)
    elif cancelled.is_final:
        say(f"{cancelled.id} is {cancelled.state}.")
    else:
        say(f"{cancelled.id} ends at its next step.")


def retry(
    job: JobReference,
    wait: Annotated[bool, typer.Option("--wait", help="Follow the job to its end.")] = False,
    as_json: AsJson = False,
    url: Url = None,
) -> None:
    """Queue a failed or cancelled job again; it continues after its last finished block."""
    with connect(url) as client:
        queued = client.retry(job_of(client, job))
        if wait:
            follow(client, queued.id)
            queued = client.job(queued.id)
    print_changed(queued, f"{queued.id} is {queued.state}.", as_json=as_json)
