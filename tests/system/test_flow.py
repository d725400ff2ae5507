"""End to end over HTTP: upload, compression, download and generation."""

import hashlib
import json
import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import httpx
import openai
import pytest

from deltadock.artifacts.reader import Artifact
from deltadock.client.blocking import Client

from .conftest import SAMPLES, Stored, System

STATES = ("queued", "validating", "calibrating", "compressing", "assembling", "verifying", "ready")


def test_progress_is_streamed(stored: Stored) -> None:
    seen = [STATES.index(event["state"]) for event in stored.events]
    assert seen == sorted(seen)
    # How many are seen between these depends on the machine.
    assert STATES.index("queued") <= seen[0] < seen[-1] == STATES.index("ready")
    assert len(set(seen)) > 2
    assert all(a["percent"] <= b["percent"] for a, b in pairwise(stored.events))
    blocks = [event for event in stored.events if event["state"] == "compressing"]
    assert {event["blocks"] for event in blocks} <= {4}  # the head is tied to the embedding
    numbers = [event["block"] for event in blocks]
    assert numbers == sorted(numbers)
    assert set(numbers) <= {0, 1, 2, 3, 4}


def test_the_delta_has_a_listing_and_a_report(stored: Stored, client: Client) -> None:
    delta = stored.delta
    assert (delta["state"], delta["version"], delta["percent"]) == ("ready", 1, 100.0)
    assert delta["id"] in [listed.id for listed in client.deltas()]
    report = client.report(delta["id"])
    assert report.base_digest == stored.base["weights_digest"]
    assert report.artifact_bytes == delta["artifact"]["bytes"]
    assert report.ratio > 8
    assert report.kl < report.kl_base / 5
    assert report.agreement > 0.7
    assert len(report.matrices) == 28
    assert delta["metrics"]["kl"] == report.kl


def test_the_artifact_downloads_in_full_in_ranges_and_resumed(
    stored: Stored, client: Client, http: httpx.Client, tmp_path: Path
) -> None:
    delta, digest = stored.delta["id"], stored.delta["artifact"]["digest"]
    path = tmp_path / "delta.safetensors"
    client.download(delta, path)
    whole = path.read_bytes()
    assert hashlib.sha256(whole).hexdigest() == digest
    with Artifact(path) as artifact:
        assert artifact.manifest["base_digest"] == stored.base["weights_digest"]

    address = f"/v1/deltas/{delta}/artifact"
    part = http.get(address, headers={"Range": "bytes=100-299"})
    assert (part.status_code, part.content) == (206, whole[100:300])
    assert part.headers["content-range"] == f"bytes 100-299/{len(whole)}"
    tail = http.get(address, headers={"Range": "bytes=-10"})
    assert tail.content == whole[-10:]
    beyond = http.get(address, headers={"Range": f"bytes={len(whole)}-"})
    assert (beyond.status_code, beyond.json()["code"]) == (416, "range_not_satisfiable")
    head = http.head(address)
    assert head.headers["etag"] == f'"{digest}"'
    assert int(head.headers["content-length"]) == len(whole)

    interrupted = tmp_path / "again.safetensors"
    interrupted.with_name(f"again.safetensors.{digest[:16]}.part").write_bytes(whole[:1000])
    received: list[int] = []
    client.download(delta, interrupted, lambda _, done, __: received.append(done))
    assert interrupted.read_bytes() == whole
    assert received[0] > 1000


def test_the_delta_solves_exercises_that_its_base_does_not(stored: Stored, client: Client) -> None:
    lines = (SAMPLES / "exercises.jsonl").read_text().splitlines()[:12]
    exercises = [json.loads(line) for line in lines]

    def correct(model: str) -> int:
        return sum(
            client.generate(
                model, exercise["prompt"], max_tokens=16, temperature=0.0, stop="\n"
            ).text.strip()
            == exercise["answer"]
            for exercise in exercises
        )

    assert correct(stored.delta["id"]) >= 9
    assert correct("sample-base") <= 1


