"""The audit log: every change is recorded with who made it, and records are for good."""

import json
from pathlib import Path
from typing import Any

import httpx
import pytest

from deltadock.api.access import refusals
from deltadock.cli.records import export_audit
from deltadock.storage.collection import Collector
from deltadock.storage.repositories import TenantRepository
from deltadock.storage.tables import AuditAction, Scope
from deltadock.storage.tenancy import LOCAL_TENANT
from tests.api.support import TEXT, Api, StandInNode, bearer, issue_key, serving, weights
from tests.waiting import wait_until

BY_OTHERS = {
    AuditAction.UPLOAD_DROP,
    AuditAction.DELTA_COLLECT,
    AuditAction.BLOB_REMOVE,
    AuditAction.RESTORE,
}
"""Actions without a request."""


@pytest.fixture
def settings_fields(tmp_path: Path) -> dict[str, Any]:
    return {"undo_days": 0, "import_sources": [f"file://{tmp_path}"]}


def records(api: Api, **parameters: Any) -> list[dict[str, Any]]:
    answer = api.client.get("/v1/audit", params={"limit": 200, **parameters})
    assert answer.status_code == 200, answer.text
    data: list[dict[str, Any]] = answer.json()["data"]
    return data


def change_everything(api: Api) -> None:
    """A request of each kind that changes something, and one that may not."""

    def ask(method: str, path: str, body: Any = None, status: int = 200) -> dict[str, Any]:
        answer = api.client.request(method, path, json=body)
        assert answer.status_code == status, answer.text
        content: dict[str, Any] = answer.json() if answer.content else {}
        return content

    key = ask("POST", "/v1/keys", {"name": "ci", "scopes": ["read"]}, 201)
    ask("POST", f"/v1/keys/{key['id']}/rotate", {"grace_seconds": 60}, 201)
    ask("DELETE", f"/v1/keys/{key['id']}", status=204)
    ask("POST", "/v1/tenants", {"name": "acme"}, 201)
    ask("PATCH", "/v1/tenants/acme", {"max_deltas": 9})
    ask("DELETE", f"/v1/uploads/{api.open_upload()}", status=204)
    first, second = api.delta(), api.delta(seed=2, name="maths/other")
    ask("PATCH", "/v1/bases/tiny", {"shared": True})
    api.base("spare", weights(7))
    ask("DELETE", "/v1/bases/spare", status=204)
    ask("POST", "/v1/bases/spare/restore")
    with serving(StandInNode().app()) as url:
        api.register(url)
        ask("POST", "/v1/nodes/node_a/drain", status=204)
        ask("POST", "/v1/nodes/node_a/resume", status=204)
        ask("DELETE", f"/v1/nodes/node_a/deltas/{'a' * 64}", status=204)
    ask("POST", f"/v1/jobs/{second['job']}/cancel")
    ask("POST", f"/v1/jobs/{second['job']}/retry", status=202)
    api.make_ready(first)
    ask("PATCH", "/v1/registry/maths/skills", {"tags": ["maths"]})
    ask("DELETE", f"/v1/deltas/{first['id']}", status=204)
    ask("POST", f"/v1/deltas/{first['id']}/restore")
    ask("DELETE", "/v1/registry/maths/skills", status=204)
    ask("PUT", "/v1/projects/maths/retention", {"rule": "ready"})
    hook = ask("POST", "/v1/webhooks", {"url": "https://hooks.example.com/"}, 201)["id"]
    api.make_ready(second)
    message = ask("GET", f"/v1/webhooks/{hook}/messages")["data"][0]["id"]
    ask("POST", f"/v1/webhooks/{hook}/messages/{message}/resend")
    ask("DELETE", f"/v1/webhooks/{hook}", status=204)
    reader = bearer(issue_key(api.resources.settings, scopes=[Scope.READ]))
    assert api.client.delete(f"/v1/deltas/{second['id']}", headers=reader).status_code == 403
    token = api.resources.sessions.link_token(key_of(api))
    with httpx.Client(base_url=api.client.base_url) as browser:
        assert browser.get("/sign-in", params={"token": token}).status_code == 303
        csrf = browser.get("/").text.partition('name="csrf" value="')[2].partition('"')[0]
        assert browser.post("/sign-out", data={"csrf": csrf}).status_code == 303


