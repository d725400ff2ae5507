"""Children are restarted, up to a limit; readiness, and errors of failed children."""

import os
import signal
import socket
import sys
import threading
from collections.abc import Mapping
from contextlib import suppress
from io import StringIO
from pathlib import Path
from typing import ClassVar, Self

import pytest
from celery import Celery
from rich.console import Console

from deltadock.cli import system
from deltadock.cli.demo import demo
from deltadock.cli.interrupts import forget_interrupts, note_interrupts
from deltadock.cli.processes import Child, stop_on_signals
from deltadock.cli.system import MAX_RESTARTS, keep_running, worker_command
from deltadock.client.connection import local_url_path
from deltadock.errors import InvalidInput, Unavailable
from deltadock.settings import Settings
from deltadock.storage.database import migrate
from tests.cli.support import Command, Outcome


def test_a_child_that_keeps_exiting_stops_the_system(tmp_path: Path) -> None:
    shown = StringIO()
    with (
        Child("broken", ["sh", "-c", "echo why; exit 3"], log=tmp_path / "broken.log") as child,
        pytest.raises(Unavailable, match=r"broken exited with status 3\..*keeps exiting") as caught,
    ):
        keep_running([child], threading.Event(), Console(file=shown), Settings(home=tmp_path))
    assert shown.getvalue().count("restarting it") == MAX_RESTARTS
    assert str(caught.value.details["log_tail"]).endswith("why\n")


class _Recorded:
    """Stands for a child process, of which the environment is kept."""

    environments: ClassVar[dict[str, Mapping[str, str]]] = {}

    def __init__(self, name: str, *_: object, env: Mapping[str, str], **__: object) -> None:
        self.environments[name] = env

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None: ...

    def request_stop(self) -> None: ...

    def wait_until(self, _ready: object) -> None: ...


@pytest.mark.parametrize("processes", [1, 2])
def test_only_the_apis_processes_count_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, processes: int
) -> None:
    monkeypatch.setattr(system, "Child", _Recorded)
    monkeypatch.setattr(system, "migrate", lambda _: None)

    def make_key(_: Settings) -> str:
        assert local_url_path(tmp_path).read_text() == "http://127.0.0.1:1\n", "whose key it is"
        return "key_a"

    monkeypatch.setattr(system, "ensure_local_key", make_key)
    settings = {"home": str(tmp_path), "api_processes": str(processes)}
    console = Console(file=StringIO())
    with system.running(settings, tmp_path, console, api_port=1, node_port=2):
        shared = {
            name
            for name, environment in _Recorded.environments.items()
            if "PROMETHEUS_MULTIPROC_DIR" in environment
        }
    assert shared == ({"api"} if processes > 1 else set())
    assert list((tmp_path / "run" / "metrics").iterdir()) == []


def test_the_demo_refuses_the_ports_of_another_deltadock() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port: int = server.getsockname()[1]
        with pytest.raises(Unavailable, match=f"Port {port} is in use"):
            demo(api_port=port)
        with pytest.raises(InvalidInput, match="cannot both"):
            demo(api_port=port, node_port=port)


def test_a_stop_request_ends_supervision(tmp_path: Path) -> None:
    stopping = threading.Event()
    stopping.set()
    with Child("sleeper", ["sleep", "600"], log=tmp_path / "sleeper.log") as child:
        keep_running([child], stopping, Console(file=StringIO()), Settings(home=tmp_path))
        assert child.poll() is None


BUSY = """
import time
from deltadock.workers import tasks
from deltadock.workers.app import app

@app.task(name="busy")
def busy() -> None:
    print("busy now", flush=True)
    time.sleep(600)
"""


