"""Node registration, routing and failover."""

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import Any

import httpx
import pytest
from pydantic import SecretStr
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from deltadock.api.fleet import NodeView, rank
from deltadock.api.generation.forward import POLL_SECONDS
from deltadock.errors import Unauthorized
from deltadock.model_target import ModelTarget
from deltadock.storage.tables import NodeRow, NodeSampleRow, Scope
from deltadock.trust import check_trusted, credentials
from tests.api.support import Api, StandInNode, bearer, issue_key, serving
from tests.waiting import wait_until

BASE, OTHER, ARTIFACT = "b" * 64, "c" * 64, "a" * 64


def view(name: str, **fields: Any) -> NodeView:
    return NodeView(
        **{
            "id": name, "url": f"http://{name}", "base_digest": BASE, "adopts": False,
            "draining": False, "capacity": 10, "admitted": 0, "context_tokens": None,
            "lives_seconds": 10.0, "tiers": {},
            **fields,
        }
    )  # fmt: skip


@pytest.mark.parametrize(
    ("nodes", "sent", "expected"),
    [
        # The delta's tier outranks load, unless the node is full.
        ([view("idle"), view("disk", tiers={ARTIFACT: "disk"}, admitted=5),
          view("host", tiers={ARTIFACT: "host"}, admitted=8),
          view("slot", tiers={ARTIFACT: "device"}, admitted=9)], {},
         ["slot", "host", "disk", "idle"]),
        ([view("full", tiers={ARTIFACT: "device"}, admitted=10), view("idle")], {},
         ["idle", "full"]),
        # Load is relative to capacity; requests sent since the last heartbeat count.
        ([view("small", capacity=2, admitted=1), view("large", admitted=3)], {},
         ["large", "small"]),
        ([view("a"), view("b")], {"a": 1}, ["b", "a"]),
        # A loaded base is not adopted elsewhere; otherwise empty nodes come first.
        ([view("empty", base_digest=None, adopts=True), view("has", admitted=9)], {}, ["has"]),
        ([view("changes", base_digest=OTHER, adopts=True), view("fixed", base_digest=OTHER),
          view("empty", base_digest=None, adopts=True, admitted=3)], {}, ["empty", "changes"]),
        ([view("leaving", draining=True)], {}, []),
    ],
)  # fmt: skip
def test_routing_order(nodes: list[NodeView], sent: dict[str, int], expected: list[str]) -> None:
    for order in (nodes, nodes[::-1]):
        assert [node.id for node in rank(order, ModelTarget(BASE, ARTIFACT), sent)] == expected


def test_base_requests_go_to_the_least_loaded_node() -> None:
    nodes = [view("slot", tiers={ARTIFACT: "device"}, admitted=2), view("idle")]
    assert [node.id for node in rank(nodes, ModelTarget(BASE, None), {})] == ["idle", "slot"]


def test_only_the_secret_or_this_machine_is_trusted() -> None:
    secret = SecretStr("s3cret")
    check_trusted(secret, credentials(secret)["Authorization"], "192.0.2.1")
    for wrong in (None, "", "Bearer", "Bearer other", "s3cret", "Bearer s3crét"):
        with pytest.raises(Unauthorized, match="bearer"):
            check_trusted(secret, wrong, "127.0.0.1")
    for own in ("127.0.0.1", "::1", None):
        check_trusted(None, None, own)
    for foreign in ("192.0.2.1", "10.0.0.1", "testclient"):
        with pytest.raises(Unauthorized, match="DELTADOCK_NODE_SECRET"):
            check_trusted(None, None, foreign)


