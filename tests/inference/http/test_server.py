"""A running node, through OpenAI's client and plain HTTP."""

import asyncio
import json
import shutil
import socket
import threading
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import torch
import typer

from deltadock.artifacts.folder import scan_folder
from deltadock.inference.engine.engine import MAX_DEVICE_FAILURES
from deltadock.inference.http.replies import _LogprobsWriter
from deltadock.inference.prompts.tokenizer import Tokenizer, read_tokenizer_files
from deltadock.inference.server import NodeServer, serve
from deltadock.model_target import ARTIFACT_HEADER, BASE_HEADER, TENANT_HEADER
from deltadock.openai.fields import GENERATION_HEADER, PROMPT_TOKENS_HEADER
from tests.inference.support import (
    PROMPT,
    RunningNode,
    Site,
    expected_text,
    hold,
    start,
    write_delta,
)
from tests.tracing import recording
from tests.waiting import wait_until


@pytest.fixture(scope="module")
def node(site: Site, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningNode]:
    with start(site, tmp_path_factory.mktemp("home"), node_max_deltas=2) as running:
        yield running


def test_concurrent_base_and_deltas_answer_like_their_merged_checkpoints(
    site: Site, node: RunningNode, generate: Any
) -> None:
    async def ask(artifact: str | None) -> Any:
        headers = {"Deltadock-Base": site.base}
        if artifact is not None:
            headers["Deltadock-Artifact"] = artifact
        async with openai.AsyncOpenAI(
            base_url=f"{node.url}/v1", api_key="none", default_headers=headers, max_retries=0
        ) as client:
            return await client.completions.create(
                model=f"name of {artifact}", prompt=PROMPT, max_tokens=24, temperature=0
            )

    async def ask_all() -> list[Any]:
        return await asyncio.gather(*(ask(artifact) for artifact in (*site.models, *site.models)))

    answers = asyncio.run(ask_all())
    for artifact, answer in zip((*site.models, *site.models), answers, strict=True):
        assert answer.choices[0].text == expected_text(site, artifact, generate, 24)
        assert answer.model == f"name of {artifact}"
    assert len({answer.choices[0].text for answer in answers}) == 3


def test_a_request_continues_its_callers_trace(site: Site, node: RunningNode) -> None:
    headers = {"Deltadock-Base": site.base, "traceparent": f"00-{'a' * 32}-{'b' * 16}-01"}
    body = {"model": "m", "prompt": "x", "max_tokens": 1}
    with recording() as exporter:
        answer = httpx.post(f"{node.url}/v1/completions", json=body, headers=headers)
        (span,) = exporter.get_finished_spans()
    assert answer.status_code == 200
    assert span.name == "POST /v1/completions"
    assert format(span.context.trace_id, "x") == "a" * 32
    assert span.parent is not None
    assert format(span.parent.span_id, "x") == "b" * 16


def test_a_streams_head_names_its_prompt_tokens_before_the_first_token(
    site: Site, node: RunningNode
) -> None:
    body = {"model": "m", "prompt": ["abc", "de"], "n": 2, "max_tokens": 1}
    headers = {"Deltadock-Base": site.base}
    whole = httpx.post(f"{node.url}/v1/completions", json=body, headers=headers).json()
    go_on = hold(node)
    stream = {**body, "stream": True}
    with httpx.stream("POST", f"{node.url}/v1/completions", json=stream, headers=headers) as answer:
        tokens = answer.headers[PROMPT_TOKENS_HEADER]
        go_on.set()
        answer.read()
    assert int(tokens) == whole["usage"]["prompt_tokens"]


