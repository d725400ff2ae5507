"""Operator routes and their authorization."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from pydantic import SecretStr

from tests.inference.support import RunningNode, Site, hold, start


@pytest.fixture(scope="module")
def node(site: Site, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningNode]:
    home = tmp_path_factory.mktemp("home")
    with start(site, home, node_base=site.home / "base-0", node_max_deltas=2) as running:
        yield running


@pytest.fixture
def http(node: RunningNode) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=f"{node.url}/v1/deltas", timeout=60) as client:
        yield client


def held(http: httpx.Client) -> dict[str, dict[str, Any]]:
    return {
        delta["digest"]: delta for delta in http.get(str(http.base_url).rstrip("/")).json()["data"]
    }


def test_a_delta_is_loaded_pinned_and_unloaded(
    site: Site, node: RunningNode, http: httpx.Client
) -> None:
    first, second = site.artifacts
    on_disk = http.post(f"/{first}/load", json={"tier": "disk"}).json()
    assert (on_disk["tier"], on_disk["bytes"]) == ("disk", (site.home / "delta-1").stat().st_size)
    assert http.post(f"/{first}/load", json={"tier": "host"}).json()["tier"] == "host"
    assert http.post(f"/{first}/load").json()["tier"] == "device"
    pinned = http.post(f"/{first}/pin").json()
    assert (pinned["tier"], pinned["pinned"], pinned["references"]) == ("device", True, 0)
    assert list(held(http)) == [first]
    for url in (f"/{first}/unload", f"/{second}/pin"):
        refused = http.post(url)
        assert (refused.status_code, refused.json()["code"]) == (409, "conflict")
    assert http.post(f"/{first}/unpin").json()["pinned"] is False
    assert http.post(f"/{first}/unload").status_code == 204
    assert held(http)[first]["tier"] == "disk"
    assert http.post(f"/{first}/unload").status_code == 404, "it is in no memory"


def test_a_delta_in_use_is_not_unloaded(site: Site, node: RunningNode, http: httpx.Client) -> None:
    artifact = site.artifacts[0]
    go_on = hold(node)
    with node.client(site.base, artifact) as client:
        running = client.completions.create(model="m", prompt="a", max_tokens=4, n=2, stream=True)
        assert held(http)[artifact]["references"] == 1
        refused = http.post(f"/{artifact}/unload")
        assert refused.status_code == 409
        assert "used by 1" in refused.json()["detail"]
        go_on.set()
        assert list(running)
    while held(http)[artifact]["references"]:
        pass
    assert http.post(f"/{artifact}/unload").status_code == 204


def test_a_drained_node_accepts_requests_again_when_resumed(site: Site, node: RunningNode) -> None:
    body = {"model": site.base, "prompt": "a", "max_tokens": 1}
    with httpx.Client(base_url=node.url, timeout=60) as client:
        assert client.post("/v1/drain").status_code == 204
        assert client.post("/v1/completions", json=body).status_code == 503
        assert client.get("/readyz").status_code == 503
        assert client.post("/v1/resume").status_code == 204
        assert client.post("/v1/completions", json=body).status_code == 200
    usage = node.node.state()["usage"]
    assert usage["tokens_per_second"] > 0
    assert usage["first_token_seconds"] > 0
    assert 0 < usage["memory_bytes"] < usage["memory_limit"]


@pytest.mark.parametrize(
    ("path", "body", "status", "code"),
    [
        (f"/{'0' * 64}/load", None, 404, "not_found"),
        (f"/{'0' * 64}/unload", None, 404, "not_found"),
        (f"/{'0' * 64}/unpin", None, 404, "not_found"),
        ("/..%2Fescape/load", None, 404, "not_found"),
        ("/escape/load", None, 422, "invalid_input"),
        (f"/{'0' * 64}/load", {"tier": "moon"}, 422, "invalid_input"),
    ],
)
def test_bad_requests_are_refused(
    http: httpx.Client, path: str, body: Any, status: int, code: str
) -> None:
    answer = http.post(path, json=body)
    assert answer.headers["content-type"] == "application/problem+json"
    assert (answer.status_code, answer.json()["code"]) == (status, code)


def test_loaded_deltas_are_models_of_a_standalone_node(
    site: Site, node: RunningNode, http: httpx.Client
) -> None:
    artifact = site.artifacts[1]
    http.post(f"/{artifact}/load")
    with openai.OpenAI(base_url=f"{node.url}/v1", api_key="none", max_retries=0) as client:
        assert {model.id for model in client.models.list()} >= {"base-0", artifact}
        answer = client.completions.create(model=artifact, prompt="a", max_tokens=1)
    assert answer.model == artifact


def test_a_node_offers_no_other_files_of_its_disk(site: Site, tmp_path: Path) -> None:
    given, other = site.artifacts
    with start(site, tmp_path, node_base=site.home / "base-0") as node:
        for artifact in (given, other):
            httpx.post(f"{node.url}/v1/deltas/{artifact}/load", json={"tier": "disk"})
    settings = {
        "node_base": site.home / "base-0",
        "node_deltas": {"maths": given},
        "node_max_deltas": 1,
    }
    with (
        start(site, tmp_path, node_host_bytes=0, **settings) as node,
        openai.OpenAI(base_url=f"{node.url}/v1", api_key="none", max_retries=0) as client,
    ):
        assert {delta.digest for delta in node.node.held()} == {given, other}
        assert [model.id for model in client.models.list()] == ["base-0", "maths"]
        for ask in (
            client.models.retrieve,
            lambda m: client.completions.create(model=m, prompt="a"),
        ):
            with pytest.raises(openai.NotFoundError):
                ask(other)
        httpx.post(f"{node.url}/v1/deltas/{other}/load", timeout=60)
        assert [model.id for model in client.models.list()] == ["base-0", "maths", other]
        loaded, named, by_digest = (
            client.completions.create(model=name, prompt="ab", max_tokens=9, temperature=0)
            for name in (other, "maths", given)
        )
    assert (named.model, by_digest.model) == ("maths", given)
    assert named.choices[0].text == by_digest.choices[0].text != loaded.choices[0].text


def test_a_node_without_a_base_loads_the_one_in_the_header(site: Site, tmp_path: Path) -> None:
    with start(site, tmp_path) as node:
        url = f"{node.url}/v1/deltas/{site.artifacts[0]}/load"
        unknown = httpx.post(url)
        assert (unknown.status_code, unknown.json()["code"]) == (409, "not_ready")
        assert httpx.post(url.replace("/load", "/unload")).status_code == 404, "it has none"
        named = httpx.post(url, headers={"Deltadock-Base": site.base}, timeout=60)
        assert named.json()["tier"] == "device"


def test_with_a_secret_every_route_but_health_needs_it(site: Site, tmp_path: Path) -> None:
    secret = SecretStr("s3cret")
    with start(site, tmp_path, node_base=site.home / "base-0", node_secret=secret) as node:
        for path in ("/healthz", "/readyz", "/metrics"):
            assert httpx.get(f"{node.url}{path}").status_code == 200
        for method, path in (
            ("GET", "/v1/models"), ("GET", "/v1/deltas"), ("POST", "/v1/completions"),
            ("POST", "/v1/chat/completions"), ("POST", f"/v1/deltas/{site.artifacts[0]}/load"),
        ):  # fmt: skip
            body = {"model": "base-0", "prompt": "a", "messages": [{"role": "user", "content": ""}]}
            answer = httpx.request(method, f"{node.url}{path}", json=body)
            assert answer.status_code == 401
            error = answer.json() if "deltas" in path else answer.json()["error"]
            assert error["code"] == "unauthorized"
        with openai.OpenAI(base_url=f"{node.url}/v1", api_key="s3cret") as client:
            assert client.completions.create(model="base-0", prompt="a", max_tokens=1).choices
        headers = {"Authorization": "Bearer s3cret"}
        assert httpx.get(f"{node.url}/v1/deltas", headers=headers).json() == {"data": []}


def test_configured_deltas_are_loaded_at_start(site: Site, tmp_path: Path) -> None:
    with (
        start(
            site, tmp_path, node_base=site.home / "base-0", node_deltas={"maths": site.artifacts[1]}
        ) as node,
        httpx.Client(base_url=f"{node.url}/v1/deltas") as http,
    ):
        assert held(http)[site.artifacts[1]]["tier"] == "device"
