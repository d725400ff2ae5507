"""Requests: which errors responses are, what is sent again, and how often."""

import inspect
import json
import time
import traceback
from collections.abc import AsyncIterator, Awaitable, Iterator

import httpx
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from deltadock import errors
from deltadock.cli.processes import free_ports
from deltadock.client import routes
from deltadock.client.asynchronous import AsyncClient
from deltadock.client.blocking import Client
from deltadock.client.requests import ATTEMPTS, Call, Events, Lines, error_of
from deltadock.client.resources import Delta, Generated, Job
from deltadock.client.stopping import Stop
from deltadock.errors import (
    DeltadockError,
    HashMismatch,
    InvalidInput,
    NotFound,
    Overloaded,
    RateLimited,
    Unavailable,
)

EVENTS = {"Content-Type": "text/event-stream; charset=utf-8"}


def tree(kind: type[DeltadockError] = DeltadockError) -> Iterator[type[DeltadockError]]:
    """The classes of `deltadock.errors`; a node's own have codes of these."""
    yield kind
    for child in kind.__subclasses__():
        if child.__module__ == errors.__name__:
            yield from tree(child)


def answer(status: int = 502, **arguments: object) -> httpx.Response:
    request = httpx.Request("GET", "http://deltadock/v1/x")
    return httpx.Response(status, request=request, **arguments)  # type: ignore[arg-type]


