"""API keys: their format, their life, and requests refused before their body is read."""

import os
import re
import socket
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any
from urllib.parse import urlsplit

import psutil
import pytest

from deltadock.storage.api_keys import hmac_of, new_key, prefix_of
from deltadock.storage.repositories import KeyRepository
from deltadock.storage.tables import ApiKeyRow
from tests.api.support import Api, bearer

SHAPE = re.compile(r"ddk_[0-9A-Za-z]{8}_[0-9A-Za-z]{38}")


def test_a_key_has_a_prefix_and_a_checksum() -> None:
    key = new_key()
    assert SHAPE.fullmatch(key)
    assert prefix_of(key) == key[:12]
    for wrong in (key[:-1], key + "0", key.replace("_", "-"), "", "ddk_é", key.upper()):
        assert prefix_of(wrong) is None, wrong
    for at in (5, 20, len(key) - 1):
        other = "a" if key[at] != "a" else "b"
        assert prefix_of(key[:at] + other + key[at + 1 :]) is None, "one character mistyped"
    assert hmac_of(key, "a") != hmac_of(key, "b")


def made(api: Api, **body: Any) -> dict[str, Any]:
    answer = api.client.post("/v1/keys", json={"name": "ci", "scopes": ["read"], **body})
    assert answer.status_code == 201, answer.text
    key: dict[str, Any] = answer.json()
    return key


def pages(api: Api, path: str) -> Iterator[dict[str, Any]]:
    """The entries of a list in pages of one."""
    page: dict[str, Any] = {"next": ""}
    while page["next"] is not None:
        after = {"after": page["next"]} if page["next"] else {}
        page = api.client.get(path, params={"limit": 1, **after}).json()
        yield from page["data"]


def status(api: Api, key: str, path: str = "/v1/bases") -> int:
    return api.client.get(path, headers=bearer(key)).status_code


def test_a_key_is_shown_once_and_only_its_hmac_is_stored(api: Api) -> None:
    key = made(api, scopes=["write", "read"])
    assert (key["name"], key["scopes"]) == ("ci", ["read", "write"])
    assert SHAPE.fullmatch(key["key"])
    listed = api.client.get("/v1/keys")
    assert [found["name"] for found in listed.json()["data"]] == ["ci", "tests"]
    assert list(pages(api, "/v1/keys")) == listed.json()["data"]
    found = api.client.get("/v1/keys", params={"prefix": key["prefix"]}).json()
    assert found == {"data": listed.json()["data"][:1], "next": None}
    assert api.client.get("/v1/keys?prefix=ddk_").json()["data"] == []
    with api.resources.database.read_scope() as session:
        row = session.get_one(ApiKeyRow, key["id"])
    stored = " ".join(str(value) for value in vars(row).values())
    assert key["key"].removeprefix(key["prefix"]) not in stored + listed.text
    assert row.hmac == hmac_of(key["key"], api.resources.keys.secret)


@pytest.mark.parametrize("authorization", [None, "", "Bearer", "Basic YTpi", "Bearer x", "{key}x"])
def test_without_a_valid_key_the_answer_says_how_to_get_one(
    api: Api, authorization: str | None
) -> None:
    del api.client.headers["Authorization"]
    headers = {} if authorization is None else {"Authorization": authorization}
    answer = api.client.get("/v1/bases", headers=headers)
    assert (answer.status_code, answer.json()["code"]) == (401, "unauthorized")
    assert answer.headers["www-authenticate"] == 'Bearer realm="deltadock"'
    openai = api.client.post("/v1/completions", headers=headers, json={})
    assert openai.json()["error"]["code"] == "unauthorized"


def test_a_well_formed_key_of_another_server_is_refused(api: Api) -> None:
    key = made(api)["key"]
    assert status(api, new_key()) == 401
    forged = new_key()[: len("ddk_12345678")] + key[len("ddk_12345678") :]
    assert status(api, forged) == 401


def test_revoking(api: Api) -> None:
    key = made(api)
    assert status(api, key["key"]) == 200
    for _ in range(2):
        assert api.client.delete(f"/v1/keys/{key['id']}").status_code == 204
    answer = api.client.get("/v1/bases", headers=bearer(key["key"]))
    assert (answer.status_code, "revoked" in answer.json()["detail"]) == (401, True)
    assert api.client.post(f"/v1/keys/{key['id']}/rotate", json={}).status_code == 409


def test_a_key_that_is_revoked_while_it_is_checked_is_not_remembered(
    api: Api, monkeypatch: pytest.MonkeyPatch
) -> None:
    key, keys = made(api)["key"], api.resources.keys
    is_active = KeyRepository.is_active

    def revoked_meanwhile(repository: KeyRepository, row: ApiKeyRow) -> bool:
        keys.forget()
        return is_active(repository, row)

    keys.caller_of_key(key)
    assert keys.recall(key=key) is not None
    monkeypatch.setattr(KeyRepository, "is_active", revoked_meanwhile)
    keys.caller_of_key(key)
    assert keys.recall(key=key) is None


