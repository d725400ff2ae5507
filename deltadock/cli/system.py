"""The processes of Deltadock on this machine: api, worker and node, started and kept running.

The embedded start and the topology differ in the settings they pass in, and in nothing else.
"""

import os
import secrets
import sys
import threading
import time
from collections import defaultdict, deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Final

import httpx
from rich.console import Console

from deltadock.cli.processes import HOST, Child, port_is_free
from deltadock.errors import Unavailable
from deltadock.settings import Settings, get_settings
from deltadock.storage.database import migrate

SECRET_FILE: Final = "node.secret"
"""In the home of the embedded start."""
MAX_RESTARTS: Final = 3
RESTART_WINDOW_SECONDS: Final = 60.0


def check_ports(api_port: int, node_port: int) -> None:
    """Refuse to start beside something that listens where we want to.

    Raises:
        Unavailable: a port is taken.
    """
    for option, port in (("--api-port", api_port), ("--node-port", node_port)):
        if not port_is_free(port):
            raise Unavailable(
                f"Port {port} is in use, perhaps by a Deltadock that is already running. "
                f"Stop what listens there or choose another port with {option}."
            )


def node_secret(home: Path) -> str:
    """What the api and the nodes know each other by: the environment's secret, else the home's own.

    The home's is made at the first start, for its owner's eyes alone; `deltadock node` finds it.
    """
    own = get_settings().node_secret
    if own is not None:
        return own.get_secret_value()
    path = home / SECRET_FILE
    if not path.is_file():
        home.mkdir(parents=True, exist_ok=True)
        path.touch(mode=0o600)
        path.write_text(secrets.token_urlsafe(), encoding="utf-8")
    return path.read_text(encoding="utf-8")


@contextmanager
def running(
    settings: Mapping[str, str], home: Path, *, api_port: int, node_port: int
) -> Iterator[list[Child]]:
    """Migrate the database, start every process and wait until all are ready.

    `settings` are fields of `Settings` with their values as text; `home` takes the logs.

    Raises:
        Unavailable: a process did not start; the end of its log is quoted.
        KeyboardInterrupt: we were asked to stop meanwhile.
    """
    variables = {f"DELTADOCK_{name.upper()}": value for name, value in settings.items()}
    environment = os.environ | variables
    if base := environment.get("DELTADOCK_NODE_BASE"):
        environment["DELTADOCK_NODE_BASE"] = str(Path(base).resolve())
    parsed = Settings.model_validate(settings)
    migrate(parsed.sqlalchemy_url)
    # A busy worker answers no ping, and after a crash it may be busy from the start: the file that
    # it touches before its first task tells that it is there. The last run's would tell nothing.
    parsed.worker_alive.unlink(missing_ok=True)
    python = (sys.executable, "-m")
    commands = {
        "node": (*python, "deltadock.inference.server", "--host", HOST, "--port", str(node_port)),
        "worker": worker_command(),
        "api": (*python, "uvicorn", "deltadock.api.main:app", "--host", HOST,
                "--port", str(api_port),
                "--timeout-graceful-shutdown", "5"),
    }  # fmt: skip
    with ExitStack() as stack:
        children = {
            name: stack.enter_context(
                # Uvicorn and Celery search the working directory first: the user's holds other
                # modules.
                Child(name, command, log=home / "logs" / f"{name}.log", env=environment, cwd=home)
            )
            for name, command in commands.items()
        }
        # Left in the reverse order: all are asked at once, before any is waited for.
        for child in children.values():
            stack.callback(child.ask_to_stop)
        children["api"].wait_until(lambda: _responds(f"http://{HOST}:{api_port}/readyz"))
        children["node"].wait_until(lambda: _knows_a_node(f"http://{HOST}:{api_port}/readyz"))
        children["worker"].wait_until(parsed.worker_alive.exists)
        yield list(children.values())


def worker_command() -> list[str]:
    """The command line of a worker for every queue."""
    return [
        *(sys.executable, "-m", "celery", "-A", "deltadock.workers.app", "worker", "-P", "solo"),
        *("-Q", "gpu,default", "--without-gossip", "--without-mingle"),
    ]


def _responds(url: str) -> bool:
    try:
        return httpx.get(url, timeout=2.0).is_success
    except httpx.TransportError:
        return False


def _knows_a_node(url: str) -> bool:
    try:
        return bool(httpx.get(url, timeout=2.0).json()["checks"]["node"] == "ok")
    except httpx.TransportError:
        return False


def keep_running(children: Sequence[Child], stopping: threading.Event, console: Console) -> None:
    """Start again what ends, until `stopping` is set.

    Raises:
        Unavailable: a process keeps ending; the end of its log is quoted.
    """
    restarts: defaultdict[str, deque[float]] = defaultdict(lambda: deque(maxlen=MAX_RESTARTS))
    while not stopping.wait(0.5):
        for child in children:
            if child.poll() is None:
                continue
            recent, now = restarts[child.name], time.monotonic()
            if len(recent) == MAX_RESTARTS and now - recent[0] < RESTART_WINDOW_SECONDS:
                raise child.ended("It keeps ending, so Deltadock stops.")
            recent.append(now)
            console.print(f"{child.name} ended with status {child.poll()}; starting it again.")
            child.restart()
