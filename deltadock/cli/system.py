"""Deltadock's processes on this machine: `deltadock up` and `deltadock topology`.

Both start api, worker and node and restart them when they exit; they differ only in settings. `up`
uses SQLite, a folder for blobs and Valkey; `topology` uses Postgres, Valkey and SeaweedFS, with the
processes and environment variables of docker-compose.yml.
"""

import fcntl
import os
import shlex
import shutil
import sys
import tempfile
import threading
import time
import webbrowser
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Final

import httpx
from rich.console import Console

from deltadock.api.access.sessions import Sessions
from deltadock.cli.key_store import ensure_local_key, has_made_key
from deltadock.cli.output import output
from deltadock.cli.processes import HOST, Child, check_ports, stop_on_signals
from deltadock.cli.readiness import api_url, has_node, is_ready
from deltadock.cli.services import postgres, seaweedfs, valkey
from deltadock.client.connection import local_url_path
from deltadock.errors import Conflict, Forbidden, Unavailable
from deltadock.extras import EMBEDDED, check_installed
from deltadock.settings import KEEP_ALIVE_SECONDS, Settings, get_settings
from deltadock.storage.api_keys import key_secret, local_key_path
from deltadock.storage.database import Database, migrate, normalise_url
from deltadock.trust import is_loopback, keep_secret, kept_secret
from deltadock.words import duration
from deltadock.workers.lease import expire_leases_of_dead

SECRET_FILE: Final = "node.secret"
"""File in the home that holds the shared secret of api and nodes."""
LOCK: Final = "lock"
"""File in the home that a running Deltadock holds a lock on."""
VARIABLES: Final = "variables.sh"
"""File in the home of a topology that sets what its processes have, for a shell."""
HEALTHCHECK_SECONDS: Final = 60
"""How long one of several api processes may take to start or to answer its supervisor, which
replaces it then."""
MAX_RESTARTS: Final = 3
RESTART_WINDOW_SECONDS: Final = 60.0


def node_secret(home: Path) -> str:
    """The shared secret of api and nodes: the environment's, else that of `home`.

    The latter is generated at the first start, readable only by its owner, and read by
    `deltadock node`.
    """
    configured = get_settings().node_secret
    if configured is not None:
        return configured.get_secret_value()
    return kept_secret(home / SECRET_FILE)


@contextmanager
def running(
    settings: Mapping[str, str],
    home: Path,
    console: Console,
    *,
    api_port: int,
    node_port: int,
    host: str = HOST,
) -> Iterator[list[Child]]:
    """Migrate the database, start api, worker and node, and wait until all are ready.

    The api's address is kept in the home, beside the key, for the commands and the client.

    Args:
        settings: fields of `Settings` with their values as text.
        home: folder for the logs.
        console: is told which of them is ready.
        api_port, node_port: ports of the api and, on the loopback interface, of the node.
        host: address of the api.

    Raises:
        Forbidden: `host` is not loopback, and no key was made for others.
        Unavailable: a process did not start; the error quotes the end of its log.
        KeyboardInterrupt: a stop signal arrived meanwhile.
    """
    variables = {f"DELTADOCK_{name.upper()}": value for name, value in settings.items()}
    environment = os.environ | variables
    if base := environment.get("DELTADOCK_NODE_BASE"):
        environment["DELTADOCK_NODE_BASE"] = str(Path(base).resolve())
    parsed = Settings.model_validate(settings)
    migrate(parsed.sqlalchemy_url)
    # Before the key: whoever finds that must know which server it is for.
    address = api_url(host, api_port)
    local_url_path(parsed.home).write_text(f"{address}\n", encoding="utf-8")
    check_host(host, parsed, ensure_local_key(parsed))
    _expire_leases(parsed)
    # A busy worker answers no ping, and after a crash it may be busy from the start. It touches
    # this file before its first task; one left from the last run must not count.
    parsed.worker_alive.unlink(missing_ok=True)
    python = (sys.executable, "-m")
    commands = {
        "node": (*python, "deltadock.inference.server", "--host", HOST, "--port", str(node_port)),
        "worker": worker_command(),
        "api": [*api_command(parsed.api_processes), "--host", host, "--port", str(api_port)],
    }  # fmt: skip
    # Uvicorn and Celery search the working directory first: the user's holds other modules.
    empty = home / "run"
    counts = empty / "metrics"
    shutil.rmtree(counts, ignore_errors=True)  # of the last run
    counts.mkdir(parents=True)
    environments = dict.fromkeys(commands, environment)
    if parsed.api_processes > 1:  # the others' counts are their own
        environments["api"] = environment | {"PROMETHEUS_MULTIPROC_DIR": str(counts)}
    began = time.monotonic()
    with ExitStack() as stack:
        children = {
            name: stack.enter_context(
                Child(
                    name,
                    command,
                    log=home / "logs" / f"{name}.log",
                    env=environments[name],
                    cwd=empty,
                )
            )
            for name, command in commands.items()
        }
        # Callbacks run in reverse order: every child gets its stop signal before any is waited for.
        for child in children.values():
            stack.callback(child.request_stop)
        console.print("Waiting for api, worker and node ...")
        with httpx.Client(base_url=address, timeout=2.0) as http:
            readiness: dict[str, Callable[[], bool]] = {
                "api": lambda: is_ready(http),
                "worker": parsed.worker_alive.exists,
                "node": lambda: has_node(http),
            }
            for name, ready in readiness.items():
                children[name].wait_until(ready)
                console.print(f"  {name} is ready ({duration(time.monotonic() - began)})")
        yield list(children.values())


