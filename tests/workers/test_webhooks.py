"""The outbox: signed messages, retries with waits, no addresses inside networks."""

import socket
import threading
import time
from collections.abc import Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from anyio import to_thread
from standardwebhooks import Webhook
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from deltadock.storage.database import database_now
from deltadock.storage.repositories import TenantRepository, WebhookRepository
from deltadock.storage.repositories.webhooks import RETRY_SECONDS
from deltadock.storage.tables import DeliveryRow, DeliveryState, WebhookEvent, WebhookRow
from deltadock.storage.tenancy import LOCAL_TENANT
from deltadock.workers import webhooks
from deltadock.workers.compress import WorkerContext
from deltadock.workers.webhooks import MAX_OF_TENANT, Outcome, _Outbox, deliver_due
from tests.api.support import serving
from tests.waiting import wait_until

SECRET = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSwMfKQ9r8GKYo="


@dataclass
class Receiver:
    """A server that records requests and answers with `status`."""

    status: int = 204
    seen: list[tuple[dict[str, str], bytes]] = field(default_factory=list)
    url: str = ""

    async def receive(self, request: Request) -> Response:
        self.seen.append((dict(request.headers), await request.body()))
        return Response(status_code=self.status, headers={"Location": "/elsewhere"})


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    receiver = Receiver()
    routes = [Route("/{path:path}", receiver.receive, methods=["GET", "POST"])]
    with serving(Starlette(routes=routes)) as receiver.url:
        yield receiver


@pytest.fixture
def context(context: WorkerContext) -> WorkerContext:
    """Without the network's rules: the receiver is on this machine."""
    context.settings.webhook_private_addresses = True
    return context


def add(context: WorkerContext, url: str, tenant: str = LOCAL_TENANT) -> WebhookRow:
    with context.database.session_scope() as session:
        events = [WebhookEvent.DELTA_READY]
        return WebhookRepository(session, tenant).add(url, events, SECRET)


def publish(
    context: WorkerContext,
    event: WebhookEvent = WebhookEvent.DELTA_READY,
    tenant: str = LOCAL_TENANT,
) -> None:
    with context.database.session_scope() as session:
        WebhookRepository(session, tenant).publish(event, {"delta": "dlt_a"})


@pytest.fixture
def hostile(context: WorkerContext) -> str:
    """Another tenant."""
    with context.database.session_scope() as session:
        return TenantRepository(session).add("hostile").id


def message(context: WorkerContext, webhook: WebhookRow) -> DeliveryRow:
    with context.database.read_scope() as session:
        (found,) = WebhookRepository(session, LOCAL_TENANT).deliveries(webhook, limit=9)
        return found


def make_due(context: WorkerContext, webhook: WebhookRow) -> None:
    with context.database.session_scope() as session:
        row = session.get(DeliveryRow, message(context, webhook).id)
        assert row is not None
        row.next_attempt_at = datetime.now(UTC)


def test_a_message_is_signed_and_sent_once(context: WorkerContext, receiver: Receiver) -> None:
    webhook = add(context, f"{receiver.url}/hook?a=b")
    publish(context)
    publish(context, WebhookEvent.ALIAS_MOVED)  # not among the webhook's events
    assert deliver_due(context) == 1
    assert deliver_due(context) == 0
    ((headers, body),) = receiver.seen
    sent = Webhook(SECRET).verify(body, headers)
    assert (sent["type"], sent["data"]) == ("delta.ready", {"delta": "dlt_a"})
    assert headers["host"] == receiver.url.removeprefix("http://")
    found = message(context, webhook)
    assert (found.state, found.status, found.error) == (DeliveryState.DELIVERED, 204, None)
    assert headers["webhook-id"] == found.id


def test_a_failed_attempt_is_repeated_with_growing_waits_until_it_fails(
    context: WorkerContext, receiver: Receiver
) -> None:
    webhook = add(context, receiver.url)
    publish(context)
    receiver.status = 503
    for wait in RETRY_SECONDS:
        before = datetime.now(UTC)
        assert deliver_due(context) == 1
        found = message(context, webhook)
        assert found.next_attempt_at is not None
        assert timedelta(0) <= found.next_attempt_at - before - timedelta(seconds=wait)
        assert deliver_due(context) == 0, "its time has not come"
        make_due(context, webhook)
    assert deliver_due(context) == 1
    found = message(context, webhook)
    assert (found.state, found.attempts) == (DeliveryState.FAILED, len(RETRY_SECONDS) + 1)
    assert (found.status, found.error) == (503, "It answered 503.")
    assert len({headers["webhook-id"] for headers, _ in receiver.seen}) == 1
    with context.database.session_scope() as session:
        WebhookRepository(session, LOCAL_TENANT).resend(session.merge(found))
    receiver.status = 200
    assert deliver_due(context) == 1
    assert message(context, webhook).state is DeliveryState.DELIVERED