def test_expiry(api: Api) -> None:
    soon = datetime.now(UTC) + timedelta(minutes=1)
    key = made(api, expires_at=soon.isoformat())
    with api.resources.database.session_scope() as session:
        session.get_one(ApiKeyRow, key["id"]).expires_at = datetime.now(UTC)
    answer = api.client.get("/v1/bases", headers=bearer(key["key"]))
    assert (answer.status_code, "expired" in answer.json()["detail"]) == (401, True)


def test_rotating_keeps_the_old_key_for_the_grace(api: Api) -> None:
    old = made(api, scopes=["read", "infer"])
    new = api.client.post(f"/v1/keys/{old['id']}/rotate", json={"grace_seconds": 60}).json()
    assert (new["name"], new["scopes"]) == (old["name"], old["scopes"])
    assert {status(api, old["key"]), status(api, new["key"])} == {200}
    listed = {key["id"]: key for key in api.client.get("/v1/keys").json()["data"]}
    left = datetime.fromisoformat(listed[old["id"]]["expires_at"]) - datetime.now(UTC)
    assert timedelta(seconds=30) < left <= timedelta(seconds=60)
    again = api.client.post(f"/v1/keys/{new['id']}/rotate", json={"grace_seconds": 0}).json()
    assert (status(api, new["key"]), status(api, again["key"])) == (401, 200)


def test_the_last_use_is_written_in_the_background(api: Api) -> None:
    key = made(api)
    assert key["last_used_at"] is None
    status(api, key["key"])
    api.resources.keys.write_uses()
    found = api.client.get("/v1/keys").json()["data"][0]
    used = datetime.fromisoformat(found["last_used_at"])
    assert abs(used - datetime.now(UTC)) < timedelta(seconds=30)


def test_an_operator_makes_a_tenants_first_key(api: Api) -> None:
    tenant = api.client.post("/v1/tenants", json={"name": "acme", "max_jobs": 3}).json()
    assert tenant["limits"]["max_jobs"] == 3
    assert api.client.post("/v1/tenants", json={"name": "acme"}).status_code == 409
    key = made(api, tenant="acme", scopes=["admin"])
    assert (key["tenant"], key["tenant_name"]) == (tenant["id"], "acme")
    theirs = bearer(key["key"])
    own = api.client.post("/v1/keys", json={"name": "a", "scopes": ["read"]}, headers=theirs)
    assert own.json()["tenant"] == tenant["id"]
    body = {"name": "a", "scopes": ["read"], "tenant": "local"}
    assert api.client.post("/v1/keys", json=body, headers=theirs).status_code == 403
    listed = api.client.get("/v1/keys", params={"tenant": "acme"}).json()["data"]
    assert {found["id"] for found in listed} == {key["id"], own.json()["id"]}
    assert [found["name"] for found in pages(api, "/v1/tenants")] == ["acme", "local"]


@pytest.mark.parametrize(
    ("path", "code"),
    [("/v1/uploads/upl_x/files/config.json", 401), ("/v1/nodes/node_a", 401)],
)
class TestBody:
    @pytest.fixture
    def settings_fields(self) -> dict[str, Any]:
        return {"node_secret": "s3cret"}

    def test_a_refused_body_is_not_read(self, api: Api, path: str, code: int) -> None:
        """The answer comes before the body; of 200 MiB that come all the same, nothing is kept."""
        address = urlsplit(str(api.client.base_url))
        size = 200 * 2**20
        before = psutil.Process(os.getpid()).memory_info().rss
        peak = before
        with socket.create_connection((address.hostname, address.port or 80), 30) as client:
            head = f"PUT {path} HTTP/1.1\r\nHost: x\r\nContent-Length: {size}\r\n\r\n"
            client.sendall(head.encode())
            answer = client.recv(65536)
            assert answer.startswith(f"HTTP/1.1 {code} ".encode())
            chunk = bytes(2**20)
            try:
                for _ in range(size // len(chunk)):
                    client.sendall(chunk)
                    peak = max(peak, psutil.Process(os.getpid()).memory_info().rss)
            except OSError:  # the server may close the connection
                pass
        assert peak - before < 20 * 2**20
        assert api.client.get("/healthz").status_code == 200


def test_a_repeated_request_makes_no_second_key(api: Api) -> None:
    body, once = {"name": "ci", "scopes": ["write", "read"]}, {"Idempotency-Key": "a"}
    first = api.client.post("/v1/keys", json=body, headers=once).json()
    again = api.client.post("/v1/keys", json=body, headers=once)
    assert (again.status_code, again.json()["key"]) == (409, first["id"])
    rotate, once = f"/v1/keys/{first['id']}/rotate", {"Idempotency-Key": "b"}
    second = api.client.post(rotate, json={}, headers=once)
    assert second.json()["key"] not in {first["key"], ""}
    again = api.client.post(rotate, json={}, headers=once)
    assert (again.status_code, again.json()["key"]) == (409, second.json()["id"])
    names = [key["name"] for key in api.client.get("/v1/keys").json()["data"]]
    assert names.count("ci") == 2