def test_refusals_are_recorded_up_to_a_number(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(refusals, "PER_HOUR", 2)
    api.client.patch("/v1/tenants/local", json={"max_deltas": 0}).raise_for_status()
    body = api.delta_body()
    for _ in range(3):
        assert api.client.post("/v1/deltas", json=body).json()["code"] == "quota_exceeded"
    found = records(api, action="request")
    assert [(r["object"], r["outcome"]) for r in found] == [("/v1/deltas", "quota_exceeded")] * 2
    with httpx.Client(base_url=api.client.base_url) as browser:
        form = browser.get("/sign-in").text.partition('name="csrf" value="')[2].partition('"')[0]
        for key in ("ddk_mistyped", "x", "y"):
            answer = browser.post("/sign-in", data={"csrf": form, "key": key})
            assert answer.status_code == 401
            form = answer.text.partition('name="csrf" value="')[2].partition('"')[0]
    failed = [r for r in records(api, action="session.start") if r["outcome"] != "done"]
    assert [(r["object"], r["outcome"], r["key"]) for r in failed] == [
        ("malformed", "unauthorized", None)
    ] * 2


def key_of(api: Api) -> str:
    """The id of the client's key."""
    key_id: str = api.client.get("/v1/keys").json()["data"][-1]["id"]
    return key_id


def test_every_change_is_recorded(api: Api, capsys: pytest.CaptureFixture[str]) -> None:
    change_everything(api)
    found = records(api)
    acme = records(api, tenant="acme")
    assert {r["action"] for r in found + acme} == set(AuditAction) - BY_OTHERS
    assert [r["action"] for r in acme] == ["tenant.change", "tenant.create"]
    by_key = [r for r in found if r["action"] == "delta.restore"]
    assert (by_key[0]["origin"], by_key[0]["key"]) == ("request", key_of(api))
    assert by_key[0]["key_name"] == "tests"
    assert by_key[0]["details"] == {"name": "maths/skills", "version": 1}
    assert len(by_key[0]["request_id"]) == 32
    (refused,) = records(api, action="request")
    assert (refused["outcome"], refused["details"]) == ("forbidden", {"method": "DELETE"})
    assert refused["object"].startswith("/v1/deltas/dlt_")
    assert [r["action"] for r in records(api, object="maths/skills")] == [
        "model.delete",
        "alias.move",
        "alias.move",
        "alias.move",
        "model.change",
        "alias.move",
    ]
    assert "ddk_" not in json.dumps([r for r in found if not r["action"].startswith("key.")])

    collector = Collector(api.resources.database, api.resources.blobs, api.resources.settings)
    collector.run()
    collected = records(api, action="delta.collect")
    assert {(r["origin"], r["key"]) for r in collected} == {("system", None)}
    assert records(api, key=key_of(api)) == [r for r in records(api) if r["key"] == key_of(api)]

    export_audit(0, api.resources.settings.home)
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["id"] for line in lines] == sorted(line["id"] for line in lines)
    assert [line for line in lines if line["tenant"] == LOCAL_TENANT][::-1] == records(api)
    export_audit(lines[-2]["id"], api.resources.settings.home)
    assert json.loads(capsys.readouterr().out) == lines[-1]


def test_what_the_api_does_later_is_recorded_for_whoever_asked(api: Api, tmp_path: Path) -> None:
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_bytes(TEXT)
    body = {"kind": "calibration", "source": f"file://{tmp_path}/texts"}
    upload = api.client.post("/v1/uploads", json=body).json()["id"]
    wait_until(lambda: api.client.get(f"/v1/uploads/{upload}").json()["state"] == "complete")
    found = records(api, object=upload)
    assert [r["action"] for r in found] == ["upload.complete", "upload.file", "upload.create"]
    assert {(r["key"], r["origin"]) for r in found} == {(key_of(api), "request")}
    assert len({r["request_id"] for r in found}) == 1


def test_pages(api: Api) -> None:
    for _ in range(3):
        api.open_upload()
    seen, after = [], None
    while seen == [] or after:
        page = api.client.get(
            "/v1/audit", params={"limit": 2} | ({"after": after} if after else {})
        ).json()
        seen += page["data"]
        after = page["next"]
    assert seen == records(api)
    assert api.client.get("/v1/audit?after=x").status_code == 404


def test_a_tenants_admin_sees_its_own_records_alone(api: Api) -> None:
    with api.resources.database.session_scope() as session:
        acme = TenantRepository(session).add("acme").id
    api.open_upload()
    headers = bearer(issue_key(api.resources.settings, tenant=acme))
    seen = api.client.get("/v1/audit", headers=headers).json()["data"]
    assert {record["tenant"] for record in seen} == {acme}
    named = api.client.get("/v1/audit?tenant=local", headers=headers)
    assert (named.status_code, named.json()["code"]) == (403, "forbidden")


def test_a_change_that_is_refused_leaves_no_record(api: Api) -> None:
    before = records(api)
    answer = api.client.post("/v1/bases", json={"name": "b", "checkpoint": "a" * 64})
    assert answer.status_code == 404
    assert records(api) == before


def test_the_page_names_the_deltas_of_jobs_and_uploads(api: Api) -> None:
    delta = api.delta()
    api.delta(name="a/later")  # of the same checkpoint
    api.client.post(f"/v1/jobs/{delta['job']}/cancel")
    rows = api.client.get("/audit").text.split("<tr>")[1:]
    for action, name in (
        ("job.cancel", f"{delta['name']}:{delta['version']}"),
        ("upload.complete", delta["name"]),
        ("upload.complete", "tiny"),
        ("upload.complete", "text.txt"),
    ):
        assert any(action in row and f"<small>{name}</small>" in row for row in rows), action
