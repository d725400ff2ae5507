"""A running Deltadock: `deltadock up` and `deltadock topology`."""

import os
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from deltadock.cli.processes import Child, free_ports
from deltadock.client.blocking import Client

SAMPLES = Path(__file__).parents[2] / "samples"


@dataclass(frozen=True)
class Stored:
    """The sample fine-tune as a ready delta, and its job's events."""

    base: dict[str, Any]
    finetuned: dict[str, Any]
    calibration: str
    delta: dict[str, Any]
    events: list[dict[str, Any]]


@dataclass(frozen=True)
class System:
    """A running system: where its api is, and the folder with its key."""

    url: str
    home: Path


@pytest.fixture(scope="session", params=["topology"])
def system(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[System]:
    """A system started by the `deltadock` command: `topology`, or `up` where a test asks for it."""
    folder = tmp_path_factory.mktemp(request.param)
    api_port, node_port = free_ports(2)
    command = [
        *(sys.executable, "-m", "deltadock", request.param),
        *("--api-port", str(api_port), "--node-port", str(node_port)),
    ]
    if request.param == "up":
        command += ["--home", str(folder / "home")]
    log = folder / "system.log"
    environment = os.environ | {"DELTADOCK_DEVICE": "cpu"}
    with Child("deltadock", command, log=log, env=environment, grace=60.0) as child:
        child.wait_until(lambda: "Ctrl-C" in log.read_text(), seconds=180)
        # `deltadock up` and `topology` print where their key is.
        [key] = map(Path, re.findall(r"^API key +(.+)$", log.read_text(), re.MULTILINE))
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("DELTADOCK_API_KEY", key.read_text().strip())
            yield System(f"http://127.0.0.1:{api_port}", key.parent)
        child.stop()
        assert child.poll() == 0, log.read_text()
        assert log.read_text().endswith("Stopped.\n")


@pytest.fixture(scope="session")
def url(system: System) -> str:
    return system.url


@pytest.fixture(scope="session")
def http(url: str) -> Iterator[httpx.Client]:
    """A plain HTTP client, for requests that `Client` does not send."""
    headers = {"Authorization": f"Bearer {os.environ['DELTADOCK_API_KEY']}"}
    with httpx.Client(base_url=url, timeout=120.0, headers=headers) as http:
        yield http


@pytest.fixture(scope="session")
def client(url: str) -> Iterator[Client]:
    with Client(url) as client:
        yield client


@pytest.fixture(scope="session")
def stored(client: Client, tmp_path_factory: pytest.TempPathFactory) -> Stored:
    base = client.upload_folder(SAMPLES / "base")
    client.create_base("sample-base", base.digest)
    finetuned = client.upload_folder(SAMPLES / "finetuned")
    text = tmp_path_factory.mktemp("text") / "calibration.txt"
    text.write_text((SAMPLES / "calibration.txt").read_text()[:40_000])
    calibration = client.upload_calibration(text)
    accepted = client.create_delta(
        "maths/skills",
        "sample-base",
        finetuned.digest,
        method="adamix",
        bits=1.0,
        calibration=calibration,
    )
    events: list[dict[str, Any]] = []
    job = client.wait(accepted.job.id, lambda job: events.append(job.model_dump(mode="json")))
    assert job.state == "ready", job
    delta = client.delta(accepted.delta.id).model_dump(mode="json")
    return Stored(base.model_dump(), finetuned.model_dump(), calibration, delta, events)
