"""The `deltadock` command."""

import sys
import textwrap
from pathlib import Path
from typing import Annotated

import typer

from deltadock.cli import compressing, offline
from deltadock.errors import DeltadockError
from deltadock.version import __version__

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Store and serve fine-tuned LLMs as deltas of about one bit per weight.",
)
OFFLINE = "Offline: two folders, no service"
RUNNING = "Running Deltadock"

for command in (
    compressing.preview, compressing.compress, offline.evaluate, offline.merge, offline.inspect,
    offline.verify, offline.methods,
):  # fmt: skip
    app.command(rich_help_panel=OFFLINE)(command)

Home = Annotated[Path | None, typer.Option(help="Folder for data, caches and logs.")]
ApiPort = Annotated[int, typer.Option(help="Port of the api and dashboard.")]
NodePort = Annotated[int, typer.Option(help="Port of the inference node.")]


@app.command(rich_help_panel=RUNNING)
def up(home: Home = None, api_port: ApiPort = 8000, node_port: NodePort = 8100) -> None:
    """Run everything on this machine: api, worker, node, broker. Ctrl-C stops it."""
    from deltadock.cli.up import up as run

    run(home, api_port, node_port)


@app.command(rich_help_panel=RUNNING)
def topology(home: Home = None, api_port: ApiPort = 8000, node_port: NodePort = 8100) -> None:
    """The same on a real Postgres, Redis and S3 server, as in docker-compose.yml."""
    from deltadock.cli.topology import topology as run

    run(home, api_port, node_port)


@app.command(rich_help_panel=RUNNING)
def node(
    base: Annotated[
        Path | None, typer.Option(exists=True, file_okay=False, help="Folder of the base.")
    ] = None,
    api: Annotated[str | None, typer.Option(help="Address of an api to register with.")] = None,
    delta: Annotated[
        list[Path] | None, typer.Option(exists=True, dir_okay=False, help="A delta file to load.")
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on.")] = 8100,
) -> None:
    """Run one inference node, for an api or alone, until SIGTERM."""
    from deltadock.cli.node import node as run

    run(base, api, delta or [], host, port)


@app.command(rich_help_panel=RUNNING)
def demo() -> None:
    """Compress the sample fine-tune and compare it with its delta, over HTTP."""
    from deltadock.cli.demo import demo as run

    run()


@app.command(rich_help_panel=RUNNING)
def migrate() -> None:
    """Bring the database that DELTADOCK_DATABASE_URL names up to this version."""
    from deltadock.settings import get_settings
    from deltadock.storage.database import migrate as run
    from deltadock.storage.database import normalise_url

    url = get_settings().sqlalchemy_url
    revision = run(url)
    typer.echo(f"{normalise_url(url).render_as_string()} is at revision {revision}.")


@app.command(rich_help_panel=RUNNING)
def version() -> None:
    """Print the version."""
    typer.echo(__version__)


def main() -> None:
    """Entry point: domain errors become one line on stderr and exit status 1.

    The end of a failed process's log follows it, as it is.
    """
    try:
        app()
    except DeltadockError as error:
        message = " ".join(error.message.split())
        sys.stderr.write(f"error ({error.code}): {message}\n")
        if log_tail := error.details.get("log_tail"):
            sys.stderr.write(textwrap.indent(str(log_tail), "    "))
        raise SystemExit(1) from None
