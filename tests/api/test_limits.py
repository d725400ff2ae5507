"""Quotas and rates of tenants."""

import contextlib
import json
import threading
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import anyio
import httpx
import pytest
from starlette.responses import JSONResponse, Response, StreamingResponse

from deltadock.api.access import rates
from deltadock.client.blocking import Client
from deltadock.errors import QuotaExceeded
from deltadock.openai.fields import PROMPT_TOKENS_HEADER
from tests.api.support import CONFIG, Api, StandInNode, bearer, issue_key, sha256, weights
from tests.client.support import write_finetune
from tests.waiting import wait_until


@pytest.fixture
def tenant(api: Api) -> Iterator[Api]:
    """The api as a tenant without limits uses it."""
    acme = api.client.post("/v1/tenants", json={"name": "acme"}).json()
    assert set(acme["limits"].values()) == {None}
    headers = bearer(issue_key(api.resources.settings, tenant=acme["id"]))
    with httpx.Client(base_url=api.client.base_url, timeout=30, headers=headers) as client:
        yield Api(client, api.resources)


def limit(api: Api, **limits: int | None) -> None:
    answer = api.client.patch("/v1/tenants/acme", json=limits)
    assert answer.status_code == 200, answer.text


def refused(answer: httpx.Response, status: int, code: str) -> None:
    assert (answer.status_code, answer.json()["code"]) == (status, code), answer.text


def test_bytes_are_checked_when_announced_and_while_they_arrive(api: Api, tenant: Api) -> None:
    limit(api, max_bytes=10_000)
    upload = tenant.open_upload()
    refused(tenant.put(upload, "tokenizer.json", bytes(10_001)), 403, "quota_exceeded")

    def endless() -> Iterator[bytes]:
        for _ in range(20):
            yield bytes(1000)

    path = f"/v1/uploads/{upload}/files/tokenizer.json"
    refused(tenant.client.put(path, content=endless()), 403, "quota_exceeded")
    assert api.staged() == []
    assert tenant.put(upload, "tokenizer.json", bytes(9_000)).status_code == 200
    file = {"path": "config.json", "size": 2_000, "sha256": "a" * 64}
    body = {"kind": "checkpoint", "files": [file]}
    announced = tenant.client.post("/v1/uploads", json=body)
    refused(announced, 403, "quota_exceeded")
    assert announced.json()["detail"].startswith(
        "Your tenant may store 10.0 kB and has 9.00 kB: there is no room for 2.00 kB more."
    )
    assert tenant.client.get("/v1/tenants/acme").json()["usage"]["bytes"] == 9_000
    tenant.client.delete(f"/v1/uploads/{upload}")
    assert tenant.client.post("/v1/uploads", json=body).status_code == 201
    limit(api, max_bytes=None)
    assert tenant.checkpoint(weights(7, rows=1000))


def test_files_that_arrive_at_once_are_within_the_quota_together(api: Api, tenant: Api) -> None:
    limit(api, max_bytes=4 << 20)
    data = bytes(3 << 20)
    begun, leave = threading.Event(), threading.Event()

    def stalled() -> Iterator[bytes]:
        yield data[:-1]
        begun.set()
        leave.wait(30)

    def whole() -> Iterator[bytes]:
        yield data  # of unknown length, so that it is refused as its bytes arrive

    path = f"/v1/uploads/{tenant.open_upload()}/files/"
    answers: list[httpx.Response] = []

    def send_slowly() -> None:
        answers.append(tenant.client.put(f"{path}added_tokens.json", content=stalled()))

    sender = threading.Thread(target=send_slowly)
    sender.start()
    assert begun.wait(30)
    wait_until(lambda: tenant.resources.arrivals.staged(tenant_id(tenant)) > 2 << 20)
    for content in (data, whole()):
        refusal = tenant.client.put(f"{path}tokenizer.json", content=content)
        refused(refusal, 403, "quota_exceeded")
    assert len(api.staged()) == 1
    leave.set()
    sender.join()
    assert answers[0].status_code == 200
    assert tenant.resources.arrivals.staged(tenant_id(tenant)) == 0
    tenant.client.delete(path.removesuffix("/files/")).raise_for_status()
    assert tenant.put(tenant.open_upload(), "tokenizer.json", data).status_code == 200