def test_a_named_request_is_ended_with_its_usage(site: Site, node: RunningNode) -> None:
    url = f"{node.url}/v1/generations/mine"
    headers = {"Deltadock-Base": site.base, GENERATION_HEADER: "mine"}
    body = {"model": "m", "prompt": "abc", "max_tokens": 100, "temperature": 0, "n": 2}
    assert httpx.delete(url).status_code == 404

    def ask(**more: Any) -> Any:
        json = body | more
        return httpx.post(f"{node.url}/v1/completions", json=json, headers=headers).json()

    ask(max_tokens=1)  # loads the base
    go_on = hold(node)
    with ThreadPoolExecutor(1) as threads:
        node.node._generations.clear()
        answering = threads.submit(ask)
        wait_until(lambda: "mine" in node.node._generations)
        ended = httpx.delete(url).json()
        go_on.set()
        answer = answering.result()
    assert ended == {"prompt_tokens": 3, "completion_tokens": 0, "total_tokens": 3}
    assert [choice["finish_reason"] for choice in answer["choices"]] == ["cancelled"] * 2


def test_errors_have_a_message_and_a_request_id_in_the_openai_package(
    site: Site, node: RunningNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    with node.client(site.base) as client:
        with pytest.raises(openai.NotFoundError, match="no route /v1/embeddings") as caught:
            client.embeddings.create(model="m", input="x")
        assert caught.value.code == "route_not_found"
        assert caught.value.code == "route_not_found"
        assert caught.value.request_id
        monkeypatch.setattr(node.node, "generate", lambda *_: 1 / 0)
        with pytest.raises(openai.InternalServerError, match="logged under mine") as broken:
            client.completions.create(model="m", prompt="x", extra_headers={"X-Request-ID": "mine"})
    assert broken.value.request_id == "mine"


def test_a_stream_equals_the_whole_answer(site: Site, node: RunningNode) -> None:
    params: dict[str, Any] = {
        "model": "m",
        "prompt": [PROMPT, "second"],
        "max_tokens": 30,
        "seed": 5,
        "n": 2,
        "stop": ["e", "ß"],
        "logprobs": 2,
    }
    with node.client(site.base, site.artifacts[0]) as client:
        whole = client.completions.create(**params)
        texts, ends, tokens = dict.fromkeys(range(4), ""), {}, {i: [] for i in range(4)}
        usage = None
        for chunk in client.completions.create(
            **params, stream=True, stream_options={"include_usage": True}
        ):
            usage = chunk.usage or usage
            for choice in chunk.choices:
                texts[choice.index] += choice.text
                ends[choice.index] = choice.finish_reason
                tokens[choice.index] += choice.logprobs.tokens
    assert [choice.text for choice in whole.choices] == list(texts.values())
    assert [choice.finish_reason for choice in whole.choices] == [ends[i] for i in range(4)]
    assert [choice.logprobs.tokens for choice in whole.choices] == list(tokens.values())
    assert usage == whole.usage
    assert usage.completion_tokens == sum(map(len, tokens.values()))
    assert whole.choices[0].text != whole.choices[1].text, "choices differ"


def test_a_prompt_may_be_token_ids(site: Site, node: RunningNode) -> None:
    with node.client(site.base) as client:
        answer = client.completions.create(model="m", prompt=[1, 2, 3], max_tokens=4)
        assert answer.usage.prompt_tokens == 3
        several = client.completions.create(model="m", prompt=[[1], [2, 3]], max_tokens=4)
        assert several.usage.prompt_tokens == 3
        assert [choice.index for choice in several.choices] == [0, 1]


def test_more_deltas_than_slots_are_served(site: Site, tmp_path: Path, generate: Any) -> None:
    with start(site, tmp_path, node_max_deltas=1) as node:
        for artifact in (*site.artifacts, *site.artifacts):
            with node.client(site.base, artifact) as client:
                answer = client.completions.create(
                    model="m", prompt=PROMPT, max_tokens=16, temperature=0
                )
            assert answer.choices[0].text == expected_text(site, artifact, generate, 16)
        assert node.node.base.deltas.slots.counts.evictions == 3


def test_a_delta_has_its_own_tokenizer_files(
    site: Site, node: RunningNode, tmp_path: Path, generate: Any
) -> None:
    ends = json.dumps({"eos_token_id": list(range(256))})
    manifest = scan_folder(site.home / "base-0")
    path = write_delta(
        tmp_path / "delta",
        site.models[None],
        manifest.weights_digest,
        1,
        **{"generation_config.json": ends},
    )
    with node.client(site.base, site.blobs.put_file(path)) as client:
        answer = client.completions.create(model="m", prompt=PROMPT, temperature=0)
    assert (answer.choices[0].text, answer.choices[0].finish_reason) == ("", "stop")


@pytest.mark.parametrize(
    ("body", "param", "message"),
    [
        ({"prompt": ""}, "prompt", "Send at least one character or token id."),
        ({"prompt": ["a", ""]}, "prompt", "Send at least one character or token id."),
        (
            {"prompt": [999]},
            "prompt",
            "`prompt` contains the token id 999; the model has 0 to 263.",
        ),
        (
            {"prompt": [[1], [-1]]},
            "prompt",
            "`prompt` contains the token id -1; the model has 0 to",
        ),
        ({"prompt": []}, "prompt", "`prompt` is an empty list; send a string"),
        ({"prompt": "x" * 120}, "prompt", "The prompt has 120 tokens; together with its answer"),
        ({"max_tokens": -1}, "max_tokens", "greater than or equal to 0"),
        ({"temperature": -1}, "temperature", "greater than or equal to 0"),
        ({"suffix": "x"}, "suffix", "`suffix` is not supported yet; leave it out."),
        ({"logit_bias": {"264": 1}}, "logit_bias", "the token id 264; the model has 0 to 263."),
    ],
)
def test_bad_requests_name_the_field_in_error(
    site: Site, node: RunningNode, body: dict[str, Any], param: str | None, message: str
) -> None:
    response = httpx.post(
        f"{node.url}/v1/completions",
        json={"model": "m", "prompt": "a", **body},
        headers={"Deltadock-Base": site.base},
    )
    assert response.status_code == 400
    error = response.json()["error"]
    too_long = "together with its answer" in message
    assert error["code"] == ("context_length_exceeded" if too_long else "invalid_input")
    assert error["type"] == "invalid_request_error"
    assert error["param"] == param
    assert message in error["message"]


def test_a_lone_surrogate_is_refused(site: Site, node: RunningNode) -> None:
    response = httpx.post(
        f"{node.url}/v1/completions",
        content='{"model": "m", "prompt": "\\ud800"}',
        headers={"Deltadock-Base": site.base, "Content-Type": "application/json"},
    )
    assert response.status_code == 400
    assert "surrogate" in response.json()["error"]["message"]


def test_weights_that_cannot_be_loaded_fail_only_their_request(
    site: Site, node: RunningNode, generate: Any
) -> None:
    not_a_delta = site.blobs.put_file(site.home / "base-0" / "model.safetensors")
    broken = site.blobs.put_bytes(b"what the digest names")
    site.blobs.path(broken).unlink()
    # a valid delta, but not the named one
    shutil.copyfile(site.home / "delta-1", site.blobs.path(broken))
    cases = [
        (site.base, broken, 502, "damaged_blob"),
        (site.base, not_a_delta, 400, "invalid_artifact"),
        (site.base, site.foreign, 409, "base_mismatch"),
        (site.base, "0" * 64, 404, "model_not_found"),
        (site.base, "../../etc/passwd", 400, "invalid_input"),
        ("nonsense", None, 400, "invalid_input"),
    ]
    for base, artifact, status, code in cases:
        with node.client(base, artifact) as client, pytest.raises(openai.APIStatusError) as caught:
            client.completions.create(model="m", prompt="a")
        assert (caught.value.status_code, caught.value.code) == (status, code)
    with node.client(site.base, site.artifacts[1]) as client:
        answer = client.completions.create(model="m", prompt=PROMPT, max_tokens=8, temperature=0)
    assert answer.choices[0].text == expected_text(site, site.artifacts[1], generate, 8)
    assert broken not in {held.digest for held in node.node.held()}


def test_without_headers_the_model_is_the_base_or_a_held_delta(site: Site, tmp_path: Path) -> None:
    with start(site, tmp_path, node_base=site.home / "base-0") as node:
        with node.client(site.base, site.artifacts[0]) as client:
            client.completions.create(model="m", prompt="a", max_tokens=1)
        with openai.OpenAI(base_url=f"{node.url}/v1", api_key="none", max_retries=0) as client:
            names = [model.id for model in client.models.list()]
            assert names == ["base-0", site.artifacts[0]]
            for name in names:
                assert client.completions.create(model=name, prompt="a", max_tokens=1).model == name
                assert client.models.retrieve(name).id == name
            with pytest.raises(openai.NotFoundError, match="GET /v1/models lists") as missing:
                client.completions.create(model="unknown", prompt="a")
            assert (missing.value.code, missing.value.param) == ("model_not_found", "model")
            with pytest.raises(openai.NotFoundError, match="'unknown'"):
                client.models.retrieve("unknown")
        wrong = httpx.get(f"{node.url}/v1/completions")
        assert (wrong.status_code, wrong.headers["Allow"]) == (405, "POST")
        assert wrong.json()["error"]["code"] == "method_not_allowed"
        with (
            node.client(site.other_base) as client,
            pytest.raises(openai.InternalServerError) as caught,
        ):
            client.completions.create(model="m", prompt="a")
        assert (caught.value.status_code, caught.value.code) == (503, "unavailable")


ASK = {"model": "m", "prompt": "a", "max_tokens": 1}


def test_an_idle_node_changes_its_base(site: Site, tmp_path: Path) -> None:
    with start(site, tmp_path) as node:
        for base in (site.other_base, site.base):
            with node.client(base) as client:
                assert client.completions.create(**ASK).choices
            assert node.node.base.digest == base
        adopted = node.node.base
        with node.client("0" * 64) as client, pytest.raises(openai.NotFoundError):
            client.completions.create(**ASK)
        folder = shutil.copytree(site.home / "base-0", tmp_path / "unknown")
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, "model_type": "gpt2"}))
        manifest = scan_folder(folder)
        for file in manifest.files:
            site.blobs.put_file(folder / file.path)
        site.blobs.put_bytes(manifest.to_json())
        with (
            node.client(manifest.digest) as client,
            pytest.raises(openai.BadRequestError, match="type 'gpt2' are not served"),
        ):
            client.completions.create(**ASK)
        assert node.node.base is adopted, "the current base is kept"