def test_a_tenant_whose_receiver_does_not_answer_delays_no_other_tenant(
    context: WorkerContext,
    receiver: Receiver,
    hostile: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(webhooks, "SECONDS", 600.0)
    silent = socket.create_server(("127.0.0.1", 0))
    with silent, ThreadPoolExecutor() as threads:
        slow = add(context, f"http://127.0.0.1:{silent.getsockname()[1]}", hostile)
        for _ in range(MAX_OF_TENANT + 2):
            publish(context, tenant=hostile)
        sending = threads.submit(deliver_due, context)
        held = [silent.accept()[0] for _ in range(MAX_OF_TENANT)]
        add(context, receiver.url)
        publish(context)
        wait_until(lambda: len(receiver.seen) == 1)
        with context.database.read_scope() as session:
            now = database_now(session)
            waiting = WebhookRepository(session, hostile).deliveries(slow, limit=9)
        unclaimed = [row for row in waiting if row.next_attempt_at and row.next_attempt_at <= now]
        assert len(unclaimed) == 2, "a message is claimed when it is sent"
        for connection in held:
            connection.close()
        for _ in unclaimed:
            silent.accept()[0].close()
        assert sending.result(60) == MAX_OF_TENANT + 3
        with context.database.read_scope() as session:
            tried = WebhookRepository(session, hostile).deliveries(slow, limit=9)
        assert {row.attempts for row in tried} == {1}


def test_messages_that_end_during_a_claim_leave_none_behind(
    context: WorkerContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The claim passed the tenant's last message by, as the tenant was busy when it began."""
    passed_by = threading.Event()

    async def send(delivery: DeliveryRow, *, private: bool) -> Outcome:
        await to_thread.run_sync(passed_by.wait)
        return Outcome(204, None)

    def claim(outbox: _Outbox, busy: Collection[str]) -> DeliveryRow | None:
        found = of_outbox(outbox, busy)
        if found is None:
            passed_by.set()
            wait_until(lambda: not outbox._sending)
        return found

    of_outbox = _Outbox._claim
    monkeypatch.setattr(webhooks, "send", send)
    monkeypatch.setattr(_Outbox, "_claim", claim)
    add(context, "https://example.com")
    for _ in range(MAX_OF_TENANT + 1):
        publish(context)
    assert deliver_due(context) == MAX_OF_TENANT + 1


@pytest.mark.parametrize("settings", ["sqlite"], indirect=True)
def test_an_answer_that_never_ends_is_given_up(
    context: WorkerContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(webhooks, "SECONDS", 1.0)

    def drip() -> None:
        connection, _ = server.accept()
        with connection, suppress(OSError):
            connection.sendall(b"HTTP/1.1 200 OK\r\nX-A: ")
            while True:
                connection.sendall(b"a")
                time.sleep(0.1)

    with socket.create_server(("127.0.0.1", 0)) as server, ThreadPoolExecutor() as threads:
        webhook = add(context, f"http://127.0.0.1:{server.getsockname()[1]}")
        publish(context)
        threads.submit(drip)
        assert deliver_due(context) == 1
        assert message(context, webhook).error == "It did not answer within 1 s."


@pytest.mark.parametrize("settings", ["sqlite"], indirect=True)
def test_redirects_are_not_followed(context: WorkerContext, receiver: Receiver) -> None:
    webhook = add(context, receiver.url)
    publish(context)
    receiver.status = 307
    deliver_due(context)
    assert (len(receiver.seen), message(context, webhook).error) == (1, "It answered 307.")


@pytest.mark.parametrize("settings", ["sqlite"], indirect=True)
def test_a_name_with_an_address_inside_a_network_is_not_connected_to(
    context: WorkerContext, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    context.settings.webhook_private_addresses = False
    port = int(receiver.url.rpartition(":")[2])
    asked: list[str] = []

    def resolve(host: str, port: int, **_: Any) -> list[Any]:
        asked.append(host)
        return [
            (socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port))
            for address in ("8.8.8.8", "127.0.0.1")
        ]

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    webhook = add(context, f"http://hooks.test:{port}/")
    publish(context)
    deliver_due(context)
    assert receiver.seen == []
    assert asked == ["hooks.test"], "the name is resolved once, and no connection is made"
    assert "127.0.0.1, which is not a public" in (message(context, webhook).error or "")