@pytest.fixture
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The pauses, which are not made."""
    made: list[float] = []
    monkeypatch.setattr(Stop, "sleep", lambda _, seconds: made.append(seconds))
    monkeypatch.setattr(time, "sleep", made.append)
    return made


def answering(*answers: httpx.Response | type[httpx.RequestError]) -> tuple[Client, list[str]]:
    """A client whose server gives these answers in turn, and what it was asked."""
    asked: list[str] = []
    left = list(answers)

    def handle(request: httpx.Request) -> httpx.Response:
        asked.append(f"{request.method} {request.headers.get('idempotency-key', '')}".strip())
        found = left.pop(0)
        if isinstance(found, httpx.Response):
            return found
        raise found("broken", request=request)

    client = Client("http://deltadock", "ddk_x")
    client._http = httpx.Client(base_url="http://deltadock", transport=httpx.MockTransport(handle))
    return client, asked


def test_a_long_pause_is_told_of(pauses: list[float]) -> None:
    limited = {"code": "rate_limited", "detail": "1 request a minute."}
    client, _ = answering(
        answer(429, json=limited, headers={"Retry-After": "55"}),
        answer(503, json={"code": "unavailable", "detail": "Soon."}),
        answer(200, json={"status": "ready", "checks": {}}),
    )
    told = list[tuple[float, str]]()
    client._on_pause = lambda seconds, error: told.append((seconds, error.message))
    client.ready()
    assert told == [(55.0, "1 request a minute.")]
    assert len(pauses) == 2


@pytest.mark.parametrize("kind", list(tree()), ids=lambda kind: kind.code)
def test_an_error_body_becomes_the_error_class_of_its_code(kind: type[DeltadockError]) -> None:
    for body in (
        {"code": kind.code, "detail": "what to do"},
        {"error": {"code": kind.code, "message": "what to do", "type": "x", "param": None}},
    ):
        error = error_of(answer(json=body))
        assert (type(error), error.message) == (kind, "what to do")


def test_an_unknown_code_is_in_the_message() -> None:
    error = error_of(answer(json={"code": "new_thing", "detail": "what to do"}))
    assert "new_thing: what to do" in error.message


@pytest.mark.parametrize("body", [b"<html>", b"[]", b"{}", b'"text"', b'{"error": "x"}'])
def test_a_proxys_error_page_is_unavailable(body: bytes) -> None:
    error = error_of(answer(content=body))
    assert isinstance(error, Unavailable)
    assert "502" in error.message


@pytest.mark.parametrize(
    "body", [b"<html>Sign in</html>", b"[]", b"", b'{"status": 1}', b'"text"'], ids=repr
)
def test_a_successful_answer_of_something_else_is_unavailable(body: bytes) -> None:
    found = (answer(200, content=body) for _ in range(3))
    client, asked = answering(*found)
    for ask in (client.ready, lambda: next(client.deltas()), lambda: list(client.stream("a", "b"))):
        with pytest.raises(Unavailable, match="status 200, and not as a Deltadock does"):
            ask()
    assert asked == ["GET", "GET", "POST"]


def test_a_read_without_an_answer_is_waited_for_once(pauses: list[float]) -> None:
    client, asked = answering(httpx.ReadTimeout)
    with pytest.raises(Unavailable, match="does not answer"):
        client.ready()
    assert (asked, pauses) == (["GET"], [])


@pytest.mark.parametrize("key", ["ddk_pr\nivate", "ddk_prüvate"])
def test_a_key_that_no_header_can_hold_is_refused_without_being_shown(key: str) -> None:
    with pytest.raises(InvalidInput, match=r"The API key \(given\) is none") as refused:
        Client("http://deltadock", key)
    assert "vate" not in refused.value.message
    assert repr(Client("http://deltadock", " ddk_x\n")) == "<Client of http://deltadock>"


def test_reads_are_repeated_until_they_succeed(pauses: list[float]) -> None:
    ready = answer(200, json={"status": "ok", "checks": {}})
    client, asked = answering(answer(503), httpx.ReadError, ready)
    assert client.ready().status == "ok"
    assert asked == ["GET"] * 3
    assert 0.25 <= pauses[0] <= 0.5 <= pauses[1] <= 1.0


def test_reads_are_not_repeated_for_ever(pauses: list[float]) -> None:
    client, asked = answering(*[httpx.ConnectError] * ATTEMPTS)
    with pytest.raises(Unavailable, match=r"http://deltadock/ does not answer.*deltadock doctor"):
        client.ready()
    assert len(asked) == ATTEMPTS
    assert len(pauses) == ATTEMPTS - 1


def test_a_refused_connection_is_a_short_traceback(pauses: list[float]) -> None:
    address = f"http://127.0.0.1:{free_ports(1)[0]}"
    with Client(address, "key") as client, pytest.raises(Unavailable) as caught:
        client.ready()
    lines = traceback.format_exception(caught.value)
    assert lines[0] == "Traceback (most recent call last):\n"
    assert lines[-1].startswith(f"deltadock.errors.Unavailable: Deltadock at {address}/ does not")
    assert not any(site in line for line in lines for site in ("httpx", "httpcore", "During"))


@pytest.mark.parametrize(
    ("route", "method"),
    [
        ("GET /v1/bases lists them.", "`client.bases()` lists them."),
        ("GET /v1/registry lists them.", "`client.models()` lists them."),
        ("see GET /v1/jobs/job_a1.", "see `client.job('job_a1')`."),
        ("GET /v1/deltas?base=tiny lists", "`client.deltas(base='tiny')` lists"),
        ("POST /v1/deltas/dlt_a/restore brings", "`client.restore('dlt_a')` brings"),
        ("POST /v1/bases/tiny/restore brings", "`client.restore_base('tiny')` brings"),
        ("GET /v1/webhooks lists them.", "GET /v1/webhooks lists them."),
    ],
)
def test_errors_name_methods_not_routes(route: str, method: str) -> None:
    body = {"code": "not_found", "detail": f"There is none; {route}"}
    assert error_of(answer(404, json=body)).message == f"There is none; {method}"
    with pytest.raises(InvalidInput, match=r"`client\.deltas\(\)` lists them"):
        routes.delta("maths")


def test_the_server_says_when_to_ask_again(pauses: list[float]) -> None:
    body = {"code": "overloaded", "detail": "full"}
    busy = [answer(429, json=body, headers={"Retry-After": "7"}) for _ in range(ATTEMPTS)]
    client, _ = answering(*busy)
    with pytest.raises(Overloaded, match="full"):
        client.generate("tiny", "x")
    assert pauses == [7.0] * (ATTEMPTS - 1)


@pytest.mark.parametrize("failure", [httpx.ReadError, answer(502), answer(504)])
def test_what_may_have_been_done_is_not_done_twice(
    failure: httpx.Response | type[httpx.RequestError], pauses: list[float]
) -> None:
    client, asked = answering(failure)
    with pytest.raises(Unavailable):
        client.retry("job_x")
    assert asked == ["POST"]
    assert pauses == []


def test_a_server_that_asks_for_a_long_pause_is_not_waited_for(pauses: list[float]) -> None:
    """As when a tenant's jobs are as many as it may run."""
    body = {"code": "rate_limited", "detail": "Your tenant may run 1 job at once."}
    busy = [answer(429, json=body, headers={"Retry-After": "300"})]
    client, asked = answering(*busy)
    with pytest.raises(RateLimited, match="1 job at once"):
        client.generate("tiny", "x")
    assert (len(asked), pauses) == (1, [])


def test_what_creates_is_repeated_under_one_key(pauses: list[float]) -> None:
    refusal = answer(404, json={"code": "not_found", "detail": "none"})
    client, asked = answering(httpx.ReadError, answer(502), refusal)
    with pytest.raises(NotFound):
        client.create_base("x", "0" * 64)
    assert len(asked) == 3
    assert len(set(asked)) == 1
    assert asked[0].startswith("POST ")


