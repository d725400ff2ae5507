"""`deltadock up` restarts its children, keeps its data and leaves no process behind."""

import os
import re
import signal
import socket
import sys
import time
from pathlib import Path

import httpx
import psutil
import pytest

from deltadock.cli.processes import Child, free_ports
from tests.cli.support import Command

PROCESSES = 5  # api, worker, node, valkey and the watchdog


def start(home: Path, log: Path, api_port: int, node_port: int) -> Child:
    command = [
        *(sys.executable, "-m", "deltadock", "up", "--home", str(home)),
        *("--api-port", str(api_port), "--node-port", str(node_port)),
    ]
    environment = os.environ | {"DELTADOCK_DEVICE": "cpu"}
    return Child("deltadock up", command, log=log, env=environment, grace=60.0)


def children_of(pid: int) -> set[int]:
    return {child.pid for child in psutil.Process(pid).children()}


def command_of(pid: int) -> str:
    """The command line of a process; empty once it has exited, reaped or not."""
    try:
        return " ".join(psutil.Process(pid).cmdline())
    except (psutil.NoSuchProcess, psutil.ZombieProcess):
        return ""


def assert_gone(pids: set[int], seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while left := [command_of(pid) for pid in pids if command_of(pid)]:
        assert time.monotonic() < deadline, left
        time.sleep(0.1)


def is_ready(url: str) -> bool:
    try:
        return httpx.get(f"{url}/readyz").is_success
    except httpx.TransportError:
        return False


def test_up_restarts_children_keeps_data_and_leaves_no_process(tmp_path: Path) -> None:
    home, log = tmp_path / "home", tmp_path / "up.log"
    api_port, node_port = free_ports(2)
    url = f"http://127.0.0.1:{api_port}"

    with start(home, log, api_port, node_port) as up:
        up.wait_until(lambda: "Ctrl-C" in log.read_text(), seconds=180)
        told = re.findall(r"(\w+) is ready \(\d+ s\)", log.read_text())
        assert told == ["api", "worker", "node"]
        headers = {"Authorization": f"Bearer {(home / 'api.key').read_text().strip()}"}
        answer = httpx.post(f"{url}/v1/uploads", json={"kind": "checkpoint"}, headers=headers)
        upload = answer.json()["id"]

        # A second instance is refused in the same folder.
        refused = tmp_path / "refused.log"
        with start(home, refused, *free_ports(2)) as second:
            second.wait_until(lambda: second.poll() == 1)
        assert "already running" in refused.read_text()

        # A child that dies is restarted.
        first = children_of(up.pid)
        assert len(first) == PROCESSES
        [api] = [pid for pid in first if "uvicorn" in command_of(pid)]
        os.kill(api, signal.SIGKILL)
        up.wait_until(lambda: "api exited with status -9" in log.read_text())
        up.wait_until(lambda: is_ready(url))

        # SIGTERM, like Ctrl-C, stops everything gracefully.
        last = children_of(up.pid)
        up.stop()
        assert up.poll() == 0
        assert log.read_text().endswith("\nStopping ...\nStopped.\n")
        assert_gone(first | last)

    with start(home, tmp_path / "again.log", api_port, node_port) as up:
        up.wait_until(lambda: len(children_of(up.pid)) == PROCESSES)
        up.wait_until(lambda: is_ready(url), seconds=120)
        assert httpx.get(f"{url}/v1/uploads/{upload}", headers=headers).json()["state"] == "open"

        # If it is killed, its children are terminated too.
        children = children_of(up.pid)
        os.kill(up.pid, signal.SIGKILL)
        assert_gone(children)


@pytest.mark.parametrize("command", ["up", "topology"])
def test_a_port_in_use_is_named(command: str, deltadock: Command, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        _, node_port = server.getsockname()
        ports = ("--api-port", free_ports(1)[0], "--node-port", node_port)
        outcome = deltadock(command, "--home", tmp_path / "home", *ports)
        alone = deltadock("node", "--port", node_port)
    assert (outcome.code, alone.code) == (3, 3)
    assert f"Port {node_port} is in use" in outcome.stderr
    assert "--node-port" in outcome.stderr
    assert "choose another port with --port" in alone.stderr
    assert not (tmp_path / "home").exists()
