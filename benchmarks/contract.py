"""Whether the api and the nodes do what their OpenAPI pages say, tried by schemathesis.

    python -m benchmarks.contract [--examples 40] [--seed 1] [--database sqlite|postgres]

Starts `deltadock up`, stores the sample fine-tune as deltas, and runs every check of schemathesis
in every phase, the stateful one included, on its node and on the api; three in four cases are about
objects that are there. Exits with 1 if either finds something.
"""

import argparse
import json
import os
import secrets
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Final

import httpx

from deltadock.cli.processes import Child, free_ports
from deltadock.cli.services import postgres
from deltadock.client.http import Client

ROOT: Final = Path(__file__).parents[1]
SAMPLES: Final = ROOT / "samples"
COPIES: Final = 10
"""Of each kind of object, since some cases delete what they find."""
REAL: Final = 0.75
"""How often a value is one that is there."""


@contextmanager
def running(home: Path, environment: Mapping[str, str]) -> Iterator[tuple[str, str, str]]:
    """`deltadock up` in this folder; yields the api's URL, the node's, and an API key."""
    api_port, node_port = free_ports(2)
    command: list[str | Path] = [
        *(sys.executable, "-m", "deltadock", "up", "--home", home),
        *("--api-port", str(api_port), "--node-port", str(node_port)),
    ]
    log = home / "up.log"
    variables = {**os.environ, "DELTADOCK_DEVICE": "cpu", **environment}
    with Child("deltadock", command, log=log, env=variables) as up:
        up.wait_until(lambda: "Ctrl-C" in log.read_text(encoding="utf-8"), seconds=180)
        key = (home / "api.key").read_text(encoding="utf-8").strip()
        yield f"http://127.0.0.1:{api_port}", f"http://127.0.0.1:{node_port}", key


def fill(client: Client, http: httpx.Client) -> dict[str, list[str]]:
    """Store objects of every kind; returns values of parameters and of fields of bodies."""

    def post(path: str, body: dict[str, Any]) -> str:
        answer = http.post(path, json=body)
        answer.raise_for_status()
        made: str = answer.json()["id"]
        return made

    base = client.upload_folder(SAMPLES / "base")
    client.create_base("sample-base", base.digest)
    finetuned = client.upload_folder(SAMPLES / "finetuned")
    text = client.upload_calibration(SAMPLES / "calibration.txt")
    models = [f"skills-{number}" for number in range(COPIES)]
    deltas, jobs = [], []
    for model in models:  # the first is compressed, the others share its artifact
        accepted = client.create_delta(
            f"maths/{model}", "sample-base", finetuned.digest, method="bitdelta", calibration=text
        )
        job = client.wait(accepted.job.id, lambda _: None)
        assert job.state == "ready", job
        deltas.append(accepted.delta.id)
        jobs.append(job.id)
    post("/v1/tenants", {"name": "acme"})
    hook = {"url": "https://hooks.example.com/"}
    key = {"name": "spare", "scopes": ["read"]}
    names = [f"maths/{model}" for model in models]
    return {
        "path.delta_id": deltas + names,
        "path.reference": names,
        "path.job_id": jobs,
        "path.base": ["sample-base"],
        "path.project": ["maths"],
        "path.model": [*models, "sample-base"],
        "path.alias": ["default", "prod"],
        "path.tenant": ["acme"],
        "path.upload_id": [post("/v1/uploads", {"kind": "checkpoint"}) for _ in range(COPIES)],
        "path.webhook_id": [post("/v1/webhooks", hook) for _ in range(COPIES)],
        "path.key_id": [post("/v1/keys", key) for _ in range(COPIES)],
        "path.path": ["config.json", "model.safetensors"],
        "query.base": ["sample-base"],
        "query.delta": deltas,
        "query.name": names,
        "body.base": ["sample-base"],
        "body.checkpoint": [finetuned.digest],
        "body.model": [*names, "sample-base"],
    }


def configuration(values: Mapping[str, Sequence[str]]) -> str:
    """schemathesis.toml with these values of parameters."""
    lines = [(ROOT / "schemathesis.toml").read_text(encoding="utf-8")]
    for name, known in values.items():
        lines += [f"[dictionaries.{json.dumps(name)}]", f"values = {json.dumps(known)}"]
    lines += ["[parameters]"]
    lines += [
        f"{json.dumps(name)} = {{ dictionary = {json.dumps(name)}, probability = {REAL} }}"
        for name in values
    ]
    return "\n".join(lines) + "\n"


def main() -> int:
    """Run it."""
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--examples", type=int, default=40, help="of each operation and phase")
    arguments.add_argument("--seed", type=int, default=1)
    arguments.add_argument("--database", choices=["sqlite", "postgres"], default="sqlite")
    given = arguments.parse_args()
    with ExitStack() as stack:
        folder = Path(
            stack.enter_context(tempfile.TemporaryDirectory(prefix="deltadock-contract-"))
        )
        folder.chmod(0o711)
        home = folder / "home"
        home.mkdir()
        node_secret = secrets.token_hex()
        environment = {"DELTADOCK_NODE_SECRET": node_secret}
        if given.database == "postgres":
            service = stack.enter_context(postgres(folder / "postgres"))
            environment["DELTADOCK_DATABASE_URL"] = service.settings["database_url"]
        url, node, key = stack.enter_context(running(home, environment))
        bearer = {"Authorization": f"Bearer {key}"}
        client = stack.enter_context(Client(url, key))
        http = stack.enter_context(httpx.Client(base_url=url, headers=bearer, timeout=60))
        listed = http.get("/v1/keys").json()["data"]
        own = next(each["id"] for each in listed if key.startswith(each["prefix"]))
        values = fill(client, http)
        artifact = client.resolve(values["body.model"][0]).digest
        on_node = {name: [artifact] for name in ("path.digest", "path.model", "body.model")}
        hooks = {"SCHEMATHESIS_HOOKS": "benchmarks.contract_hooks", "CONTRACT_KEY": own}
        options = [
            *("--checks", "all", "--continue-on-failure", "--max-examples", str(given.examples)),
            *("--seed", str(given.seed), "--request-timeout", "120", "--no-shrink"),
        ]
        ended = []
        for server, secret, known in ((node, node_secret, on_node), (url, key, values)):
            config = folder / "schemathesis.toml"
            config.write_text(configuration(known), encoding="utf-8")
            command = [
                *("schemathesis", "--config-file", str(config)),
                *("run", f"{server}/openapi.json", *options),
                *("--header", f"Authorization: Bearer {secret}"),
            ]
            done = subprocess.run(command, cwd=ROOT, env=os.environ | hooks, check=False)
            ended.append(done.returncode)
    return int(any(ended))


if __name__ == "__main__":
    sys.exit(main())
