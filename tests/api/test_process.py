"""The api as a process: light imports, JSON logs, clean shutdown."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import httpx

from deltadock.api.access.authentication import CACHE_SECONDS
from deltadock.api.access.sessions import Sessions
from deltadock.cli.processes import free_ports
from deltadock.cli.system import api_command
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


def test_two_processes_start_log_share_their_state_and_stop(
    tmp_path: Path, broker_url: str
) -> None:
    home = tmp_path / "home"
    migrate(f"sqlite:///{home / 'deltadock.db'}")
    port = free_ports(1)[0]
    headers = bearer(issue_key(Settings(home=home)))
    counts = tmp_path / "metrics"
    counts.mkdir()
    environment = {
        "DELTADOCK_HOME": str(home),
        "DELTADOCK_BROKER_URL": broker_url,
        "PROMETHEUS_MULTIPROC_DIR": str(counts),
    }
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen(
            [*api_command(2), "--port", str(port)],
            env=os.environ | environment,
            stderr=log,
        )
    try:
        url = f"http://127.0.0.1:{port}"
        for _ in range(2400):
            try:
                assert httpx.get(f"{url}/readyz").status_code == 200
                break
            except httpx.ConnectError:
                assert process.poll() is None
                time.sleep(0.05)
        httpx.get(f"{url}/v1/methods?secret=1", headers={"X-Request-ID": "trace-1", **headers})
        httpx.get(f"{url}/v1/nothing", headers=headers)
        check_shared_state(url, headers, Settings(home=home))
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
    known, unknown = [r for r in records if r["logger"] == "deltadock.api.access"][:2]
    assert known["request_id"] == "trace-1"
    assert (known["method"], known["path"], known["status"]) == ("GET", "/v1/methods", 422)
    assert known["milliseconds"] >= 0
    assert unknown["status"] == 404
    assert unknown["request_id"] != "trace-1"


def check_shared_state(url: str, headers: dict[str, str], settings: Settings) -> None:
    """Whichever process a connection reaches: counts, one-time links and revoked keys hold."""
    keys = httpx.get(f"{url}/v1/keys", headers=headers).json()["data"]
    for _ in range(12):  # each on a connection of its own
        assert httpx.get(f"{url}/v1/bases", headers=headers).status_code == 200
    metrics = httpx.get(f"{url}/metrics", headers=headers).text
    assert re.search(r'requests_total\{.*route="/v1/bases".*\} 12.0', metrics)
    assert "deltadock_queue_depth" in metrics
    link = {"token": Sessions(settings).link_token(keys[0]["id"])}
    answers = [httpx.get(f"{url}/sign-in", params=link).status_code for _ in range(6)]
    assert answers == [303, *[401] * 5]
    httpx.delete(f"{url}/v1/keys/{keys[0]['id']}", headers=headers)
    time.sleep(CACHE_SECONDS)
    refused = {httpx.get(f"{url}/v1/bases", headers=headers).status_code for _ in range(6)}
    assert refused == {401}
