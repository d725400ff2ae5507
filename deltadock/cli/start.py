"""`deltadock up`, `topology`, `node` and `demo`: what starts processes on this machine."""

from pathlib import Path
from typing import Annotated

import typer

from deltadock.cli.options import Home
from deltadock.cli.outcome import on_interrupt
from deltadock.extras import EMBEDDED, MODEL, check_installed

ApiPort = Annotated[int, typer.Option(min=1, max=65535, help="Port of the api and dashboard.")]
NodePort = Annotated[int, typer.Option(min=1, max=65535, help="Port of the inference node.")]


def up(
    home: Home = None,
    host: Annotated[
        str, typer.Option(help="Address of the api. Not loopback: first make a key.")
    ] = "127.0.0.1",
    api_port: ApiPort = 8000,
    node_port: NodePort = 8100,
) -> None:
    """Run api, worker, node and broker on this machine. Ctrl-C stops them."""
    check_installed(*EMBEDDED)
    typer.echo("Starting Deltadock ...")  # its modules take seconds to import
    from deltadock.cli.system import up as run

    run(home, api_port, node_port, host)


def topology(
    home: Annotated[
        Path | None,
        typer.Option(
            file_okay=False,
            help="Folder for data, caches and logs; by default a temporary one.",
        ),
    ] = None,
    api_port: ApiPort = 8000,
    node_port: NodePort = 8100,
) -> None:
    """Like `up`, on Postgres, Valkey and an S3 server, as in docker-compose.yml."""
    from deltadock.cli.system import topology as run

    run(home, api_port, node_port)


def node(
    base: Annotated[
        Path | None, typer.Option(exists=True, file_okay=False, help="Base checkpoint folder.")
    ] = None,
    api: Annotated[str | None, typer.Option(help="URL of the api to register with.")] = None,
    delta: Annotated[
        list[Path] | None,
        typer.Option(exists=True, dir_okay=False, help="Delta file to load; may be repeated."),
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port to listen on.")] = 8100,
) -> None:
    """Run one inference node, registered with an api or standalone, until SIGTERM."""
    check_installed(*MODEL)
    from deltadock.cli.node import node as run
    from deltadock.cli.processes import check_port

    check_port(port, "--port")
    run(base, api, delta or [], host, port)


def demo(
    host: Annotated[
        str, typer.Option(help="Address of the api. Not loopback: others may look on, with a key.")
    ] = "127.0.0.1",
    api_port: Annotated[
        int | None, typer.Option(min=1, max=65535, help="Port of the api; by default a free one.")
    ] = None,
    node_port: Annotated[
        int | None, typer.Option(min=1, max=65535, help="Port of the node; by default a free one.")
    ] = None,
) -> None:
    """Compress the sample fine-tune and compare it with its delta over HTTP."""
    check_installed(*EMBEDDED)
    from deltadock.cli.demo import demo as run

    with on_interrupt("The demo's processes have ended, and its data is removed."):
        run(host, api_port, node_port)