def test_announced_files_that_arrive_at_once_count_once(api: Api, tenant: Api) -> None:
    limit(api, max_bytes=7 << 20)
    data = bytes(3 << 20)
    paths = ["added_tokens.json", "tokenizer.json"]
    files = [{"path": path, "size": len(data), "sha256": sha256(data)} for path in paths]
    body = {"kind": "checkpoint", "files": files}
    upload = tenant.client.post("/v1/uploads", json=body).json()["id"]
    staging = api.resources.settings.blob_folder / "staging"
    begun, leave = threading.Event(), threading.Event()

    def stalled() -> Iterator[bytes]:
        yield data[:-1]
        begun.set()
        leave.wait(30)
        yield data[-1:]

    def put(path: str, content: bytes | Iterator[bytes]) -> httpx.Response:
        return tenant.client.put(f"/v1/uploads/{upload}/files/{path}", content=content)

    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(put, paths[0], stalled())
        assert begun.wait(30)
        wait_until(lambda: sum(file.stat().st_size for file in staging.iterdir()) > 1 << 20)
        again = put(paths[0], data)
        second = put(paths[1], data)
        leave.set()
    refused(again, 403, "quota_exceeded")
    assert second.status_code == first.result().status_code == 200, second.text
    assert tenant.resources.arrivals.staged(tenant_id(tenant)) == 0


def tenant_id(tenant: Api) -> str:
    acme: str = tenant.client.get("/v1/tenants/acme").json()["id"]
    return acme


def test_equal_announced_files_take_no_more_disk_than_the_quota(api: Api, tenant: Api) -> None:
    limit(api, max_bytes=70 << 20)
    file = {"size": 32 << 20, "sha256": "a" * 64}
    paths = [f"model-{number}.safetensors" for number in (1, 2, 3)]

    def announce(paths: list[str]) -> httpx.Response:
        body = {"kind": "checkpoint", "files": [{"path": path, **file} for path in paths]}
        return tenant.client.post("/v1/uploads", json=body)

    refused(announce(paths), 403, "quota_exceeded")
    upload = announce(paths[:2]).json()["id"]
    refused(announce(paths[:1]), 403, "quota_exceeded")
    for path in paths[:2]:
        parts = tenant.client.get(f"/v1/uploads/{upload}/files/{path}/parts")
        assert parts.status_code == 200, parts.text
    assert tenant.client.get("/v1/tenants/acme").json()["usage"]["bytes"] == 64 << 20


def test_deltas_and_jobs_at_once(api: Api, tenant: Api) -> None:
    limit(api, max_deltas=2, max_jobs=1)
    body = tenant.delta_body()
    first = tenant.client.post("/v1/deltas", json=body).json()["delta"]
    assert tenant.client.post("/v1/deltas", json=body).status_code == 200, "a repeated request"
    second = tenant.client.post("/v1/deltas", json={**body, "seed": 5})
    refused(second, 429, "rate_limited")
    assert second.headers["retry-after"] == "300"
    assert "may run 1 job at once" in second.json()["detail"]
    assert tenant.client.post(f"/v1/jobs/{first['job']}/cancel").json()["state"] == "cancelled"
    assert tenant.client.post("/v1/deltas", json={**body, "seed": 5}).status_code == 202
    refused(tenant.client.post(f"/v1/jobs/{first['job']}/retry"), 429, "rate_limited")
    third = tenant.client.post("/v1/deltas", json={**body, "seed": 6})
    refused(third, 403, "quota_exceeded")
    assert "may have 2 deltas and has 2." in third.json()["detail"]
    usage = tenant.client.get("/v1/tenants/acme").json()["usage"]
    assert (usage["deltas"], usage["jobs"]) == (2, 1)
    assert api.delta(), "another tenant's limits do not count"