def test_a_node_registers_reports_and_deregisters(api: Api) -> None:
    assert api.client.get("/v1/nodes").json() == {"data": []}
    delta = api.delta()
    artifact, base = api.make_ready(delta), delta["base"]["checkpoint"]
    held = {"digest": artifact, "tier": "device", "bytes": 8, "references": 2, "pinned": True}
    api.register("http://10.0.0.7:8100/", base=base, admitted=3, deltas=[held])
    [node] = api.client.get("/v1/nodes").json()["data"]
    assert (node["url"], node["state"], node["base_name"]) == (
        "http://10.0.0.7:8100", "ready", "tiny",
    )  # fmt: skip
    assert (node["capacity"], node["admitted"]) == (8, 3)
    [found] = node["deltas"]
    assert (found["deltas"], found["names"]) == ([delta["id"]], ["maths/skills:1"])
    assert (found["tier"], found["references"], found["pinned"]) == ("device", 2, True)

    api.register("http://10.0.0.7:8100", draining=True)
    [again] = api.client.get("/v1/nodes").json()["data"]
    assert (again["id"], again["state"], again["base"]) == (node["id"], "draining", None)
    assert again["started_at"] == node["started_at"]
    api.register("http://10.0.0.7:8100", node="node_b")
    assert [n["id"] for n in api.client.get("/v1/nodes").json()["data"]] == ["node_b"]
    assert api.client.delete("/v1/nodes/node_b").status_code == 204
    assert api.client.delete("/v1/nodes/node_b").status_code == 204
    assert api.client.get("/v1/nodes").json() == {"data": []}


def test_an_operator_drains_resumes_and_evicts(api: Api) -> None:
    node = StandInNode()
    drain, evict = "/v1/nodes/node_a/drain", f"/v1/nodes/node_a/deltas/{ARTIFACT}"
    with serving(node.app()) as url:
        api.register(url)
        for method, path in (
            ("POST", drain),
            ("POST", "/v1/nodes/node_a/resume"),
            ("DELETE", evict),
        ):
            assert api.client.request(method, path).status_code == 204
        assert [request["path"] for request in node.requests] == [
            "/v1/drain", "/v1/resume", f"/v1/deltas/{ARTIFACT}/unload",
        ]  # fmt: skip
        node.answer = JSONResponse({"code": "conflict", "detail": "It is pinned."}, 409)
        refused = api.client.delete(evict).json()
        assert (refused["code"], refused["detail"]) == ("conflict", "It is pinned.")
        other = bearer(issue_key(api.resources.settings, scopes=[Scope.READ]))
        assert api.client.post(drain, headers=other).status_code == 403
    assert api.client.post(drain).status_code == 503, "the node is gone"
    assert api.client.post("/v1/nodes/node_z/drain").status_code == 404


def test_the_last_hour_of_a_node_is_kept(api: Api) -> None:
    usage = {"tokens_per_second": 12.5, "inter_token_seconds": 0.02, "memory_bytes": 10**9}
    held = [{"digest": ARTIFACT, "tier": "host", "bytes": 8}]
    assert api.client.get("/v1/nodes/node_a/samples").status_code == 404
    api.register("http://10.0.0.7:8100", usage=usage, deltas=held, admitted=2)
    api.register("http://10.0.0.7:8100", usage=usage)  # too soon for another sample
    [node] = api.client.get("/v1/nodes").json()["data"]
    assert node["usage"] == usage | {"first_token_seconds": None, "memory_limit": None}
    [sample] = api.client.get("/v1/nodes/node_a/samples").json()["data"]
    assert (sample["admitted"], sample["device"], sample["host"]) == (2, 0, 1)
    assert sample["tokens_per_second"] == 12.5
    with api.resources.database.session_scope() as session:
        for row in session.query(NodeSampleRow):
            row.at -= timedelta(minutes=61)
        for row in session.query(NodeRow):
            row.sampled_at -= timedelta(minutes=61)
    api.register("http://10.0.0.7:8100", usage=usage, admitted=5)
    [sample] = api.client.get("/v1/nodes/node_a/samples").json()["data"]
    assert sample["admitted"] == 5


