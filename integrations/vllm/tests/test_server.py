"""`vllm serve` with a delta by its name, and another swapped in over HTTP under load."""

import hashlib
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from integrations.vllm.tests.conftest import Registry
from integrations.vllm.tests.engine import BASE, PROMPTS, Answers

START_SECONDS = 600
DELTA = "/v1/deltadock/delta"


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture(scope="module")
def server(registry: Registry, tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    """A client of a server that starts with `maths/skills`, with a key of its own."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [
        sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(BASE),
        "--served-model-name", "it", "--host", "127.0.0.1", "--port", str(port),
        "--max-model-len", "128", "--max-num-seqs", "32", "--max-num-batched-tokens", "512",
        "--enforce-eager", "--api-key", "secret", "--load-format", "deltadock",
        "--model-loader-extra-config", '{"delta": "maths/skills"}',
        "--worker-extension-cls", "deltadock_vllm.swap.DeltaSwap",
    ]  # fmt: skip
    log = tmp_path_factory.mktemp("server") / "log"
    environment = os.environ | {"VLLM_PLUGINS": "deltadock"}
    with (
        log.open("w") as output,
        subprocess.Popen(command, stdout=output, stderr=output, env=environment) as process,
        httpx.Client(
            base_url=f"http://127.0.0.1:{port}",
            headers={"Authorization": "Bearer secret"},
            timeout=300,
        ) as client,
    ):
        try:
            wait_until_ready(client, process, log)
            yield client
        finally:
            process.terminate()


def wait_until_ready(client: httpx.Client, process: subprocess.Popen[bytes], log: Path) -> None:
    """Poll until the server answers."""
    end = time.monotonic() + START_SECONDS
    while time.monotonic() < end and process.poll() is None:
        try:
            if client.get("/health").status_code == 200:
                return
        except httpx.TransportError:
            time.sleep(1)
    pytest.fail(log.read_text()[-4000:])


def ask(client: httpx.Client, prompt: str) -> list[int]:
    """The tokens of a greedy answer."""
    body = {
        "model": "it", "prompt": prompt, "max_tokens": 12, "temperature": 0, "stop": ["\n"],
        "return_token_ids": True,
    }  # fmt: skip
    answer = client.post("/v1/completions", json=body)
    assert answer.status_code == 200, answer.text
    tokens: list[int] = answer.json()["choices"][0]["token_ids"]
    return tokens


def put(client: httpx.Client, delta: str | None) -> Any:
    return client.put(DELTA, json={"delta": delta})


def test_a_delta_is_served_by_name_and_swapped_under_load(
    server: httpx.Client, deltas: dict[str, Path], expected: dict[str, Answers]
) -> None:
    adamix, bitdelta = digest(deltas["adamix"]), digest(deltas["bitdelta"])
    assert server.get(DELTA).json() == {"delta": "maths/skills", "digest": adamix}
    with ThreadPoolExecutor(32) as threads:
        running = [threads.submit(ask, server, prompt) for prompt in PROMPTS]
        swapped = put(server, "maths/skills:2")
        answers = [one.result() for one in running]
    assert (swapped.status_code, swapped.json()["digest"]) == (200, bitdelta)
    for number, answer in enumerate(answers):
        assert answer in (expected["adamix"][number], expected["bitdelta"][number])
    assert [ask(server, prompt) for prompt in PROMPTS[:8]] == expected["bitdelta"][:8]
    assert put(server, adamix).json()["digest"] == adamix
    assert put(server, None).json()["digest"] is None
    assert [ask(server, prompt) for prompt in PROMPTS[:8]] == expected["base"][:8]


def test_a_refusal_says_why_and_the_server_goes_on(
    server: httpx.Client, deltas: dict[str, Path]
) -> None:
    before = server.get(DELTA).json()["digest"]
    cases = {
        "maths/none": (404, "not_found"),
        "0" * 64: (404, "not_found"),
        str(deltas["adamix"]): (422, "invalid_input"),
    }
    for delta, (status, code) in cases.items():
        refused = put(server, delta)
        assert (refused.status_code, refused.json()["error"]["type"]) == (status, code)
    assert server.put(DELTA, json={"path": "x"}).status_code in {400, 422}
    assert httpx.get(server.base_url.join(DELTA)).status_code == 401
    assert server.get(DELTA).json()["digest"] == before
    assert ask(server, PROMPTS[0])
