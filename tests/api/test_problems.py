"""Errors have one shape and stable codes."""

import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from sqlalchemy import text

from deltadock.api.main import app, create_app
from deltadock.api.references import REFERENCE_PATTERN
from deltadock.api.uploads.receive import CONTENT_DIGEST_PATTERN, HEX_DIGEST_PATTERN
from deltadock.api.uploads.schemas import FILE_PATTERN
from deltadock.api.webhooks import URL_PATTERN
from deltadock.body_limit import MAX_BODY_BYTES
from deltadock.errors import DeltadockError, Overloaded, Unavailable
from deltadock.names import ALIAS_PATTERN
from deltadock.problems import FORMS
from deltadock.settings import Settings
from tests.api.support import Api, bearer, issue_key, serving

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
def faulty(settings: Settings, migrated_file: Path) -> Iterator[httpx.Client]:
    """A client of an app with routes that raise."""
    settings.home.mkdir(parents=True)
    shutil.copy(migrated_file, settings.home)
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

    @app.get("/away")
    def away() -> None:
        raise Unavailable("The store does not answer.") from TimeoutError("9 s")

    headers = bearer(issue_key(settings))
    with serving(app) as url, httpx.Client(base_url=url, headers=headers) as client:
        yield client


def test_unexpected_exceptions_are_not_disclosed(faulty: httpx.Client) -> None:
    answer = faulty.get("/bug", headers={"X-Request-ID": "trace-1"})
    problem = check(answer, 500, "internal_error")
    assert answer.headers["x-request-id"] == "trace-1"
    assert "trace-1" in problem["detail"]
    assert "secret" not in answer.text
    assert faulty.get("/healthz").status_code == 200


def test_only_unexpected_exceptions_are_logged_with_a_traceback(
    faulty: httpx.Client, caplog: pytest.LogCaptureFixture
) -> None:
    for path in ("/bug", "/root", "/away", "/full"):
        faulty.get(path)
    entries = [record.msg for record in caplog.records if isinstance(record.msg, dict)]
    bug, root, away = (entry for entry in entries if entry["level"] in {"error", "warning"})
    for unexpected in (bug, root):
        assert unexpected["level"] == "error"
        assert unexpected["exc_info"]
    assert (away["level"], away["cause"]) == ("warning", "TimeoutError('9 s')")
    assert "exc_info" not in away


def test_error_details_do_not_override_members(faulty: httpx.Client) -> None:
    problem = check(faulty.get("/root"), 500, "internal_error")
    assert (problem["path"], problem["hint"]) == ("/x", {"a": [1]})
    answer = faulty.get("/full")
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


def patterns_in(schema: object) -> Iterator[str]:
    if isinstance(schema, dict):
        if isinstance(schema.get("pattern"), str):
            yield schema["pattern"]
        for value in schema.values():
            yield from patterns_in(value)
    elif isinstance(schema, list):
        for value in schema:
            yield from patterns_in(value)


def test_no_one_gets_a_regular_expression(api: Api) -> None:
    own_words = {  # whose errors the routes word themselves
        r"^[A-Za-z0-9_.-]{1,64}$",
        ALIAS_PATTERN,
        CONTENT_DIGEST_PATTERN,
        FILE_PATTERN,
        HEX_DIGEST_PATTERN,
        REFERENCE_PATTERN,
        URL_PATTERN,
    }
    assert set(patterns_in(app.openapi())) - own_words == set(FORMS)
    answer = api.client.post("/v1/deltas", json=api.delta_body(name="skills"))
    assert answer.status_code == 422
    assert "body.name: 'skills' is not a name of the form project/model" in answer.json()["detail"]