def check_host(host: str, settings: Settings, local_key_id: str) -> None:
    """Check that other machines may reach the api, if they can.

    Raises:
        Forbidden: `host` is not loopback, and no key was made for others.
    """
    if not is_loopback(host) and not has_made_key(settings, local_key_id):
        raise Forbidden(
            f"On {host} other machines reach the api, and no key was made for them. Make one with "
            f"`deltadock keys create --name NAME --home {settings.home}`, then start again."
        )


def api_command(processes: int) -> list[str]:
    """Command line of an api, without its address."""
    return [
        *(sys.executable, "-m", "uvicorn", "deltadock.api.main:app"),
        *("--http", "deltadock.api.protocol:Protocol", "--workers", str(processes)),
        *("--timeout-worker-healthcheck", str(HEALTHCHECK_SECONDS)),
        *("--timeout-graceful-shutdown", "5", "--timeout-keep-alive", str(KEEP_ALIVE_SECONDS)),
    ]


def worker_command() -> list[str]:
    """Command line of a worker that serves every queue."""
    return [
        *(sys.executable, "-m", "celery", "-A", "deltadock.workers.app", "worker", "-P", "solo"),
        *("-Q", "gpu,default", "--without-gossip", "--without-mingle"),
    ]


def keep_running(
    children: Sequence[Child], stopping: threading.Event, console: Console, settings: Settings
) -> None:
    """Restart children that exit, until `stopping` is set; a dead worker's jobs go on at once.

    Raises:
        Unavailable: a child exited more than MAX_RESTARTS times within RESTART_WINDOW_SECONDS; the
            error quotes the end of its log.
    """
    restarts: defaultdict[str, deque[float]] = defaultdict(lambda: deque(maxlen=MAX_RESTARTS))
    while not stopping.wait(0.5):
        for child in children:
            child.rotate_log()
            if child.poll() is None:
                continue
            recent, now = restarts[child.name], time.monotonic()
            if len(recent) == MAX_RESTARTS and now - recent[0] < RESTART_WINDOW_SECONDS:
                raise child.exited("It keeps exiting, so Deltadock stops.")
            recent.append(now)
            console.print(f"{child.name} exited with status {child.poll()}; restarting it.")
            _expire_leases(settings)
            child.restart()


def _expire_leases(settings: Settings) -> None:
    """End the leases of workers that have died here, instead of waiting until they expire."""
    database = Database(settings.sqlalchemy_url)
    try:
        expire_leases_of_dead(database)
    except Unavailable:  # they expire
        pass
    finally:
        database.dispose()


def embedded_settings(home: Path, url: str) -> dict[str, str]:
    """Fields of `Settings` for SQLite and a local blob folder."""
    return {
        "home": str(home),
        "database_url": "",
        "blob_store": "local",
        "api_url": url,
        "key_secret": key_secret(Settings(home=home)),
        "node_secret": node_secret(home),
    }


def up(
    home: Path | None = None, api_port: int = 8000, node_port: int = 8100, host: str = HOST
) -> None:
    """Run the embedded system until Ctrl-C or SIGTERM; its data stays in `home`.

    Raises:
        Forbidden: `host` is not loopback, and no key was made for others.
        Conflict: another Deltadock runs in `home`.
        Unavailable: a port is in use, or a process does not start or keeps exiting.
    """
    home = (home or get_settings().home).resolve()
    if not (home / LOCK).exists():  # nothing runs there, and a refusal leaves nothing there
        check_ports(api_port, node_port)
    with stop_on_signals() as stopping, _home_lock(home):
        check_ports(api_port, node_port)
        with valkey(home / "valkey") as broker:
            url = api_url(host, api_port)
            settings = embedded_settings(home, url) | broker.settings
            ports = {"api_port": api_port, "node_port": node_port}
            with running(settings, home, output, **ports, host=host) as children:
                announce(url, home, settings)
                output.print("Ctrl-C stops everything; the data is kept for the next start.")
                parsed = Settings.model_validate(settings)
                keep_running([broker.child, *children], stopping, output, parsed)
    output.print("Stopped.")