def test_a_registration_expires_without_heartbeats(api: Api) -> None:
    api.register("http://10.0.0.7:8100", lives_seconds=3)
    assert len(api.client.get("/v1/nodes").json()["data"]) == 1
    wait_until(lambda: not api.client.get("/v1/nodes").json()["data"])
    api.client.post("/v1/bases", json={"name": "tiny", "checkpoint": api.base()})
    answer = api.client.post("/v1/completions", json={"model": "tiny", "prompt": "x"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "unavailable")


@pytest.mark.parametrize(
    "wrong",
    [
        {"url": "file:///etc/passwd"}, {"url": "10.0.0.7:8100"}, {"base": "tiny"},
        {"capacity": 0}, {"lives_seconds": 0}, {"unknown": 1},
        {"deltas": [{"digest": "a", "tier": "device", "bytes": 1}]},
        {"deltas": [{"digest": ARTIFACT, "tier": "moon", "bytes": 1}]},
    ],
)  # fmt: skip
def test_invalid_registrations_are_rejected(api: Api, wrong: dict[str, Any]) -> None:
    good = {"url": "http://a", "capacity": 1, "admitted": 0, "delta_slots": 1, "lives_seconds": 9}
    answer = api.client.put("/v1/nodes/node_a", json=good | wrong)
    assert (answer.status_code, answer.json()["code"]) == (422, "invalid_input")
    assert api.client.put("/v1/nodes/node_a", json=good).status_code == 204


class TestWithSecret:
    @pytest.fixture
    def settings_fields(self) -> dict[str, Any]:
        return {"node_secret": "s3cret"}

    def test_registration_and_requests_to_nodes_need_the_secret(
        self, api: Api, node: StandInNode, node_url: str
    ) -> None:
        for headers in ({}, bearer("other")):
            for method in ("PUT", "DELETE"):
                answer = api.client.request(
                    method, "/v1/nodes/node_a", json={"url": node_url}, headers=headers
                )
                assert (answer.status_code, answer.json()["code"]) == (401, "unauthorized")
        mine = bearer(api.key)
        api.client.headers.update(bearer("s3cret"))
        api.register(node_url)
        api.client.headers.update(mine)
        assert len(api.client.get("/v1/nodes").json()["data"]) == 1
        api.base()
        ask = {"model": "tiny", "prompt": "x"}
        assert api.client.post("/v1/completions", json=ask, headers=mine).status_code == 200
        assert node.requests[-1]["headers"]["authorization"] == "Bearer s3cret"


@pytest.fixture
def second() -> Iterator[tuple[StandInNode, str]]:
    node = StandInNode()
    with serving(node.app()) as url:
        yield node, url


ASK = {"model": "tiny", "prompt": "x"}


@pytest.mark.parametrize("status", [429, 503])
def test_a_busy_node_is_skipped(
    api: Api, node: StandInNode, node_url: str, second: tuple[StandInNode, str], status: int
) -> None:
    base = api.base()
    other, other_url = second
    refusal = {"error": {"message": "no", "type": "x", "param": None, "code": "busy"}}
    node.answer = JSONResponse(refusal, status, {"Retry-After": "7"})
    api.register(node_url, "node_a", base=base)
    api.register(other_url, "node_b", base=base, admitted=1)
    assert api.client.post("/v1/completions", json=ASK).status_code == 200
    assert (len(node.requests), len(other.requests)) == (1, 1)
    other.answer = JSONResponse({}, 429)
    answer = api.client.post("/v1/completions", json=ASK)
    assert (answer.status_code, answer.json()) == (status, refusal), "the response of the best node"
    assert answer.headers["retry-after"] == "7"


def test_a_node_with_another_secret_is_skipped(api: Api, node: StandInNode, node_url: str) -> None:
    api.register(node_url, base=api.base())
    node.answer = JSONResponse({"error": {"code": "unauthorized"}}, 401)
    answer = api.client.post("/v1/completions", json=ASK)
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "unavailable")


def test_a_draining_node_that_could_serve_is_named(api: Api, node_url: str) -> None:
    def refusal() -> str:
        answer = api.client.post("/v1/completions", json=ASK)
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "unavailable")
        return str(answer.json()["error"]["message"])

    base = api.base()
    api.register(node_url, "node_other", base="f" * 64, adopts=False, draining=True)
    assert "No inference node serves the base tiny. Start one" in refusal()
    for fields in ({"base": base, "adopts": False}, {"base": None, "adopts": True}):
        api.register(node_url, "node_a", **fields, draining=True)
        assert "node_a is draining" in (message := refusal())
        assert "deltadock resume node_a" in message


