"""Whether the api does what its OpenAPI page says, tried by schemathesis.

    python -m benchmarks.contract [--examples 40] [--seed 1]

Starts `deltadock up`, stores the sample fine-tune as a delta, and runs every check of schemathesis
in every phase, the stateful one included. Exits with schemathesis' status.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import httpx

from deltadock.cli.processes import Child, free_ports
from deltadock.client.http import Client

ROOT: Final = Path(__file__).parents[1]
SAMPLES: Final = ROOT / "samples"


@contextmanager
def running(home: Path) -> Iterator[tuple[str, str]]:
    """`deltadock up` in this folder; yields its URL and API key."""
    api_port, node_port = free_ports(2)
    command: list[str | Path] = [
        *(sys.executable, "-m", "deltadock", "up", "--home", home),
        *("--api-port", str(api_port), "--node-port", str(node_port)),
    ]
    log = home / "up.log"
    with Child("deltadock", command, log=log, env=os.environ | {"DELTADOCK_DEVICE": "cpu"}) as up:
        up.wait_until(lambda: "Ctrl-C" in log.read_text(encoding="utf-8"), seconds=180)
        key = (home / "api.key").read_text(encoding="utf-8").strip()
        yield f"http://127.0.0.1:{api_port}", key


def fill(client: Client) -> None:
    """Store a base, a fine-tune that is ready, an open upload and a webhook."""
    base = client.upload_folder(SAMPLES / "base")
    client.create_base("sample-base", base.digest)
    finetuned = client.upload_folder(SAMPLES / "finetuned")
    text = client.upload_calibration(SAMPLES / "calibration.txt")
    accepted = client.create_delta(
        "maths/skills", "sample-base", finetuned.digest, method="bitdelta", calibration=text
    )
    job = client.wait(accepted.job.id, lambda _: None)
    assert job.state == "ready", job


def main() -> int:
    """Run it."""
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--examples", type=int, default=40, help="of each operation and phase")
    arguments.add_argument("--seed", type=int, default=1)
    given = arguments.parse_args()
    folder = tempfile.TemporaryDirectory(prefix="deltadock-contract-")
    with folder as name, running(Path(name)) as (url, key):
        with Client(url, key) as client:
            fill(client)
        bearer = f"Bearer {key}"
        listed = httpx.get(f"{url}/v1/keys", headers={"Authorization": bearer}).json()["data"]
        own = next(each["id"] for each in listed if key.startswith(each["prefix"]))
        command = [
            *("schemathesis", "run", f"{url}/openapi.json", "--checks", "all"),
            *("--header", f"Authorization: {bearer}", "--continue-on-failure"),
            *("--max-examples", str(given.examples), "--seed", str(given.seed)),
            *("--request-timeout", "120", "--no-shrink"),
        ]
        hooks = {"SCHEMATHESIS_HOOKS": "benchmarks.contract_hooks", "CONTRACT_KEY": own}
        done = subprocess.run(command, cwd=ROOT, env=os.environ | hooks, check=False)
        return done.returncode


if __name__ == "__main__":
    sys.exit(main())
