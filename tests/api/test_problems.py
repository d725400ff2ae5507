"""Errors have one shape and stable codes."""

import threading
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from sqlalchemy import text

from deltadock.api.main import create_app
from deltadock.api.middleware import MAX_BODY_BYTES
from deltadock.errors import DeltadockError, Overloaded
from deltadock.settings import Settings
from tests.api.support import Api, serving

MEMBERS = {"type", "title", "status", "detail", "code", "retryable"}


def check(answer: httpx.Response, status: int, code: str) -> dict[str, Any]:
    assert answer.status_code == status
    assert answer.headers["content-type"] == "application/problem+json"
    assert answer.headers["x-request-id"]
    problem: dict[str, Any] = answer.json()
    assert problem.keys() >= MEMBERS
    assert (problem["status"], problem["code"]) == (status, code)
    assert problem["type"] == f"urn:deltadock:error:{code}"
    return problem


def test_unknown_paths_are_404(api: Api) -> None:
    assert "/v1/nothing" in check(api.client.get("/v1/nothing"), 404, "not_found")["detail"]


def test_unsupported_methods_are_405(api: Api) -> None:
    answer = api.client.put("/v1/bases")
    check(answer, 405, "method_not_allowed")
    assert set(answer.headers["allow"].replace(" ", "").split(",")) <= {"GET", "POST"}


def test_malformed_bodies_are_422(api: Api) -> None:
    problem = check(api.client.post("/v1/uploads", json={"kind": "x"}), 422, "invalid_input")
    assert problem["errors"][0]["where"] == "body.kind"
    json_type = {"Content-Type": "application/json"}
    broken = api.client.post("/v1/uploads", content=b"{", headers=json_type)
    check(broken, 422, "invalid_input")
    check(api.client.post("/v1/uploads", content=b"{}"), 422, "invalid_input")


def test_body_size_is_limited(api: Api) -> None:
    check(api.client.post("/v1/uploads", content=bytes(MAX_BODY_BYTES + 1)), 413, "too_large")


def test_openai_routes_return_openai_errors(api: Api) -> None:
    answer = api.client.delete("/v1/models")
    assert (answer.status_code, answer.headers["content-type"]) == (405, "application/json")
    assert answer.json()["error"]["code"] == "method_not_allowed"


def test_a_broken_database_is_unavailable(api: Api) -> None:
    with api.resources.database.session_scope() as session:
        session.execute(text("DROP TABLE jobs"))
    answer = api.client.get("/v1/deltas")
    check(answer, 503, "unavailable")
    assert answer.headers["retry-after"] == "1"


@pytest.fixture
def faulty(settings: Settings) -> FastAPI:
    app = create_app(settings)

    @app.get("/bug")
    def bug() -> None:
        raise ZeroDivisionError("secret")

    @app.get("/root")
    def root() -> None:
        raise DeltadockError("Something known.", path="/x", status="mine", hint={"a": {1}})

    @app.get("/full")
    def full() -> None:
        raise Overloaded("The queue is full.")

    return app


def test_unexpected_exceptions_are_not_disclosed(faulty: FastAPI) -> None:
    with serving(faulty) as url:
        answer = httpx.get(f"{url}/bug", headers={"X-Request-ID": "trace-1"})
        problem = check(answer, 500, "internal_error")
        assert answer.headers["x-request-id"] == "trace-1"
        assert "trace-1" in problem["detail"]
        assert "secret" not in answer.text
        assert httpx.get(f"{url}/healthz").status_code == 200


def test_error_details_do_not_override_members(faulty: FastAPI) -> None:
    with serving(faulty) as url:
        problem = check(httpx.get(f"{url}/root"), 500, "internal_error")
        assert (problem["path"], problem["hint"]) == ("/x", {"a": [1]})
        answer = httpx.get(f"{url}/full")
        assert check(answer, 429, "overloaded")["retryable"]
        assert answer.headers["retry-after"] == "1"


@pytest.mark.parametrize("announced", ["", "a b", "x" * 65, "{}"])
def test_only_plain_request_ids_are_accepted(api: Api, announced: str) -> None:
    answer = api.client.get("/healthz", headers={"X-Request-ID": announced})
    assert answer.headers["x-request-id"] not in {announced, ""}


def test_concurrent_requests_have_their_own_ids(api: Api) -> None:
    answers: dict[str, str] = {}

    def ask(name: str) -> None:
        answer = api.client.get("/v1/methods", headers={"X-Request-ID": name})
        answers[name] = answer.headers["x-request-id"]

    threads = [threading.Thread(target=ask, args=[f"id-{i}"]) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == {f"id-{i}": f"id-{i}" for i in range(8)}