def announce(url: str, home: Path, settings: Mapping[str, str]) -> None:
    """Print the addresses, the key's file and the log folder; in a terminal, open the dashboard."""
    parsed = Settings.model_validate(settings)
    token = Sessions(parsed).link_token(ensure_local_key(parsed))
    link = f"{url}/sign-in?token={token}"
    output.print(f"Dashboard  {link}  (signs in once, within the hour)", soft_wrap=True)
    output.print(f"API        {url}/docs", soft_wrap=True)
    output.print(f"API key    {local_key_path(parsed.home)}", soft_wrap=True)
    output.print(f"Data       {home}", soft_wrap=True)
    output.print(f"Logs       {home / 'logs'}", soft_wrap=True)
    has_screen = sys.platform == "darwin" or "DISPLAY" in os.environ
    if output.is_terminal and has_screen:
        webbrowser.open(link)


@contextmanager
def _home_lock(home: Path) -> Iterator[None]:
    """Lock `home`; the operating system releases the lock when the process dies.

    Raises:
        Conflict: another process holds the lock.
    """
    home.mkdir(mode=0o700, parents=True, exist_ok=True)
    with (home / LOCK).open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise Conflict(
                f"A Deltadock is already running in {home}. Stop it, or choose another --home."
            ) from error
        yield


def topology_settings(home: Path, api_port: int, *services: dict[str, str]) -> dict[str, str]:
    """The fields of `Settings` that the compose file sets."""
    settings = {
        "home": str(home),
        "api_url": f"http://{HOST}:{api_port}",
        "key_secret": key_secret(Settings(home=home)),
        "node_secret": node_secret(home),
        "device": get_settings().device,
    }
    for service in services:
        settings |= service
    return settings


def topology(home: Path | None = None, api_port: int = 8000, node_port: int = 8100) -> None:
    """Run the production services until Ctrl-C or SIGTERM; without `home`, data is temporary.

    Raises:
        Unavailable: a port is in use, or a process does not start or keeps exiting.
    """
    check_installed(*EMBEDDED)
    with stop_on_signals() as stopping, _data_folder(home) as folder:
        check_ports(api_port, node_port)
        output.print("Starting Postgres, Valkey and SeaweedFS ...")
        with (
            postgres(folder / "postgres") as database,
            valkey(folder / "valkey") as broker,
            seaweedfs(folder / "seaweedfs") as blobs,
        ):
            services = (database, broker, blobs)
            settings = topology_settings(
                folder, api_port, *(service.settings for service in services)
            )
            output.print("Starting Deltadock ...")
            with running(
                settings, folder, output, api_port=api_port, node_port=node_port
            ) as children:
                announce(api_url(HOST, api_port), folder, settings)
                _announce_servers(folder, settings)
                output.print("Ctrl-C stops everything.")
                servers = [service.child for service in services]
                parsed = Settings.model_validate(settings)
                keep_running([*servers, *children], stopping, output, parsed)
    output.print("Stopped.")


def _announce_servers(home: Path, settings: Mapping[str, str]) -> None:
    """Print where Postgres and the S3 server are; what else they need is kept in a file.

    With its variables in a shell, commands such as `deltadock gc` work on them, and so does boto3.
    """
    variables = {f"DELTADOCK_{name.upper()}": value for name, value in settings.items()} | {
        "AWS_ENDPOINT_URL_S3": settings["s3_endpoint_url"],
        "AWS_ACCESS_KEY_ID": settings["s3_access_key_id"],
        "AWS_SECRET_ACCESS_KEY": settings["s3_secret_access_key"],
        "AWS_DEFAULT_REGION": get_settings().s3_region,
    }
    lines = (f"export {name}={shlex.quote(value)}\n" for name, value in variables.items())
    keep_secret(home / VARIABLES, "".join(lines))
    database = normalise_url(settings["database_url"]).render_as_string()
    bucket = f"bucket {settings['s3_bucket']}"
    output.print(f"Postgres   {database}", soft_wrap=True)
    output.print(f"S3         {settings['s3_endpoint_url']}, {bucket}", soft_wrap=True)
    output.print(f"Variables  {home / VARIABLES}  (for a shell: passwords too)", soft_wrap=True)


@contextmanager
def _data_folder(home: Path | None) -> Iterator[Path]:
    if home is not None:
        yield home.resolve()
        return
    with tempfile.TemporaryDirectory(prefix="deltadock-topology-") as name:
        Path(name).chmod(0o711)  # Postgres may run as another user with a subfolder of this one
        yield Path(name)