def test_a_full_disk_is_named_in_place_of_the_nodes_whose_heartbeats_it_loses(
    api: Api, monkeypatch: pytest.MonkeyPatch
) -> None:
    api.base()
    monkeypatch.setattr(api.resources.database, "_full_at", time.monotonic())
    answer = api.client.post("/v1/completions", json=ASK)
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "unavailable")
    assert "The database's disk is full. Free space there" in answer.json()["error"]["message"]
    answer = api.client.get("/readyz")
    assert (answer.status_code, answer.json()["checks"]["database"]) == (503, "full")
    monkeypatch.undo()
    assert api.client.get("/readyz").status_code == 200


def test_a_dead_node_is_skipped_and_deregistered(
    api: Api, node: StandInNode, node_url: str
) -> None:
    base = api.base()
    api.register("http://127.0.0.1:1", "node_dead", base=base)
    api.register(node_url, "node_a", base=base, admitted=1)
    assert api.client.post("/v1/completions", json=ASK).status_code == 200
    assert [n["id"] for n in api.client.get("/v1/nodes").json()["data"]] == ["node_a"]


def test_when_the_last_node_with_the_base_dies_another_adopts_it(
    api: Api, node: StandInNode, node_url: str
) -> None:
    api.register("http://127.0.0.1:1", "node_dead", base=api.base())
    api.register(node_url, "node_a", base=None)
    assert api.client.post("/v1/completions", json=ASK).status_code == 200
    assert len(node.requests) == 1


def test_a_request_is_retried_on_one_other_node_only(
    api: Api, node: StandInNode, node_url: str
) -> None:
    base = api.base()
    for number in (1, 2):
        api.register(f"http://127.0.0.1:{number}", f"node_{number}", base=base)
    api.register(node_url, "node_a", base=base, admitted=1)
    assert api.client.post("/v1/completions", json=ASK).status_code == 503
    assert node.requests == []


def test_a_node_that_stops_responding_is_replaced(
    api: Api, node: StandInNode, node_url: str, second: tuple[StandInNode, str]
) -> None:
    base = api.base()
    other, other_url = second
    node.gate = threading.Event()
    api.register(node_url, "node_a", base=base, lives_seconds=4)
    api.register(other_url, "node_b", base=base, admitted=1)
    answer = api.client.post("/v1/completions", json=ASK, timeout=30)
    assert answer.status_code == 200
    assert node.gate.is_set()
    assert len(other.requests) == 1
    assert node.gone.wait(10), "the first node's request is cancelled"


def test_a_request_goes_on_while_its_node_registers_again_with_a_heartbeat(api: Api) -> None:
    asked, release = threading.Event(), threading.Event()
    prompts = []

    async def complete(request: Request) -> Response:
        prompts.append((await request.json())["prompt"])
        asked.set()
        await run_in_threadpool(release.wait, 60)
        return JSONResponse({"text": "late"})

    app = Starlette(routes=[Route("/v1/completions", complete, methods=["POST"])])
    with serving(app) as url, ThreadPoolExecutor() as threads:
        api.register(url, base=api.base())
        answer = threads.submit(api.client.post, "/v1/completions", json=ASK, timeout=60)
        assert asked.wait(30)
        # As another request does whose connection breaks.
        assert api.client.delete("/v1/nodes/node_a").status_code == 204
        wait_until(lambda: not api.resources.fleet._nodes)
        time.sleep(2 * POLL_SECONDS)  # it is noticed
        api.register(url)
        release.set()
        assert (answer.result(60).status_code, prompts) == (200, ["x"])
    assert api.resources.http.timeout.read is None, "an answer may take any time"


def test_a_request_counts_as_load_until_its_response_ends(
    api: Api, node: StandInNode, node_url: str
) -> None:
    base = api.base()
    api.register(node_url, base=base)
    fleet = api.resources.fleet
    api.client.post("/v1/completions", json=ASK)
    api.client.post("/v1/completions", json=ASK | {"stream": True})
    wait_until(lambda: not fleet._sent)
    node.gate = threading.Event()
    with pytest.raises(httpx.ReadTimeout):
        api.client.post("/v1/completions", json=ASK, timeout=httpx.Timeout(10, read=0.5))
    assert node.gone.wait(10)
    wait_until(lambda: not fleet._sent)
