"""Downloads that the api redirects to its object store."""

import hashlib
from pathlib import Path

import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, RedirectResponse, Response
from starlette.routing import Route

from deltadock.client.http import Client
from deltadock.errors import Unavailable
from tests.api.support import serving

ARTIFACT = b"artifact"


def test_the_object_store_gets_no_credentials_or_cookies(tmp_path: Path) -> None:
    seen: list[Request] = []

    async def store(request: Request) -> Response:
        seen.append(request)
        return Response(ARTIFACT)

    async def delta(_request: Request) -> Response:
        digest = hashlib.sha256(ARTIFACT).hexdigest()
        answer = JSONResponse({"artifact": {"digest": digest, "bytes": len(ARTIFACT)}})
        answer.set_cookie("session", "secret")
        return answer

    with serving(Starlette(routes=[Route("/blob", store)])) as store_url:

        async def redirect(request: Request) -> Response:
            seen.append(request)
            return RedirectResponse(f"{store_url}/blob?X-Amz-Signature=x", 307)

        routes = [Route("/v1/deltas/d", delta), Route("/v1/deltas/d/artifact", redirect)]
        with serving(Starlette(routes=routes)) as url:
            named = url.replace("127.0.0.1", "user:password@localhost")
            with Client(named) as client:
                client.download_artifact("d", tmp_path / "d.delta")
    at_api, at_store = seen
    for header in ("authorization", "cookie"):
        assert header in at_api.headers
        assert header not in at_store.headers
    assert (tmp_path / "d.delta").read_bytes() == ARTIFACT


def test_a_refusal_does_not_show_the_signature(tmp_path: Path) -> None:
    async def refuse(_request: Request) -> Response:
        return Response("<Error/>", 403)

    async def delta(_request: Request) -> Response:
        return JSONResponse({"artifact": {"digest": "0" * 64, "bytes": 1}})

    async def redirect(_request: Request) -> Response:
        return RedirectResponse("/blob?X-Amz-Signature=secret", 307)

    routes = [
        Route("/blob", refuse),
        Route("/v1/deltas/d", delta),
        Route("/v1/deltas/d/artifact", redirect),
    ]
    with (
        serving(Starlette(routes=routes)) as url,
        Client(url) as client,
        pytest.raises(Unavailable, match="/blob answered with status 403") as caught,
    ):
        client.download_artifact("d", tmp_path / "d.delta")
    assert "secret" not in caught.value.message
