"""`deltadock topology`: the production shape on this machine, on real servers.

Postgres, Valkey and SeaweedFS stand where the compose file has its containers; the processes are
those of the embedded start, and the environment variables those of the compose file.
"""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console

from deltadock.cli.processes import HOST, stop_on_signals
from deltadock.cli.services import postgres, seaweedfs, valkey
from deltadock.cli.system import check_ports, keep_running, node_secret, running
from deltadock.cli.up import announce
from deltadock.settings import get_settings


def topology_settings(home: Path, api_port: int, *services: dict[str, str]) -> dict[str, str]:
    """Fields of `Settings` for the production shape: all that the compose file sets, too."""
    settings = {
        "home": str(home),
        "api_url": f"http://{HOST}:{api_port}",
        "node_secret": node_secret(home),
        "device": get_settings().device,
    }
    for service in services:
        settings |= service
    return settings


def topology(home: Path | None = None, api_port: int = 8000, node_port: int = 8100) -> None:
    """Run the production shape until Ctrl-C or SIGTERM; without `home` its data goes at the end.

    Raises:
        Unavailable: a port is taken, or a process does not start or keeps ending.
    """
    console = Console()
    with stop_on_signals() as stopping, _folder(home) as folder:
        check_ports(api_port, node_port)
        console.print("Starting Postgres, Valkey and SeaweedFS ...")
        with (
            postgres(folder / "postgres") as database,
            valkey(folder / "valkey") as broker,
            seaweedfs(folder / "seaweedfs") as blobs,
        ):
            services = (database, broker, blobs)
            settings = topology_settings(
                folder / "home", api_port, *(service.settings for service in services)
            )
            console.print("Starting Deltadock ...")
            with running(settings, folder, api_port=api_port, node_port=node_port) as children:
                announce(console, api_port, folder)
                console.print("Ctrl-C stops everything.")
                servers = [service.child for service in services]
                keep_running([*servers, *children], stopping, console)
    console.print("Stopped.")


@contextmanager
def _folder(home: Path | None) -> Iterator[Path]:
    if home is not None:
        yield home.resolve()
        return
    with tempfile.TemporaryDirectory(prefix="deltadock-topology-") as name:
        Path(name).chmod(0o711)  # Postgres may run as another user and has a folder in it
        yield Path(name)