def test_a_worker_that_is_busy_from_the_start_is_ready(tmp_path: Path, broker_url: str) -> None:
    (tmp_path / "busy.py").write_text(BUSY)
    settings = Settings(home=tmp_path / "home", broker_url=broker_url)
    migrate(settings.sqlalchemy_url)
    with Celery(broker=broker_url, set_as_current=False) as sender:
        sender.send_task("busy", queue="gpu")
    command = worker_command()
    command[command.index("deltadock.workers.app")] = "busy"
    environment = os.environ | {
        "DELTADOCK_HOME": str(settings.home),
        "DELTADOCK_BROKER_URL": broker_url,
        "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path]),
    }
    log = tmp_path / "worker.log"
    with Child("worker", command, log=log, env=environment, stop_signal=signal.SIGKILL) as worker:
        worker.wait_until(lambda: "busy now" in log.read_text())
        assert settings.worker_alive.exists()


def test_a_failed_child_is_reported_in_one_line_followed_by_its_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, deltadock: Command
) -> None:
    def fail(*_: object) -> None:
        with Child("broken", ["sh", "-c", "echo a; echo b; exit 3"], log=tmp_path / "log") as child:
            child.wait_until(lambda: False)

    monkeypatch.setattr("deltadock.cli.system.up", fail)
    outcome = deltadock("up")
    assert outcome.code == 3
    first, *rest = outcome.stderr.splitlines()
    assert first.startswith("error (unavailable): broken exited with status 3.")
    assert rest == ["    a", "    b"]


class _Interrupted:
    """Finds the commands' module: Ctrl-C meanwhile becomes an ImportError, as in NumPy."""

    def find_spec(self, name: str, *_: object) -> None:
        if name == "deltadock.cli.app":
            try:
                signal.raise_signal(signal.SIGINT)
            except KeyboardInterrupt:
                raise ImportError("numpy.core failed to import") from None


def test_ctrl_c_during_the_first_imports_says_so(
    deltadock: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, "deltadock.cli.app", raising=False)
    monkeypatch.delattr("deltadock.cli.app", raising=False)
    monkeypatch.setattr(sys, "meta_path", [_Interrupted(), *sys.meta_path])
    assert deltadock("up") == Outcome(130, "", "\nInterrupted. Nothing was done.\n")


@pytest.mark.parametrize("error", [KeyboardInterrupt, ImportError])
def test_ctrl_c_during_the_imports_of_up_says_so(
    deltadock: Command, monkeypatch: pytest.MonkeyPatch, error: type[BaseException]
) -> None:
    def imported(*_: object) -> None:
        try:
            signal.raise_signal(signal.SIGINT)
        except KeyboardInterrupt:
            raise error("numpy.core failed to import") from None

    monkeypatch.setattr("deltadock.cli.system.up", imported)
    outcome = deltadock("up")
    assert (outcome.code, outcome.stderr) == (130, "\nInterrupted.\n")


def test_ctrl_c_while_arguments_are_read_says_so(
    deltadock: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr("deltadock.cli.outcome.ReportingGroup.make_context", interrupted)
    assert deltadock("ls") == Outcome(130, "", "\nInterrupted. Nothing was done.\n")


def test_ctrl_c_that_an_import_has_lost_stops_the_start() -> None:
    note_interrupts()
    with suppress(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)
    with stop_on_signals() as stopping:
        assert stopping.is_set()
    forget_interrupts()


@pytest.mark.parametrize("command", ["up", "topology", "keys list"])
@pytest.mark.parametrize(
    ("option", "value"), [("--home", "{file}"), ("--api-port", 99999), ("--node-port", 0)]
)
def test_wrong_places_and_ports_are_usage_errors(
    deltadock: Command, tmp_path: Path, command: str, option: str, value: object
) -> None:
    file = tmp_path / "file"
    file.touch()
    outcome = deltadock(*command.split(), option, str(value).format(file=file))
    assert outcome.code == 2
    [line] = outcome.stderr.splitlines()
    assert line.startswith("error (usage): ")
    assert option in line
    assert line.endswith(f"See `deltadock {command} -h`.")


def test_a_file_that_cannot_be_used_is_named(deltadock: Command, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    home = tmp_path / "file" / "home"
    outcome = deltadock("keys", "create", "--name", "ci", "--home", home)
    assert outcome.code == 1
    assert outcome.stderr == f"error (invalid_input): {home}: Not a directory.\n"