def test_an_upload_for_a_delta_is_refused_at_its_start_as_the_delta_would_be(
    api: Api, tenant: Api, tmp_path: Path
) -> None:
    source = f"file://{write_finetune(tmp_path / 'tuned')}"
    tenant.resources.settings.import_sources.append(source)
    new = {"path": "model.safetensors", "size": 1 << 30, "sha256": "a" * 64}
    stored = {"path": "config.json", "size": len(CONFIG), "sha256": sha256(CONFIG)}

    def announce(**fields: Any) -> httpx.Response:
        body = {"kind": "checkpoint", "delta": "maths/skills", **fields}
        return tenant.client.post("/v1/uploads", json=body)

    tenant.delta(name="maths/skills")
    limit(api, max_jobs=1)
    full = announce(files=[new, stored])
    refused(full, 429, "rate_limited")
    assert full.headers["retry-after"] == "300"
    limit(api, max_jobs=2, max_deltas=1)
    full = announce(files=[new, stored])
    refused(full, 403, "quota_exceeded")
    assert "may have 1 delta and has 1." in full.json()["detail"]
    refused(announce(source=source), 403, "quota_exceeded")
    refused(announce(), 403, "quota_exceeded")
    assert announce(files=[stored]).status_code == 201, "nothing needs to be sent"
    assert announce(files=[new], delta=None).status_code == 201, "such as a base"
    limit(api, max_deltas=None)
    assert announce(files=[new, stored]).status_code == 201
    tenant.client.delete("/v1/registry/maths/skills").raise_for_status()
    refused(announce(files=[new]), 409, "conflict")


def test_a_push_that_would_be_refused_sends_nothing(api: Api, tenant: Api, tmp_path: Path) -> None:
    tenant.delta()
    limit(api, max_deltas=1)
    folder = write_finetune(tmp_path / "tuned", seed=7)
    before = tenant.blobs()
    with Client(str(tenant.client.base_url), tenant.key) as client, pytest.raises(QuotaExceeded):
        client.push(folder, "maths/other", "tiny")
    assert tenant.blobs() == before
    limit(api, max_deltas=None)
    with Client(str(tenant.client.base_url), tenant.key) as client:
        assert client.push(folder, "maths/other", "tiny").delta.version == 1


def test_a_push_that_needs_no_new_delta_is_not_refused_at_its_start(
    api: Api, tenant: Api, tmp_path: Path
) -> None:
    folder, other = (write_finetune(tmp_path / str(seed), seed=seed) for seed in (7, 8))
    digest = sha256((folder / "model.safetensors").read_bytes())
    tenant.base()

    def lose_weights() -> None:
        """As after damage, or when the fine-tune was dropped and collected."""
        api.resources.blobs.delete(digest)

    with Client(str(tenant.client.base_url), tenant.key) as client:
        first = client.push(folder, "maths/skills", "tiny")
        limit(api, max_deltas=1, max_jobs=1)
        lose_weights()
        assert client.push(folder, "maths/skills", "tiny").delta.id == first.delta.id
        client.cancel(first.job.id)
        lose_weights()
        again = client.push(folder, "maths/skills", "tiny").delta
        assert (again.id, again.state) == (first.delta.id, "queued"), "its job goes on"
        assert api.resources.blobs.is_intact(digest)
        lose_weights()
        for tuned, name in ((folder, "maths/copy"), (other, "maths/skills")):
            with pytest.raises(QuotaExceeded):
                client.push(tuned, name, "tiny")

        tenant.make_ready({"id": first.delta.id, "job": first.job.id})
        limit(api, max_deltas=4)
        tenant.delta(name="maths/running", seed=9)
        assert client.push(folder, "maths/copy", "tiny").delta.state == "ready", "without a job"
    new = {"path": "model.safetensors", "size": 1 << 30, "sha256": "a" * 64}
    body = {"kind": "checkpoint", "delta": "maths/skills", "files": [new]}
    refused(tenant.client.post("/v1/uploads", json=body), 429, "rate_limited")


