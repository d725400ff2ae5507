"""`deltadock up`: the embedded system, everything on this machine with its data in one folder."""

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console

from deltadock.cli.processes import HOST, stop_on_signals
from deltadock.cli.services import valkey
from deltadock.cli.system import check_ports, keep_running, node_secret, running
from deltadock.errors import Conflict
from deltadock.settings import get_settings


def embedded_settings(home: Path, api_port: int) -> dict[str, str]:
    """Fields of `Settings` for SQLite, a blob folder and a node, all of them here."""
    return {
        "home": str(home),
        "database_url": "",
        "blob_store": "local",
        "api_url": f"http://{HOST}:{api_port}",
        "node_secret": node_secret(home),
    }


def up(home: Path | None = None, api_port: int = 8000, node_port: int = 8100) -> None:
    """Run Deltadock until Ctrl-C or SIGTERM; the data stays in `home` for the next time.

    Raises:
        Conflict: another Deltadock uses `home`.
        Unavailable: a port is taken, or a process does not start or keeps ending.
    """
    home = (home or get_settings().home).resolve()
    console = Console()
    with stop_on_signals() as stopping, _only_one(home):
        check_ports(api_port, node_port)
        console.print(f"Starting Deltadock in {home} ...", soft_wrap=True)
        with valkey(home / "valkey") as broker:
            settings = embedded_settings(home, api_port) | broker.settings
            with running(settings, home, api_port=api_port, node_port=node_port) as children:
                announce(console, api_port, home)
                console.print("Ctrl-C stops everything; the next start finds the data again.")
                keep_running([broker.child, *children], stopping, console)
    console.print("Stopped.")


def announce(console: Console, api_port: int, home: Path) -> None:
    """Say where everything is, now that it is ready."""
    address = f"http://{HOST}:{api_port}"
    console.print(f"Dashboard  {address}/", soft_wrap=True)
    console.print(f"API        {address}/docs", soft_wrap=True)
    console.print(f"Logs       {home / 'logs'}", soft_wrap=True)


@contextmanager
def _only_one(home: Path) -> Iterator[None]:
    """Hold `home` for this process; the lock ends with it, however it ends."""
    home.mkdir(parents=True, exist_ok=True)
    with (home / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise Conflict(
                f"A Deltadock is already running in {home}. Stop it, or choose another --home."
            ) from error
        yield
