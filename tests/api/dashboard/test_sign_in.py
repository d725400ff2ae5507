"""Signing in to the dashboard: form, one-time link, session, CSRF token, signing out."""

import re
from collections.abc import Iterator

import httpx
import pytest

from deltadock.api.access import sessions
from deltadock.storage.tables import Scope
from tests.api.support import Api, issue_key

TOKEN = re.compile(r'name="csrf" value="([^"]+)"')


@pytest.fixture
def browser(api: Api) -> Iterator[httpx.Client]:
    """A client without a key that keeps cookies."""
    with httpx.Client(base_url=api.client.base_url, timeout=30) as client:
        yield client


def sign_in(browser: httpx.Client, key: str, target: str = "/") -> httpx.Response:
    form = browser.get("/sign-in", params={"next": target})
    [token] = TOKEN.findall(form.text)
    return browser.post("/sign-in", data={"key": key, "csrf": token, "next": target})


def csrf_of(browser: httpx.Client) -> str:
    found: list[str] = re.findall(r'name="csrf-token" content="([^"]+)"', browser.get("/").text)
    return found[0]


def test_pages_lead_to_the_form_and_back(api: Api, browser: httpx.Client) -> None:
    answer = browser.get("/deltas/dlt_x?a=b")
    assert (answer.status_code, answer.headers["location"]) == (
        303,
        "/sign-in?next=%2Fdeltas%2Fdlt_x%3Fa%3Db",
    )
    part = browser.get("/parts/totals", headers={"HX-Request": "true"})
    assert part.headers["hx-redirect"] == "/sign-in"
    answer = sign_in(browser, api.key, "/nodes")
    assert (answer.status_code, answer.headers["location"]) == (303, "/nodes")
    cookie = answer.headers["set-cookie"].lower()
    assert "httponly" in cookie
    assert "samesite=lax" in cookie
    assert "secure" not in cookie, "the server speaks http here"
    assert api.key not in cookie
    assert browser.get("/nodes").status_code == 200
    assert browser.get("/v1/bases").status_code == 200
    assert browser.get("/docs").status_code == 200


@pytest.mark.parametrize(
    "target", ["https://evil.example", "//evil.example", "/\\evil", "x", "/\t"]
)
def test_it_leads_to_this_server_only(api: Api, browser: httpx.Client, target: str) -> None:
    assert sign_in(browser, api.key, target).headers["location"] == "/"


def test_wrong_keys_and_forged_forms(api: Api, browser: httpx.Client) -> None:
    assert "not an API key" in sign_in(browser, "ddk_x").text
    answer = sign_in(browser, issue_key(api.resources.settings, scopes=[Scope.INFER]))
    assert (answer.status_code, "needs the scope read" in answer.text) == (403, True)
    for form in ({"key": api.key}, {"key": api.key, "csrf": "x"}):
        assert browser.post("/sign-in", data=form).status_code == 403
    assert browser.post("/sign-in", content=bytes(10_000)).status_code == 422
    browser.cookies.set(sessions.COOKIE, "forged")
    assert browser.get("/").headers["location"].startswith("/sign-in")
    assert browser.get("/v1/bases").status_code == 401


def test_changes_need_the_sessions_token(api: Api, browser: httpx.Client) -> None:
    delta = api.delta()
    sign_in(browser, api.key)
    cancel = f"/v1/jobs/{delta['job']}/cancel"
    for headers in ({}, {"X-CSRF-Token": "x"}):
        answer = browser.post(cancel, headers=headers)
        assert (answer.status_code, answer.json()["code"]) == (403, "forbidden")
    token = {"X-CSRF-Token": csrf_of(browser)}
    assert browser.post(cancel, headers=token).json()["state"] == "cancelled"


def test_signing_out(api: Api, browser: httpx.Client) -> None:
    sign_in(browser, api.key)
    assert browser.post("/sign-out").status_code == 403
    assert browser.post("/sign-out", data={"csrf": csrf_of(browser)}).status_code == 303
    assert browser.get("/").status_code == 303


def test_a_session_ends_with_its_key_and_with_time(
    api: Api, browser: httpx.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = issue_key(api.resources.settings)
    sign_in(browser, key)
    monkeypatch.setattr(sessions, "SESSION_SECONDS", -1)
    assert browser.get("/").status_code == 303
    monkeypatch.undo()
    assert browser.get("/").status_code == 200
    newest = api.client.get("/v1/keys").json()["data"][0]["id"]
    api.client.delete(f"/v1/keys/{newest}")
    assert browser.get("/").status_code == 303


def test_a_link_signs_in_once(api: Api, browser: httpx.Client) -> None:
    key_id = api.client.get("/v1/keys").json()["data"][0]["id"]
    token = api.resources.sessions.link_token(key_id)
    link = {"token": token}
    assert browser.get("/sign-in", params=link).headers["location"] == "/"
    assert browser.get("/").status_code == 200
    again = browser.get("/sign-in", params=link | {"next": "/jobs"})
    assert (again.status_code, again.headers["location"]) == (303, "/jobs")
    used = httpx.get(f"{api.client.base_url}/sign-in", params=link)
    assert (used.status_code, "used before" in used.text) == (401, True)
    assert "expired" in httpx.get(f"{api.client.base_url}/sign-in?token=x").text
