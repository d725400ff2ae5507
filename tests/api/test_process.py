"""The api as a process: light imports, JSON logs, clean shutdown."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import httpx

from deltadock.cli.processes import free_ports
from deltadock.settings import Settings
from deltadock.storage.database import migrate
from tests.api.support import bearer, issue_key

HEAVY = ("torch", "transformers", "triton", "pyscipopt", "safetensors", "boto3", "alembic")


def test_the_api_imports_nothing_heavy() -> None:
    code = f"import deltadock.api.main, sys; print([n for n in {HEAVY} if n in sys.modules])"
    answer = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert answer.stdout.strip() == "[]"


def test_start_log_and_shutdown(tmp_path: Path, broker_url: str) -> None:
    home = tmp_path / "home"
    migrate(f"sqlite:///{home / 'deltadock.db'}")
    port = free_ports(1)[0]
    headers = bearer(issue_key(Settings(home=home)))
    environment = {"DELTADOCK_HOME": str(home), "DELTADOCK_BROKER_URL": broker_url}
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "uvicorn", "deltadock.api.main:app", "--port", str(port)],
            env=os.environ | environment,
            stderr=log,
        )
    try:
        url = f"http://127.0.0.1:{port}"
        for _ in range(600):
            try:
                assert httpx.get(f"{url}/readyz").status_code == 200
                break
            except httpx.ConnectError:
                assert process.poll() is None
                time.sleep(0.05)
        httpx.get(f"{url}/v1/methods?secret=1", headers={"X-Request-ID": "trace-1", **headers})
        httpx.get(f"{url}/v1/nothing", headers=headers)
    finally:
        process.send_signal(signal.SIGTERM)
        # After a graceful shutdown uvicorn raises the signal again for the default handler.
        assert process.wait(20) in {0, -signal.SIGTERM}
    records = [
        json.loads(line)
        for line in (tmp_path / "log").read_text().splitlines()
        if line.startswith("{")
    ]
    assert {record["process"] for record in records} == {"api"}
    assert "Application shutdown complete." in [record["event"] for record in records]
    known, unknown = (r for r in records if r["logger"] == "deltadock.api.access")
    assert known["request_id"] == "trace-1"
    assert (known["method"], known["path"], known["status"]) == ("GET", "/v1/methods", 422)
    assert known["milliseconds"] >= 0
    assert unknown["status"] == 404
    assert unknown["request_id"] != "trace-1"
