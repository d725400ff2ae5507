"""Registering webhooks and looking at their messages; Idempotency-Key."""

from datetime import timedelta
from typing import Any

from deltadock.storage.repositories import WebhookRepository
from deltadock.storage.tables import IdempotencyRow, WebhookEvent
from deltadock.storage.tenancy import LOCAL_TENANT
from tests.api.support import Api


def test_a_webhooks_secret_is_shown_once_and_its_messages_are_listed(api: Api) -> None:
    body = {"url": "https://hooks.example.com/a", "events": ["alias.moved", "alias.moved"]}
    made = api.client.post("/v1/webhooks", json=body)
    assert made.status_code == 201
    webhook = made.json()
    assert webhook.pop("secret").startswith("whsec_")
    assert webhook["events"] == ["alias.moved"]
    url = f"/v1/webhooks/{webhook['id']}"
    assert api.client.get(url).json() == webhook
    assert api.client.get("/v1/webhooks").json() == {"data": [webhook]}
    with api.resources.database.session_scope() as session:
        for number in range(3):
            WebhookRepository(session, LOCAL_TENANT).publish(
                WebhookEvent.ALIAS_MOVED, {"number": number}
            )
    page = api.client.get(f"{url}/messages", params={"limit": 2}).json()
    rest = api.client.get(f"{url}/messages", params={"after": page["next"]}).json()
    assert (len(page["data"]), len(rest["data"]), rest["next"]) == (2, 1, None)
    assert {message["state"] for message in page["data"]} == {"pending"}
    message = rest["data"][0]["id"]
    assert api.client.post(f"{url}/messages/{message}/resend").json()["id"] == message
    assert api.client.delete(url).status_code == 204
    assert api.client.get(f"{url}/messages").status_code == 404
    for bad in ("ftp://a.test/", "https://user:pass@a.test/", "hooks", "https://"):
        assert api.client.post("/v1/webhooks", json={"url": bad}).status_code == 422, bad


def test_an_address_inside_a_network_is_refused_at_once(api: Api) -> None:
    def status(url: str) -> int:
        return api.client.post("/v1/webhooks", json={"url": url}).status_code

    for inner in ("127.0.0.1:9300", "10.1.2.3", "[::1]", "[::ffff:10.0.0.1]:80", "2130706433"):
        assert status(f"http://{inner}/hook") == 422, inner
    for outer in ("8.8.8.8", "[2606:4700:4700::1111]", "hooks.example.com"):
        assert status(f"http://{outer}/hook") == 201, outer
    refused = api.client.post("/v1/webhooks", json={"url": "http://127.0.0.1:9300"}).json()
    assert refused["detail"].startswith("127.0.0.1 is not a public address.")
    api.resources.settings.webhook_private_addresses = True
    assert status("http://127.0.0.1:9300/hook") == 201


def test_a_ready_twins_result_is_told_at_once(api: Api) -> None:
    body = api.delta_body()
    api.make_ready(api.client.post("/v1/deltas", json=body).json()["delta"])
    hook = api.client.post("/v1/webhooks", json={"url": "https://a.test/"}).json()["id"]
    api.client.post("/v1/deltas", json=body | {"name": "maths/copy"})
    messages = api.client.get(f"/v1/webhooks/{hook}/messages").json()["data"]
    assert {message["event"] for message in messages} == {"alias.moved", "delta.ready"}


def send(api: Api, path: str, body: dict[str, Any], key: str) -> Any:
    return api.client.post(path, json=body, headers={"Idempotency-Key": key})


def test_a_request_with_the_same_key_gets_the_first_answer(api: Api) -> None:
    delta = api.delta_body()
    base = {"name": "again", "checkpoint": api.base()}
    for path, body in (
        ("/v1/uploads", {"kind": "checkpoint"}),
        ("/v1/bases", base),
        ("/v1/deltas", delta),
        ("/v1/webhooks", {"url": "https://a.test/"}),
        ("/v1/tenants", {"name": "acme"}),
    ):
        first = send(api, path, body, "one")
        assert first.status_code in {201, 202}
        if path == "/v1/deltas":
            api.make_ready(first.json()["delta"])
        again = send(api, path, body, "one")
        assert (again.status_code, again.json()) == (first.status_code, first.json())
        assert again.headers.get("Location") == first.headers.get("Location")
        # The key belongs to the path above; on the next one it is another request.
        other = send(api, "/v1/uploads", {"kind": "calibration"}, "one")
        assert (other.status_code, other.json()["code"]) == (409, "idempotency_key_reused")
        with api.resources.database.session_scope() as session:
            row = session.get(IdempotencyRow, (LOCAL_TENANT, "one"))
            assert row is not None
            row.created_at -= timedelta(hours=24)
    assert send(api, "/v1/uploads", {"kind": "calibration"}, "one").status_code == 201
    assert send(api, "/v1/uploads", {"kind": "checkpoint"}, "x" * 256).status_code == 422


def test_a_refused_request_keeps_no_answer(api: Api) -> None:
    body = api.delta_body()
    assert send(api, "/v1/deltas", body | {"base": "other"}, "two").status_code == 404
    assert send(api, "/v1/deltas", body, "two").status_code == 202
