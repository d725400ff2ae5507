"""Children are restarted, up to a limit; readiness, and errors of failed children."""

import os
import signal
import sys
import threading
from io import StringIO
from pathlib import Path

import pytest
from celery import Celery
from rich.console import Console

from deltadock.cli.processes import Child
from deltadock.cli.system import MAX_RESTARTS, keep_running, worker_command
from deltadock.errors import Unavailable
from deltadock.settings import Settings
from deltadock.storage.database import migrate
from tests.cli.support import Command


def test_a_child_that_keeps_exiting_stops_the_system(tmp_path: Path) -> None:
    shown = StringIO()
    with (
        Child("broken", ["sh", "-c", "echo why; exit 3"], log=tmp_path / "broken.log") as child,
        pytest.raises(Unavailable, match=r"broken exited with status 3\..*keeps exiting") as caught,
    ):
        keep_running([child], threading.Event(), Console(file=shown))
    assert shown.getvalue().count("restarting it") == MAX_RESTARTS
    assert str(caught.value.details["log_tail"]).endswith("why\n")


def test_a_stop_request_ends_supervision(tmp_path: Path) -> None:
    stopping = threading.Event()
    stopping.set()
    with Child("sleeper", ["sleep", "600"], log=tmp_path / "sleeper.log") as child:
        keep_running([child], stopping, Console(file=StringIO()))
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
