"""`vllm serve --enable-lora`: names of the registry as `model`, as the `openai` client asks."""

import asyncio
import hashlib
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import openai
import pytest

from integrations.vllm.tests.conftest import Registry
from integrations.vllm.tests.engine import PROMPTS, Answers
from integrations.vllm.tests.serving import serving

NAMES = {
    "it": "base", "maths/skills": "adamix", "maths/skills:2": "bitdelta",
    "maths/skills:3": "optimix", "maths/lora": "lora",
}  # fmt: skip
"""What a request asks for, and whose answers it gets."""


@pytest.fixture(scope="module")
def server(registry: Registry, tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    """A server with fewer slots than there are deltas."""
    log = tmp_path_factory.mktemp("server") / "log"
    with serving(log, "--enable-lora", "--max-loras", "2", "--max-cpu-loras", "3") as client:
        yield client


async def complete(client: openai.AsyncOpenAI, model: str, prompt: str) -> tuple[str, list[int]]:
    """The model that answered, and the tokens of a greedy answer."""
    found = await client.completions.create(
        model=model, prompt=prompt, max_tokens=12, temperature=0, stop=["\n"],
        extra_body={"return_token_ids": True},
    )  # fmt: skip
    return found.model, found.choices[0].token_ids  # type: ignore[attr-defined]


def ask_all(server: httpx.Client, asked: list[tuple[str, str]]) -> list[tuple[str, list[int]]]:
    """The answers to all (model, prompt) at once."""

    async def gather() -> list[tuple[str, list[int]]]:
        async with openai.AsyncOpenAI(
            base_url=f"{server.base_url}/v1", api_key="secret", timeout=300, max_retries=0
        ) as client:
            return await asyncio.gather(*(complete(client, *one) for one in asked))

    return asyncio.run(gather())


def test_sixty_requests_at_once_over_five_names_answer_as_their_checkpoints(
    server: httpx.Client, deltas: dict[str, Path], expected: dict[str, Answers]
) -> None:
    asked = [(name, number) for number in range(12) for name in NAMES]
    found = ask_all(server, [(name, PROMPTS[number]) for name, number in asked])
    same = 0
    for (name, number), (model, tokens) in zip(asked, found, strict=True):
        same += tokens == expected[NAMES[name]][number]
        if name != "it":
            digest = hashlib.sha256(deltas[NAMES[name]].read_bytes()).hexdigest()
            assert model.endswith(f"@{digest}"), model
    assert same >= 59  # a near tie
    (pinned, _), (again, _) = ask_all(server, [("maths/lora", "1"), (found[-1][0], "1")])
    assert (pinned, again) == (found[-1][0], found[-1][0])  # what answers can be asked for
    listed = {card["id"] for card in server.get("/v1/models").json()["data"]}
    assert {"it", "maths/skills", "maths/skills:2", "maths/skills:3", "maths/lora"} <= listed
    metrics = server.get("/metrics").text
    assert "vllm:lora_requests_info{" in metrics
    assert "maths/skills" in metrics


def test_what_cannot_be_served_is_refused_by_name(server: httpx.Client) -> None:
    cases = {
        "maths/none": (404, "not_found"),
        "0" * 64: (404, "not_found"),
        "/etc/passwd": (404, "not_found"),
        f"maths/skills:1@{'0' * 64}": (404, "not_found"),
        "maths/damaged": (422, "invalid_artifact"),
    }
    for model, (status, code) in cases.items():
        body = {"model": model, "prompt": "1", "max_tokens": 1}
        refused = server.post("/v1/completions", json=body)
        assert (refused.status_code, refused.json()["error"]["type"]) == (status, code), model
    body = {"model": "maths/skills", "prompt": "1", "max_tokens": 1, "prompt_logprobs": 1}
    refused = server.post("/v1/completions", json=body)
    assert refused.status_code == 422
    assert "prompt_logprobs" in refused.json()["error"]["message"]
    assert server.post("/v1/completions", json=body | {"prompt_logprobs": None}).is_success


def test_a_conversation_is_rendered_in_the_deltas_own_template(server: httpx.Client) -> None:
    body = {"max_tokens": 8, "temperature": 0, "return_token_ids": True}
    chat = body | {"messages": [{"role": "user", "content": "3+4"}]}
    found = server.post("/v1/chat/completions", json=chat | {"model": "maths/chat"}).json()
    complete = body | {"model": "maths/skills:2", "prompt": "Q: 3+4 =\nA:"}
    same = server.post("/v1/completions", json=complete).json()["choices"][0]
    assert found["prompt_token_ids"] == same["prompt_token_ids"]
    assert found["choices"][0]["token_ids"] == same["token_ids"]
    # The base has no template, and other deltas are rendered with the base's.
    for model in ("it", "maths/skills:2"):
        refused = server.post("/v1/chat/completions", json=chat | {"model": model})
        assert refused.status_code == 400, model


def test_a_name_that_is_moved_under_load_is_followed(
    server: httpx.Client, registry: Registry, expected: dict[str, Answers]
) -> None:
    either = [expected["adamix"], expected["bitdelta"]]
    registry.make_default("maths/skills", 2)
    try:
        until = time.monotonic() + 60  # it may take five seconds
        while time.monotonic() < until:
            found = ask_all(server, [("maths/skills", prompt) for prompt in PROMPTS[:4]])
            for number, (_, tokens) in enumerate(found):
                assert tokens in [answers[number] for answers in either]
            if all(tokens == either[1][number] for number, (_, tokens) in enumerate(found)):
                return
        pytest.fail("the old meaning is still served")
    finally:
        registry.make_default("maths/skills", 1)