def test_refusals_are_not_repeated(pauses: list[float]) -> None:
    client, asked = answering(answer(404, json={"code": "not_found", "detail": "none"}))
    with pytest.raises(NotFound, match="none"):
        client.job("job_x")
    assert asked == ["GET"]


def test_an_error_in_a_stream_is_raised() -> None:
    events: Events[Job] = Events(Call("GET", "/", Job.model_validate))
    assert events.read(": a comment") is None
    assert events.read("data: [DONE]") is None
    with pytest.raises(HashMismatch, match="why"):
        events.read('data: {"error": {"code": "hash_mismatch", "message": "why"}}')


@given(
    texts=st.lists(st.text(st.characters(exclude_categories=["Cs"])), max_size=4),
    size=st.integers(1, 50),
)
@example(texts=["a\x85b\u2028c\x1dd\r\n"], size=3)
def test_a_stream_holds_any_text(texts: list[str], size: int) -> None:
    sent = "".join(f"data: {json.dumps(text, ensure_ascii=False)}\r\n\r\n" for text in texts)
    raw, lines = sent.encode(), Lines()
    chunks = (raw[start : start + size] for start in range(0, len(raw), size))
    found = [line.strip() for chunk in chunks for line in lines.of(chunk)]
    assert [json.loads(line.removeprefix("data: ")) for line in found if line] == texts


@pytest.mark.parametrize("text", ["a\x85b", "a\u2028b", "a\u2029b"])
def test_a_streamed_answer_may_have_other_line_ends(text: str) -> None:
    event = json.dumps({"choices": [{"text": text}]}, ensure_ascii=False)
    client, _ = answering(answer(200, text=f"data: {event}\n\n", headers=EVENTS))
    assert [piece.text for piece in client.stream("tiny", "hello")] == [text]


def test_a_job_that_is_followed_survives_a_broken_connection(pauses: list[float]) -> None:
    job = {
        "id": "job_1", "delta": "dlt_1", "state": "compressing", "priority": "normal", "block": 1,
        "blocks": 2, "percent": 50.0, "message": "block 2 of 2", "cancel_requested": False,
        "attempt": 1, "created_at": "2026-11-22T12:00:00Z", "updated_at": "2026-11-22T12:00:00Z",
    }  # fmt: skip
    first = Job.model_validate(job).model_dump_json()
    last = Job.model_validate(job | {"state": "ready", "percent": 100.0}).model_dump_json()
    client, asked = answering(
        answer(200, text=f"data: {first}\n\n", headers=EVENTS),
        httpx.ConnectError,
        answer(200, text=f"data: {first}\n\ndata: {last}\n\n", headers=EVENTS),
    )
    seen: list[str] = []
    assert client.wait("job_1", lambda job: seen.append(job.stage)).is_final
    assert seen == ["compressing: block 2 of 2"] * 2 + ["ready"]
    assert len(asked) == 3


@pytest.mark.parametrize("url", ["127.0.0.1:8000", "http://", "ftp://x", "http:///x", "x"])
def test_what_is_no_address_is_refused(url: str) -> None:
    with pytest.raises(InvalidInput, match=r"is not an address such as http://127\.0\.0\.1:8000"):
        Client(url, "ddk_x")


@pytest.mark.parametrize("name", ["skills", "a/b/c", "maths/skills@Prod", "../x", "", "a b/c"])
def test_what_is_no_name_is_refused_before_it_is_sent(name: str) -> None:
    with pytest.raises(InvalidInput, match="project/model"):
        routes.delta(name)
    with pytest.raises(InvalidInput, match="project/model"):
        routes.model(name)


@pytest.mark.parametrize(
    ("method", "blocking", "awaited"),
    [
        ("delta", Delta, Awaitable[Delta]),
        ("delete", None, Awaitable[type(None)]),
        ("deltas", Iterator[Delta], AsyncIterator[Delta]),
        ("stream", Iterator[Generated], AsyncIterator[Generated]),
    ],
)
def test_help_shows_what_a_method_returns(method: str, blocking: object, awaited: object) -> None:
    for kind, returned in ((Client, blocking), (AsyncClient, awaited)):
        assert inspect.signature(getattr(kind, method)).return_annotation == returned


def test_both_clients_have_the_same_methods() -> None:
    def public(kind: type) -> set[str]:
        return {name for name in vars(kind) if not name.startswith("_")}

    assert public(Client) == public(AsyncClient)
