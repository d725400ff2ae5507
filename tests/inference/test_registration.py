"""Heartbeats, also while the api fails."""

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import openai
import pytest
from pydantic import SecretStr
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from deltadock.inference.registration import Registration
from deltadock.settings import Settings
from tests.api.support import serving
from tests.inference.support import Site, start
from tests.waiting import wait_until


class Listener:
    """A fake api: responds with `status` and records the requests."""

    def __init__(self) -> None:
        self.status = 204
        self.told: list[tuple[str, str, Any]] = []
        route = Route("/v1/nodes/{node}", self._hear, methods=["PUT", "DELETE"])
        self.app = Starlette(routes=[route])

    async def _hear(self, request: Request) -> Response:
        assert request.headers["authorization"] == "Bearer s3cret"
        body = await request.json() if request.method == "PUT" else None
        self.told.append((request.method, request.path_params["node"], body))
        return Response(status_code=self.status)


async def until(true: Callable[[], Any]) -> None:
    async with asyncio.timeout(20):
        while not true():
            await asyncio.sleep(0.01)


def test_a_node_sends_heartbeats_and_deregisters() -> None:
    listener = Listener()
    load = {"admitted": 0}

    async def scenario(url: str) -> None:
        settings = Settings(
            api_url=f"{url}/", node_secret=SecretStr("s3cret"), node_heartbeat_seconds=600
        )
        listener.status = 503
        node = Registration(settings, "http://node:8100", lambda: dict(load))
        await until(lambda: listener.told)
        listener.status = 204
        load["admitted"] = 3
        node.notify()  # long before the next heartbeat
        await until(lambda: len(listener.told) == 2)
        await node.report()
        await node.close()

    with serving(listener.app) as url:
        asyncio.run(scenario(url))
    first, second, third, last = listener.told
    assert first[2] == {
        "url": "http://node:8100",
        "lives_seconds": 3000,
        "admitted": 0,
        "damaged": [],
    }
    assert (second[2]["admitted"], third[2]["admitted"]) == (3, 3)
    assert [method for method, _, _ in listener.told] == ["PUT", "PUT", "PUT", "DELETE"]
    assert {node for _, node, _ in listener.told} == {last[1]}


def test_damaged_blobs_that_a_node_finds_are_reported_once(site: Site, tmp_path: Path) -> None:
    listener = Listener()
    listener.status = 503
    damaged = "a" * 64
    path = site.blobs.path(damaged)
    path.write_bytes(b"other bytes")

    def reported() -> list[list[str]]:
        return [body["damaged"] for method, _, body in listener.told if method == "PUT"]

    try:
        with (
            serving(listener.app) as url,
            start(
                site, tmp_path, api_url=url, node_secret="s3cret", node_heartbeat_seconds=0.2
            ) as running,
            running.client(site.base, damaged) as client,
        ):
            client.api_key = "s3cret"
            running.call(running.node.register, "http://node:8100")
            with pytest.raises(openai.APIStatusError, match="damaged"):
                client.completions.create(model="m", prompt="a")
            wait_until(lambda: [damaged] in reported())
            listener.status = 204
            wait_until(lambda: reported()[-1] == [])
        assert reported()[-1] == [], "it is not reported again"
    finally:
        path.unlink()


def test_an_unreachable_api_does_not_stop_the_node() -> None:
    async def scenario() -> None:
        settings = Settings(api_url="http://127.0.0.1:1", node_heartbeat_seconds=0.2)
        node = Registration(settings, "http://node:8100", dict)
        await node.report()
        await asyncio.sleep(0.3)
        assert not node._heartbeats.done(), "it keeps retrying"
        await node.close()

    asyncio.run(scenario())


def test_heartbeats_survive_any_exception() -> None:
    listener = Listener()
    states: list[dict[str, int]] = []

    def state() -> dict[str, int]:
        if len(states) < 2:
            states.append({})
            raise KeyError("a fault")
        return {"admitted": 1}

    async def scenario(url: str) -> None:
        settings = Settings(
            api_url=url, node_secret=SecretStr("s3cret"), node_heartbeat_seconds=0.11
        )
        node = Registration(settings, "http://node:8100", state)
        await until(lambda: listener.told)
        await node.close()

    with serving(listener.app) as url:
        asyncio.run(scenario(url))
    assert listener.told[0][2]["admitted"] == 1
