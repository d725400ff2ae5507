"""`vllm serve` with a delta by its name, and another swapped in over HTTP under load."""

import hashlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from integrations.vllm.tests.conftest import Registry
from integrations.vllm.tests.engine import PROMPTS, Answers
from integrations.vllm.tests.serving import serving

DELTA = "/v1/deltadock/delta"


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture(scope="module")
def server(registry: Registry, tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    """A client of a server that starts with `maths/skills`, with a key of its own."""
    options = (
        "--load-format", "deltadock", "--model-loader-extra-config", '{"delta": "maths/skills"}',
        "--worker-extension-cls", "deltadock_vllm.swap.DeltaSwap",
    )  # fmt: skip
    log = tmp_path_factory.mktemp("server") / "log"
    with serving(log, *options, VLLM_PLUGINS="deltadock") as client:
        yield client


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