def test_an_import_that_needs_no_new_delta_is_not_refused_at_its_start(
    api: Api, tenant: Api, tmp_path: Path
) -> None:
    folder = write_finetune(tmp_path / "tuned")
    body = {"kind": "checkpoint", "source": f"file://{folder}", "delta": "maths/skills"}
    tenant.resources.settings.import_sources.append(body["source"])
    tenant.base()
    upload = tenant.client.post("/v1/uploads", json=body).json()["id"]
    wait_until(lambda: tenant.client.get(f"/v1/uploads/{upload}").json()["state"] == "complete")
    with Client(str(tenant.client.base_url), tenant.key) as client:
        client.push(folder, "maths/skills", "tiny")
    limit(api, max_deltas=1, max_jobs=1)
    assert tenant.client.post("/v1/uploads", json=body).status_code == 201
    copy = tenant.client.post("/v1/uploads", json={**body, "delta": "maths/copy"})
    refused(copy, 403, "quota_exceeded")


def test_requests_a_minute(api: Api, tenant: Api) -> None:
    assert "ratelimit" not in tenant.client.get("/v1/bases").headers
    limit(api, requests_per_minute=3)
    seen = [tenant.client.get("/v1/bases") for _ in range(5)]
    assert [answer.status_code for answer in seen] == [200, 200, 200, 429, 429]
    assert seen[0].headers["ratelimit-policy"] == '"requests";q=3;w=60'
    assert [a.headers["ratelimit"].split(";")[1] for a in seen[:4]] == ["r=2", "r=1", "r=0", "r=0"]
    assert 1 <= int(seen[3].headers["retry-after"]) <= 60
    refused(seen[3], 429, "rate_limited")
    openai = tenant.client.post("/v1/completions", json={"model": "x", "prompt": "y"})
    assert openai.json()["error"]["type"] == "rate_limit_error"
    assert api.client.get("/v1/bases").status_code == 200
    assert httpx.get(f"{api.client.base_url}/healthz").status_code == 200


