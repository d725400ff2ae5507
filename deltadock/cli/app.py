"""The commands of `deltadock`, by panel, and the options before them."""

import os
from typing import Annotated

import typer

from deltadock.cli import (
    chat,
    doctor,
    fleet,
    jobs,
    keys,
    login,
    model,
    offline,
    push,
    records,
    registry,
    start,
    storage,
    tenants,
    webhooks,
)
from deltadock.cli.outcome import ReportingGroup
from deltadock.cli.output import AsJson, print_json
from deltadock.cli.server import Url
from deltadock.version import DOCS, __version__

PUSH = "Push and ship"
TALK = "Try"
WATCH = "Watch"
NODES = "Nodes"
OFFLINE = "Offline: checkpoint folders, no service"
RUNNING = "Run a Deltadock"

app = typer.Typer(
    cls=ReportingGroup,
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
    help="Store and serve fine-tuned LLMs as deltas of about one bit per weight.",
    epilog="Exit status: 0 done, 1 refused or failed, 2 wrong usage, 3 the server does not answer "
    f"or is busy, 4 the followed job failed, 130 interrupted.\n\nDocs: {DOCS}/tutorial.md",
)

for panel, commands in {
    PUSH: (push.push, registry.ls, registry.show, registry.pull, registry.rm, registry.undo,
           registry.alias, model.model, registry.compare),
    TALK: (chat.run, chat.generate),
    WATCH: (jobs.jobs, jobs.logs, jobs.cancel, jobs.retry, doctor.doctor),
    NODES: (fleet.ps, fleet.drain, fleet.resume, fleet.evict),
    OFFLINE: (offline.preview, offline.compress, offline.evaluate, offline.merge, offline.export,
              offline.inspect, offline.verify, offline.methods),
    RUNNING: (login.login, login.logout, start.up, start.topology, start.node, start.demo,
              records.migrate, storage.gc, storage.reconcile, records.backup, records.restore),
}.items():  # fmt: skip
    for command in commands:
        app.command(rich_help_panel=panel)(command)
app.command("chat", rich_help_panel=TALK, help="The same as `run`.")(chat.run)
app.add_typer(push.bases, name="bases", rich_help_panel=PUSH)
app.add_typer(webhooks.webhooks, name="webhooks", rich_help_panel=WATCH)
app.add_typer(keys.keys, name="keys", rich_help_panel=RUNNING)
app.add_typer(tenants.tenants, name="tenants", rich_help_panel=RUNNING)
app.add_typer(records.audit, name="audit", rich_help_panel=RUNNING)


def _print_version(requested: bool) -> None:
    if requested:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version."
        ),
    ] = False,
    url: Url = None,
) -> None:
    """Parse the options that precede a command."""
    if url is not None:
        from deltadock.client.connection import URL_VARIABLE, check_connection, find_connection

        check_connection(find_connection(url))
        os.environ[URL_VARIABLE] = url


@app.command("version", rich_help_panel=RUNNING)
def print_version(as_json: AsJson = False) -> None:
    """Print the version."""
    if as_json:
        print_json({"version": __version__})
    else:
        typer.echo(__version__)
