"""Whether the api and the nodes do what their OpenAPI pages say, tried by schemathesis.

    python -m benchmarks.contract [--examples 40] [--seed 1] [--database sqlite|postgres]

Starts `deltadock up`, stores the sample fine-tune as deltas, and runs every check of schemathesis
in every phase, the stateful one included, on its node and on the api; most cases are about objects
that are there. Prints what the valid cases of each operation were answered. Exits with 1 if it
finds something, or if an operation answers 404 to most of its valid cases.
"""

import argparse
import json
import os
import secrets
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Final

import httpx

from deltadock.cli.processes import Child, free_ports
from deltadock.cli.services import postgres
from deltadock.client.blocking import Client
from deltadock.model_target import ARTIFACT_HEADER, BASE_HEADER

ROOT: Final = Path(__file__).parents[1]
SAMPLES: Final = ROOT / "samples"
COPIES: Final = 10
"""Of the models, since some cases delete what they find."""


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


def fill(client: Client, http: httpx.Client) -> dict[str, Any]:
    """Store objects of every kind; returns what the hooks need to aim cases at them."""

    def post(path: str, body: dict[str, Any]) -> dict[str, Any]:
        answer = http.post(path, json=body)
        answer.raise_for_status()
        made: dict[str, Any] = answer.json()
        return made

    base = client.upload_folder(SAMPLES / "base")
    client.create_base("sample-base", base.digest)
    finetuned = client.upload_folder(SAMPLES / "finetuned")
    text = client.upload_calibration(SAMPLES / "calibration.txt")
    hook = post("/v1/webhooks", {"url": "https://hooks.example.com/"})
    names = [f"maths/skills-{number}" for number in range(COPIES)]
    delta = {
        "base": "sample-base",
        "checkpoint": finetuned.digest,
        "method": "bitdelta",
        "calibration": {"source": "text", "digest": text},
    }
    deltas, jobs = [], []
    for name in names:  # the first is compressed, the others share its artifact
        accepted = post("/v1/deltas", {"name": name, **delta})
        job = client.wait(accepted["job"]["id"], lambda _: None)
        assert job.state == "ready", job
        deltas.append(accepted["delta"]["id"])
        jobs.append(job.id)
    post("/v1/tenants", {"name": "acme"})
    uploads = http.get("/v1/uploads").json()["data"]
    messages = http.get(f"/v1/webhooks/{hook['id']}/messages").json()["data"]
    artifact = client.resolve(names[0]).digest
    http.post(
        f"/v1/deltas/{deltas[0]}/generate", json={"prompt": "a"}
    ).raise_for_status()  # on the node
    files = next(each["files"] for each in uploads if len(each["files"]) > 1)
    there = {
        "delta_id": deltas + names,
        "reference": names,
        "job_id": jobs,
        "base": ["sample-base"],
        "project": ["maths"],
        "model": [name.removeprefix("maths/") for name in names],
        "alias": ["default"],
        "tenant": ["acme"],
        "webhook_id": [hook["id"]],
        "message_id": [message["id"] for message in messages],
        "node_id": [node["id"] for node in http.get("/v1/nodes").json()["data"]],
        "artifact": [artifact],
    }
    calibration = [delta["calibration"], {"source": "sampled"}, None]
    body = {"base": ["sample-base"], "checkpoint": [finetuned.digest], "calibration": calibration}
    body |= {"parent": [*deltas, None], "tenant": ["acme", None], "model": [*names, "sample-base"]}
    return {
        "paths": {
            "any": there,
            "GET /v1/models/{model}": {"model": [*names, *deltas, "sample-base"]},
        },
        "queries": {
            "any": {"base": ["sample-base"], "delta": deltas, "tenant": ["local"]},
            "GET /v1/deltas": {"name": names},
        },
        "headers": {"any": {}},
        "bodies": {
            "any": body,
            "PUT /v1/registry/{project}/{model}/aliases/{alias}": {"version": [1], "expected": [0]},
        },
        "delta": delta,
        "checkpoint": finetuned.digest,
        "base": base.digest,
        "artifact": artifact,
        "files": [{name: file[name] for name in ("path", "size", "sha256")} for file in files],
    }


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
        known = fill(client, http)
        artifact = [known["artifact"]]
        on_node = {
            "paths": {"any": {"digest": artifact, "model": artifact}},
            "queries": {"any": {}},
            "headers": {"any": {BASE_HEADER: [known["base"]], ARTIFACT_HEADER: artifact}},
            "bodies": {"any": {"model": artifact}},
        }
        answers = folder / "answers.json"
        found = False
        for server, token, there in ((node, node_secret, on_node), (url, key, known)):
            run = {"url": server, "key": token, "key_id": own, "seed": given.seed}
            found |= try_server(there | run, given.examples, answers)
    return int(found)


def try_server(known: Mapping[str, Any], examples: int, answers: Path) -> bool:
    """Run schemathesis on one server; prints its answers, and returns whether it found anything."""
    hooks = {
        "SCHEMATHESIS_HOOKS": "benchmarks.contract_hooks",
        "CONTRACT": json.dumps({**known, "answers": str(answers)}),
    }
    command = [
        *("schemathesis", "run", f"{known['url']}/openapi.json"),
        *("--checks", "all", "--continue-on-failure", "--max-examples", str(examples)),
        *("--seed", str(known["seed"]), "--no-shrink"),
        *("--request-timeout", "120", "--max-response-time", "120"),
        *("--header", f"Authorization: Bearer {known['key']}"),
    ]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | hooks, check=False)
    rare = print_answers(json.loads(answers.read_text(encoding="utf-8")))
    return done.returncode != 0 or rare


def print_answers(answers: Mapping[str, Mapping[str, int]]) -> bool:
    """Print the statuses of valid cases by operation; whether one mostly finds no object."""
    rare = False
    for operation, counts in sorted(answers.items()):
        statuses = {status: count for status, count in counts.items() if status != "invalid"}
        missed = sum(n for status, n in statuses.items() if status.startswith("404"))
        mostly = missed > sum(statuses.values()) / 2
        rare |= mostly
        listed = ", ".join(f"{status}: {statuses[status]}" for status in sorted(statuses))
        mark = "mostly 404" if mostly else ""
        print(f"{operation:60} invalid: {counts.get('invalid', 0):4}, valid {listed} {mark}")
    print(f"{sum(sum(counts.values()) for counts in answers.values())} cases")
    return rare


if __name__ == "__main__":
    sys.exit(main())