class TestTokens:
    @pytest.fixture(autouse=True)
    def serving_tenant(self, api: Api, tenant: Api, node: StandInNode, node_url: str) -> None:
        api.register(node_url, base=tenant.base())
        limit(api, tokens_per_minute=20)

    ASK: ClassVar = {"model": "tiny", "prompt": "x"}

    def left(self, tenant: Api) -> int:
        """Asks once more; how many tokens were left before."""
        answer = tenant.client.post("/v1/bases/tiny/generate", json={"prompt": "x"})
        return self.told(answer)

    def left_without_asking(self, tenant: Api) -> int:
        answer = tenant.client.post("/v1/completions", json={**self.ASK, "model": "none"})
        assert answer.status_code in {404, 429}
        return self.told(answer)

    @staticmethod
    def told(answer: httpx.Response) -> int:
        assert answer.headers["ratelimit-policy"] == '"tokens";q=20;w=60'
        return int(answer.headers["ratelimit"].split(";")[1].removeprefix("r="))

    def test_tokens_are_charged_as_the_node_reports_them(self, tenant: Api) -> None:
        assert tenant.client.post("/v1/completions", json=self.ASK).status_code == 200
        assert self.left(tenant) == 12
        assert self.left(tenant) == 4, "8 tokens an answer"
        answer = tenant.client.post("/v1/completions", json=self.ASK)
        assert (answer.status_code, answer.json()["error"]["code"]) == (429, "rate_limited")
        assert int(answer.headers["retry-after"]) > 5, "nothing of it is given back"

    def test_errors_cost_nothing(self, tenant: Api, node: StandInNode) -> None:
        node.answer = JSONResponse({"error": {"message": "No.", "code": "x"}}, 400)
        tenant.client.post("/v1/completions", json=self.ASK)
        node.answer = None
        assert self.left(tenant) == 20

    @pytest.mark.parametrize("route", ["/v1/completions", "/v1/bases/tiny/generate"])
    def test_an_answer_whose_client_leaves_costs_what_was_made(
        self, tenant: Api, node: StandInNode, route: str
    ) -> None:
        node.gate = threading.Event()
        body = self.ASK if route == "/v1/completions" else {"prompt": "x"}
        with pytest.raises(httpx.ReadTimeout):
            tenant.client.post(route, json=body, timeout=httpx.Timeout(30, read=1))
        assert node.gone.wait(10)
        assert self.left_without_asking(tenant) == 11

    @pytest.mark.parametrize(("who", "chunks"), [("client", 1), ("node", 1)])
    def test_a_broken_off_stream_costs_its_prompt_and_a_token_per_chunk(
        self, tenant: Api, node: StandInNode, who: str, chunks: int
    ) -> None:
        begun = threading.Event()

        async def events() -> AsyncIterator[bytes]:
            for _ in range(chunks):
                yield b'data: {"choices": [{"index": 0, "text": "4"}]}\n\n'
            begun.set()
            if who == "node":
                raise ConnectionError("the node breaks off")
            await anyio.sleep_forever()

        node.answer = StreamingResponse(
            events(), media_type="text/event-stream", headers={PROMPT_TOKENS_HEADER: "5"}
        )
        body = {**self.ASK, "stream": True}
        timeout = httpx.Timeout(30, read=30 if who == "node" else 1)
        with (
            contextlib.suppress(httpx.ReadTimeout),
            tenant.client.stream("POST", "/v1/completions", json=body, timeout=timeout) as answer,
        ):
            answer.read()
        assert begun.is_set()
        wait_until(lambda: self.left_without_asking(tenant) == 15 - chunks)

    def test_a_refused_stream_costs_nothing(self, tenant: Api, node: StandInNode) -> None:
        node.answer = JSONResponse({"error": {"message": "No.", "code": "x"}}, 400)
        tenant.client.post("/v1/completions", json={**self.ASK, "stream": True})
        node.answer = None
        assert self.left(tenant) == 20

    @pytest.mark.parametrize("route", ["/v1/completions", "/v1/bases/tiny/generate"])
    def test_requests_at_once_are_within_the_limit_together(
        self, tenant: Api, node: StandInNode, route: str
    ) -> None:
        self.at_once(tenant, node, route, refused=5)
        assert self.left_without_asking(tenant) == 12, "what it did not take is given back"

    def at_once(self, tenant: Api, node: StandInNode, route: str, *, refused: int) -> None:
        """Ask six times while none is answered: so many are refused, and only for now."""
        go_on = threading.Event()

        class Held(JSONResponse):
            async def __call__(self, *args: Any) -> None:
                while not go_on.is_set():
                    await anyio.sleep(0.02)
                await super().__call__(*args)

        usage = {"prompt_tokens": 5, "completion_tokens": 3, "total_tokens": 8}
        choice = {"index": 0, "text": " 42", "finish_reason": "stop", "logprobs": None}
        node.answer = Held(
            {"id": "c", "created": 1, "model": "tiny", "choices": [choice], "usage": usage}
        )
        ask = self.ASK if route == "/v1/completions" else {"prompt": "x"}
        body = {**ask, "max_tokens": 1024}
        with ThreadPoolExecutor(6) as pool:
            asked = [pool.submit(tenant.client.post, route, json=body) for _ in range(6)]
            try:
                wait_until(lambda: sum(one.done() for one in asked) == refused, 10)
            finally:
                go_on.set()
            answers = [one.result() for one in asked]
        refusals = [answer for answer in answers if answer.status_code == 429]
        assert len(refusals) == refused
        assert {answer.status_code for answer in answers} == {200, 429}
        assert all(int(answer.headers["retry-after"]) <= 5 for answer in refusals)

    def test_no_more_is_reserved_than_a_context_has(
        self, api: Api, tenant: Api, node: StandInNode, node_url: str
    ) -> None:
        api.register(node_url, base=tenant.base(), context_tokens=10)
        self.at_once(tenant, node, "/v1/completions", refused=4)
        assert self.left_without_asking(tenant) == 4

    def test_a_reservation_is_not_given_back_to_a_later_minute(
        self, tenant: Api, node: StandInNode, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(rates, "TTL_ERROR_SECONDS", 60.0)  # its minute is over
        assert tenant.client.post("/v1/completions", json=self.ASK).status_code == 200
        assert self.left_without_asking(tenant) == 0

    @pytest.mark.parametrize("asked", [False, True])
    def test_a_streams_usage_is_counted_and_shown_if_asked_for(
        self, tenant: Api, node: StandInNode, asked: bool
    ) -> None:
        body: dict[str, Any] = {**self.ASK, "stream": True}
        if asked:
            body["stream_options"] = {"include_usage": True}
        with events(tenant, body) as lines:
            shown = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
        assert node.requests[-1]["body"]["stream_options"] == {"include_usage": True}
        assert [bool(chunk.get("usage")) for chunk in shown] == [False, False, *[True] * asked]
        assert "".join(chunk["choices"][0]["text"] for chunk in shown[:2]) == " 42"
        assert self.left(tenant) == 12

    @pytest.mark.parametrize("is_whole", [False, True])
    def test_a_streamed_response_costs_its_usage_or_a_token_per_event(
        self, tenant: Api, node: StandInNode, is_whole: bool
    ) -> None:
        """What a request says of itself, in the events before the answer, is no usage."""
        begun = {"tools": [{"usage": {"total_tokens": 1}}], "usage": None}
        events = [("created", {"response": begun}), ("output_text.delta", {"delta": '"usage"'})]
        if is_whole:
            usage = {"input_tokens": 5, "output_tokens": 3, "total_tokens": 8}
            events.append(("completed", {"response": {**begun, "usage": usage}}))
        sent = b"".join(
            f"event: response.{kind}\ndata: ".encode()
            + json.dumps({"type": f"response.{kind}", **more}).encode()
            + b"\n\n"
            for kind, more in events
        )
        node.answer = Response(
            sent, media_type="text/event-stream", headers={PROMPT_TOKENS_HEADER: "5"}
        )
        body = {"model": "tiny", "input": "x", "stream": True, "max_output_tokens": 3}
        answer = tenant.client.post("/v1/responses", json=body)
        assert (answer.status_code, answer.content) == (200, sent)
        assert "stream_options" not in node.requests[-1]["body"]
        node.answer = None
        assert self.left_without_asking(tenant) == 20 - (8 if is_whole else 6)

    def test_a_whole_answers_usage_is_at_its_end(self, tenant: Api, node: StandInNode) -> None:
        usage = {"input_tokens": 5, "output_tokens": 3, "total_tokens": 8}
        text = '"usage":{"total_tokens": 1}}'
        node.answer = JSONResponse({"output": text, "tools": [usage], "usage": usage})
        body = {"model": "tiny", "input": "x", "max_output_tokens": 3}
        assert tenant.client.post("/v1/responses", json=body).status_code == 200
        node.answer = None
        assert self.left_without_asking(tenant) == 12


@contextmanager
def events(api: Api, body: dict[str, Any]) -> Iterator[list[str]]:
    with api.client.stream("POST", "/v1/completions", json=body) as answer:
        yield list(answer.iter_lines())


class TestRedisDown:
    @pytest.fixture
    def settings_fields(self) -> dict[str, Any]:
        return {"broker_url": "redis://127.0.0.1:1/0"}

    def test_requests_are_not_limited(self, api: Api, tenant: Api) -> None:
        limit(api, requests_per_minute=1)
        assert [tenant.client.get("/v1/bases").status_code for _ in range(3)] == [200, 200, 200]
