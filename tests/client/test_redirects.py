"""Downloads that the api redirects to its object store."""

import hashlib
from pathlib import Path
from typing import Any

import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, RedirectResponse, Response
from starlette.routing import Route

from deltadock.client.blocking import Client
from deltadock.errors import Unavailable
from tests.api.support import serving

ARTIFACT = b"artifact"


def described(digest: str, size: int) -> dict[str, Any]:
    """A delta with this artifact, as the api describes it."""
    return {
        "id": "dlt_1", "name": "maths/skills", "version": 1, "aliases": [], "default_version": 1,
        "base": {"id": "b", "name": "tiny", "checkpoint": "0"}, "checkpoint": "1",
        "method": "exact", "bits": None, "goal": None, "seed": 0, "solver": "exact",
        "state": "ready", "percent": 100.0, "job": "job_1", "created_by": None,
        "artifact": {"digest": digest, "bytes": size}, "created_at": "2026-11-22T12:00:00Z",
    }  # fmt: skip


def test_the_object_store_gets_no_credentials_or_cookies(tmp_path: Path) -> None:
    seen: list[Request] = []

    async def store(request: Request) -> Response:
        seen.append(request)
        return Response(ARTIFACT)

    async def delta(_request: Request) -> Response:
        answer = JSONResponse(described(hashlib.sha256(ARTIFACT).hexdigest(), len(ARTIFACT)))
        answer.set_cookie("session", "secret")
        return answer

    with serving(Starlette(routes=[Route("/blob", store)])) as store_url:

        async def redirect(request: Request) -> Response:
            seen.append(request)
            return RedirectResponse(f"{store_url}/blob?X-Amz-Signature=x", 307)

        routes = [Route("/v1/deltas/dlt_1", delta), Route("/v1/deltas/dlt_1/artifact", redirect)]
        with serving(Starlette(routes=routes)) as url:
            named = url.replace("127.0.0.1", "user:password@localhost")
            with Client(named) as client:
                client.download("dlt_1", tmp_path / "d.delta")
    at_api, at_store = seen
    for header in ("authorization", "cookie"):
        assert header in at_api.headers
        assert header not in at_store.headers
    assert (tmp_path / "d.delta").read_bytes() == ARTIFACT


def test_a_refusal_does_not_show_the_signature(tmp_path: Path) -> None:
    async def refuse(_request: Request) -> Response:
        return Response("<Error/>", 403)

    async def delta(_request: Request) -> Response:
        return JSONResponse(described("0" * 64, 1))

    async def redirect(_request: Request) -> Response:
        return RedirectResponse("/blob?X-Amz-Signature=secret", 307)

    routes = [
        Route("/blob", refuse),
        Route("/v1/deltas/dlt_1", delta),
        Route("/v1/deltas/dlt_1/artifact", redirect),
    ]
    with (
        serving(Starlette(routes=routes)) as url,
        Client(url) as client,
        pytest.raises(Unavailable, match=f"{url}/ answers with status 403") as caught,
    ):
        client.download("dlt_1", tmp_path / "d.delta")
    assert "secret" not in caught.value.message