def test_a_request_that_waited_too_long_for_a_base_can_be_repeated(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("deltadock.inference.turns.MAX_WAIT_SECONDS", 0.2)
    with start(site, tmp_path) as node, node.client(site.base) as client:
        client.completions.create(**ASK)
        go_on = hold(node)
        with ThreadPoolExecutor() as threads, node.client(site.other_base) as other:
            running = threads.submit(lambda: client.completions.create(**ASK))
            wait_until(lambda: node.node.base.users == 1)
            names = {"Deltadock-Base-Name": "maths"}
            with pytest.raises(openai.InternalServerError, match="base maths is not") as caught:
                other.completions.create(**ASK, extra_headers=names)
            assert caught.value.response.headers["Retry-After"] == "1"
            go_on.set()
            assert running.result(60).choices
            monkeypatch.setattr("deltadock.inference.turns.MAX_WAIT_SECONDS", 60.0)
            assert other.completions.create(**ASK).choices


def test_a_tenant_whose_answers_overlap_leaves_the_slot_to_another(
    site: Site, tmp_path: Path
) -> None:
    ended: list[str] = []
    with start(site, tmp_path, node_max_deltas=1) as node, ThreadPoolExecutor() as threads:

        def ask(name: str, tenant: str, artifact: str) -> int:
            headers = {BASE_HEADER: site.base, ARTIFACT_HEADER: artifact, TENANT_HEADER: tenant}
            answer = httpx.post(f"{node.url}/v1/completions", json=ASK, headers=headers, timeout=60)
            ended.append(name)
            return answer.status_code

        own, other = site.artifacts
        ask("warm", "many", own)
        go_on = hold(node)
        slots = node.node.base.deltas.slots
        asked = [threads.submit(ask, "first", "many", own)]
        wait_until(lambda: slots.residents[own].users == 1)
        asked.append(threads.submit(ask, "other", "one", other))
        wait_until(lambda: len(list(slots._waiting)) == 1)
        asked.append(threads.submit(ask, "next", "many", own))
        wait_until(lambda: len(list(slots._waiting)) == 2)
        go_on.set()
        assert [answer.result() for answer in asked] == [200] * 3
    assert ended == ["warm", "first", "other", "next"]


def test_who_waits_for_a_slot_does_not_keep_the_base(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("deltadock.inference.turns.MIN_TURN_SECONDS", 0.0)
    ended: list[str] = []
    with start(site, tmp_path, node_max_deltas=1) as node, ThreadPoolExecutor() as threads:

        def ask(name: str, base: str, artifact: str | None = None) -> None:
            with node.client(base, artifact) as client:
                client.completions.create(**ASK)
            ended.append(name)

        own, other = site.artifacts
        ask("warm", site.base, own)
        go_on = hold(node)
        slots = node.node.base.deltas.slots
        asked = [threads.submit(ask, "first", site.base, own)]
        wait_until(lambda: slots.residents[own].users == 1)
        asked.append(threads.submit(ask, "second", site.base, other))
        wait_until(lambda: slots._waiting)
        asked.append(threads.submit(ask, "another base", site.other_base))
        wait_until(lambda: not slots._waiting)
        go_on.set()
        for answer in asked:
            answer.result()
    assert ended == ["warm", "first", "another base", "second"]


def test_a_change_whose_clients_have_gone_is_not_made(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("deltadock.inference.turns.MIN_TURN_SECONDS", 0.0)
    monkeypatch.setattr("deltadock.inference.turns.MAX_CLOSED_SECONDS", 3600.0)
    with start(site, tmp_path) as node, node.client(site.base) as client:
        client.completions.create(**ASK)
        turns, base = node.node._turns, node.node.base
        node.call(base.enter)
        url = httpx.URL(node.url)
        with socket.create_connection((url.host, url.port)) as leaving:
            head = (
                f"Host: node\r\nDeltadock-Base: {site.other_base}\r\nContent-Type: application/json"
            )
            body = json.dumps(ASK)
            leaving.sendall(
                f"POST /v1/completions HTTP/1.1\r\n{head}\r\n"
                f"Content-Length: {len(body)}\r\n\r\n{body}".encode()
            )
            wait_until(lambda: not turns._open.is_set())
        assert client.completions.create(**ASK).choices
        assert node.node.base is base
        assert not turns._changes
        node.call(base.leave)


def test_a_lost_device_ends_the_process(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with start(site, tmp_path) as node, node.client(site.base) as client:
        client.completions.create(model="m", prompt="a", max_tokens=1)
        assert httpx.get(f"{node.url}/readyz").is_success
        monkeypatch.setattr(node.node.base.engine, "_device_failures", MAX_DEVICE_FAILURES)
        assert httpx.get(f"{node.url}/readyz").status_code == 503
        assert node.node.state()["draining"], "the api sends nothing more"
        server = NodeServer(node.app, "127.0.0.1", 0, node.url)
        assert asyncio.run(server.on_tick(0)) is True
        monkeypatch.setattr(NodeServer, "run", lambda self: None)
        monkeypatch.setattr("deltadock.inference.server.configure_logging", lambda *_, **__: None)
        monkeypatch.setattr("deltadock.inference.server.create_app", lambda _: node.app)
        with pytest.raises(typer.Exit) as exit_:
            serve()
        assert exit_.value.exit_code == 1


@pytest.fixture(scope="module")
def chunking(site: Site, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningNode]:
    """A node that computes prompts four tokens at a time."""
    home = tmp_path_factory.mktemp("home")
    with start(site, home, node_pass_tokens=4, node_max_sequences=3) as running:
        yield running


@pytest.mark.parametrize("max_tokens", [0, 1, 3])
@pytest.mark.parametrize("as_tokens", [False, True])
@pytest.mark.parametrize("stream", [False, True])
def test_echo_scores_the_prompt_like_transformers(
    site: Site, chunking: RunningNode, max_tokens: int, as_tokens: bool, stream: bool
) -> None:
    """lm-evaluation-harness's request, on base and deltas, over chunks and cached prefixes."""
    tokenizer = Tokenizer(read_tokenizer_files(site.home / "base-0"))
    texts = [PROMPT, f"{PROMPT}!", "é"]
    prompts: Any = [tokenizer.encode(text) for text in texts] if as_tokens else texts
    for artifact in (None, site.artifacts[0], None):
        with chunking.client(site.base, artifact) as client:
            answer = client.completions.create(
                model="m", prompt=prompts, max_tokens=max_tokens, temperature=0, echo=True,
                logprobs=2, stream=stream, extra_body={"ignore_eos": True},
            )  # fmt: skip
            choices = gather(answer) if stream else answer.choices
        for text, choice in zip(texts, choices, strict=True):
            tokens = tokenizer.encode(text)
            with torch.no_grad():
                logits = site.models[artifact](torch.tensor([tokens])).logits[0]
            expected = logits.log_softmax(-1)[range(len(tokens) - 1), tokens[1:]].tolist()
            scores = choice.logprobs
            assert choice.text.startswith(text)
            assert len(scores.tokens) == len(tokens) + max_tokens
            assert (scores.token_logprobs[0], scores.top_logprobs[0]) == (None, None)
            assert scores.token_logprobs[1 : len(tokens)] == pytest.approx(expected, abs=1e-4)
            for token, top in zip(scores.tokens[1:], scores.top_logprobs[1:], strict=True):
                assert len(top) in {2, 3}
                assert token in top
            # All tokens of a character have its offset.
            sizes = [len(character.encode()) for character in text]
            offsets = [place for place, size in enumerate(sizes) for _ in range(size)]
            assert scores.text_offset[: len(tokens)] == offsets
            assert choice.finish_reason == "length"


@pytest.mark.parametrize("stream", [False, True])
def test_the_scores_of_a_prompt_do_not_hold_up_other_requests(
    site: Site, node: RunningNode, stream: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of a long prompt take seconds to write."""
    writing, go_on = threading.Event(), threading.Event()
    add_prompt = _LogprobsWriter.add_prompt

    def held(*arguments: Any) -> None:
        writing.set()
        assert go_on.wait(30)
        add_prompt(*arguments)

    monkeypatch.setattr(_LogprobsWriter, "add_prompt", held)
    ask: dict[str, Any] = {"model": "m", "prompt": PROMPT, "max_tokens": 1, "temperature": 0}

    def scored() -> int:
        with node.client(site.base) as client:
            answer = client.completions.create(**ask, echo=True, logprobs=1, stream=stream)
            choices = gather(answer) if stream else answer.choices
        return len(choices[0].logprobs.tokens)

    with ThreadPoolExecutor(1) as threads, node.client(site.base, site.artifacts[0]) as other:
        waiting = threads.submit(scored)
        assert writing.wait(30)
        try:
            assert other.completions.create(**ask, timeout=20).choices
            assert not waiting.done()
        finally:
            go_on.set()
        assert waiting.result(30) == len(PROMPT.encode()) + 1


def gather(chunks: Any) -> list[Any]:
    """The choices of a completion stream, concatenated."""
    choices: dict[int, Any] = {}
    for chunk in chunks:
        for part in chunk.choices:
            if (whole := choices.setdefault(part.index, part)) is part:
                continue
            whole.text += part.text
            whole.finish_reason = part.finish_reason or whole.finish_reason
            for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
                getattr(whole.logprobs, name).extend(getattr(part.logprobs, name))
    return [choices[index] for index in sorted(choices)]


def test_end_tokens_can_be_chosen(site: Site, node: RunningNode) -> None:
    ask: dict[str, Any] = {"model": "m", "prompt": PROMPT, "max_tokens": 6, "temperature": 0}
    with node.client(site.base) as client:
        plain = client.completions.create(**ask, logprobs=0, extra_body={"ignore_eos": True})
        assert plain.usage.completion_tokens == 6
        tokenizer = Tokenizer(read_tokenizer_files(site.home / "base-0"))
        with torch.no_grad():
            prompt = torch.tensor([tokenizer.encode(PROMPT)])
            answer = (
                site.models[None]
                .generate(prompt, max_new_tokens=6, do_sample=False, eos_token_id=None)[
                    0, prompt.shape[1] :
                ]
                .tolist()
            )
        stopped = client.completions.create(**ask, extra_body={"stop_token_ids": [answer[2]]})
    assert stopped.choices[0].finish_reason == "stop"
    assert stopped.usage.completion_tokens == answer.index(answer[2]) + 1


def test_a_full_queue_is_429(site: Site, tmp_path: Path) -> None:
    with (
        start(site, tmp_path, node_max_sequences=1, node_max_waiting=1) as node,
        node.client(site.base) as client,
    ):
        client.completions.create(model="m", prompt="a", max_tokens=2)
        go_on = hold(node)
        with client.completions.create(
            model="m", prompt="a", n=2, max_tokens=2, stream=True
        ) as running:
            with pytest.raises(openai.RateLimitError) as caught:
                client.completions.create(model="m", prompt="a")
            go_on.set()
            assert len({choice.index for chunk in running for choice in chunk.choices}) == 2
        assert caught.value.code == "overloaded"
        assert int(caught.value.response.headers["Retry-After"]) > 0
        assert client.completions.create(model="m", prompt="a", max_tokens=2).choices
        with pytest.raises(openai.BadRequestError, match="at most 2"):
            client.completions.create(model="m", prompt="a", n=3)


@pytest.mark.parametrize("stream", [True, False])
def test_a_disconnected_clients_sequences_are_cancelled(
    site: Site, node: RunningNode, stream: bool
) -> None:
    async def leave() -> None:
        engine, go_on = node.node.base.engine, hold(node)

        async def commands(count: int) -> None:
            while engine._inbox.qsize() < count:
                await asyncio.sleep(0.01)

        async with httpx.AsyncClient(base_url=node.url) as client:
            body = {"model": "m", "prompt": "a", "max_tokens": 110, "n": 8, "stream": stream}
            headers = {"Deltadock-Base": site.base, "Deltadock-Artifact": site.artifacts[0]}
            asking = asyncio.create_task(
                client.post("/v1/completions", json=body, headers=headers, timeout=30)
            )
            await commands(8)
            asking.cancel()
            await asyncio.wait({asking})
            await commands(16)
            go_on.set()
            while node.node.base.users:
                await asyncio.sleep(0.01)

    with node.client(site.base) as client:
        client.completions.create(model="m", prompt="a", max_tokens=1)
    cancelled = node.node.metrics.sequences.labels("cancelled")
    before = cancelled._value.get()
    asyncio.run(asyncio.wait_for(leave(), 30))
    assert cancelled._value.get() == before + 8


def test_a_base_is_freed_before_the_next_is_loaded(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Memory may not hold two bases at once."""
    with start(site, tmp_path, node_merge=True) as node:
        with node.client(site.base, site.artifacts[0]) as client:
            client.completions.create(model="m", prompt="a", max_tokens=1)
        old = weakref.ref(node.node.base.model)
        collected: list[object] = []
        load = node.node._turns._load

        def look(*arguments: Any) -> Any:
            collected.append(old())
            return load(*arguments)

        monkeypatch.setattr(node.node._turns, "_load", look)
        with node.client(site.other_base) as client:
            client.completions.create(model="m", prompt="a", max_tokens=1)
    assert collected == [None]


def test_health(site: Site, node: RunningNode) -> None:
    with node.client(site.base) as client:
        client.completions.create(model="m", prompt="a", max_tokens=1)
    assert httpx.get(f"{node.url}/healthz").json() == {"status": "ok"}
    assert httpx.get(f"{node.url}/readyz").json() == {"status": "ok", "base": site.base}


def test_metrics(site: Site, tmp_path: Path) -> None:
    with start(site, tmp_path, node_max_deltas=1, node_max_sequences=4) as node:
        before = read_metrics(node)
        assert "deltadock_node_running_sequences" not in before, "no base is loaded yet"
        prompt = "the same beginning of a prompt"
        for artifact in (*site.artifacts, site.artifacts[1]):
            with node.client(site.base, artifact) as client:
                answer = client.completions.create(
                    model="m", prompt=prompt, max_tokens=6, temperature=0, logprobs=1
                )
        with node.client(site.base, "0" * 64) as client, pytest.raises(openai.NotFoundError):
            client.completions.create(model="m", prompt="a")
        metrics = read_metrics(node)
    generated = len(answer.choices[0].logprobs.tokens)
    in_slot = site.artifacts[1]
    size = (site.home / "delta-2").stat().st_size
    expected = {
        'requests_total{outcome="ok"}': 3,
        'requests_total{outcome="not_found"}': 1,
        "first_token_seconds_count": 3,
        'load_seconds_count{tier="host"}': 3,  # one of them failed
        'load_seconds_count{tier="device"}': 2,
        "running_sequences": 0,
        "waiting_sequences": 0,
        "batch_occupancy": 0,
        "draining": 0,
        'deltas{tier="device"}': 1,
        'deltas{tier="host"}': 2,
        'deltas{tier="disk"}': 2,
        'tier_evictions_total{tier="device"}': 1,
        'tier_hits_total{tier="device"}': 1,
        'tier_misses_total{tier="disk"}': 2,
        f'resident_references{{artifact="{in_slot}"}}': 0,
        "prompt_tokens_total": 3 * len(prompt),
    }
    assert {name: metrics.get(f"deltadock_node_{name}") for name in expected} == expected
    assert metrics['deltadock_node_delta_bytes{tier="disk"}'] >= 2 * size - 4096
    assert metrics["deltadock_node_generated_tokens_total"] >= generated
    assert metrics["deltadock_node_inter_token_seconds_count"] >= generated - 1
    assert metrics["deltadock_node_prefix_tokens_total"] == len(prompt) - 1, "a cached prefix"
    assert sum(name.startswith("deltadock_node_resident_references") for name in metrics) == 1


def test_tenants_of_one_base_share_no_prefix(site: Site, node: RunningNode) -> None:
    """Else the time to a first token would tell what another tenant has sent."""
    seen = []
    body = {"model": "m", "prompt": "the beginning of a secret prompt", "max_tokens": 1}
    for tenant in ("ten_a", "ten_b", "ten_a"):
        before = read_metrics(node).get("deltadock_node_prefix_tokens_total", 0)  # no base yet
        headers = {"Deltadock-Base": site.base, "Deltadock-Tenant": tenant}
        httpx.post(f"{node.url}/v1/completions", json=body, headers=headers, timeout=60)
        seen.append(read_metrics(node)["deltadock_node_prefix_tokens_total"] - before)
    assert seen[:2] == [0, 0]
    assert seen[2] > 0


def read_metrics(node: RunningNode) -> dict[str, float]:
    """Metric values by name and labels."""
    text = httpx.get(f"{node.url}/metrics").text
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines)}