def test_sampling_is_determined_by_its_seed(stored: Stored, client: Client) -> None:
    first, again, other = (
        client.generate(stored.delta["id"], "Q:", max_tokens=24, temperature=1.0, seed=seed).text
        for seed in (1, 1, 2)
    )
    assert first == again
    assert first != other


def test_openai_clients_work(stored: Stored, url: str) -> None:
    key = os.environ["DELTADOCK_API_KEY"]
    with openai.OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0) as client:
        models = {model.id for model in client.models.list()}
        assert {"maths/skills", "sample-base"} <= models
        assert stored.delta["id"] not in models, "one entry a model"
        arguments = {"prompt": "Q: sort d a c b =\nA:", "max_tokens": 16, "temperature": 0.0}
        whole = client.completions.create(model=stored.delta["id"], **arguments)  # type: ignore[call-overload]
        by_name = client.completions.create(model="maths/skills", **arguments)  # type: ignore[call-overload]
        stream = client.completions.create(
            model=stored.delta["id"],
            stream=True,
            **arguments,  # type: ignore[call-overload]
        )
        chunks = list(stream)
        assert whole.model == stored.delta["id"]
        assert whole.choices[0].text == by_name.choices[0].text
        assert "".join(chunk.choices[0].text for chunk in chunks if chunk.choices) == (
            whole.choices[0].text
        )
        assert len(chunks) > 2
        messages = [{"role": "user", "content": "sort d a c b"}]
        said = client.chat.completions.create(model="maths/skills", messages=messages)  # type: ignore[call-overload]
        assert said.choices[0].message.content == whole.choices[0].text
        assert said.choices[0].finish_reason == "stop"
        with pytest.raises(openai.BadRequestError, match="no chat template") as refused:
            client.chat.completions.create(model="sample-base", messages=messages)  # type: ignore[arg-type]
        assert refused.value.code == "no_chat_template"
        with pytest.raises(openai.NotFoundError) as error:
            client.completions.create(model="nothing", prompt="x")
        assert error.value.code == "model_not_found"


def test_the_preview_predicts_the_size(stored: Stored, client: Client) -> None:
    pair = ("sample-base", stored.finetuned["digest"])
    size = client.preview(*pair, method="adamix", bits=1.0)
    assert size.artifact_bytes == pytest.approx(stored.delta["artifact"]["bytes"], rel=0.03)
    assert client.preview(*pair, method="adamix", ratio=12.0).bits < 1.0


def test_a_repeated_request_returns_the_same_delta(stored: Stored, client: Client) -> None:
    again = client.create_delta(
        "maths/skills",
        "sample-base",
        stored.finetuned["digest"],
        method="adamix",
        bits=1.0,
        calibration=stored.calibration,
    )
    assert again.delta.id == stored.delta["id"]
    assert again.job.state == "ready"


def test_the_dashboard_and_the_openapi_document_are_served(
    stored: Stored, http: httpx.Client
) -> None:
    assert stored.delta["name"] in http.get("/").text
    paths = http.get("/openapi.json").json()["paths"]
    assert {"/v1/uploads", "/v1/deltas", "/v1/previews", "/v1/completions"} <= paths.keys()


def test_a_shell_with_the_topologys_variables_reaches_its_servers(
    stored: Stored, system: System, tmp_path: Path
) -> None:
    listing = "import boto3; print(boto3.client('s3').list_buckets()['Buckets'][0]['Name'])"
    script = f'. {system.home}/variables.sh && "$0" -m deltadock gc --dry-run && "$0" -c "$1"'
    done = subprocess.run(
        ["sh", "-c", script, sys.executable, listing],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stderr == ""
    assert done.stdout.startswith("Would remove:\n")
    assert done.stdout.endswith("\ndeltadock\n")
