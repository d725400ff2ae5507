"""Who may do what: every route with every scope, of one's own tenant and of another."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from deltadock.api.access.rules import (
    ADMIN,
    ADMIN_PAGE,
    INFER,
    MODELS,
    NODE,
    OPERATOR,
    OPERATOR_PAGE,
    PAGE,
    PUBLIC,
    READ,
    RULES,
    WRITE,
    Rule,
    RuleTable,
    operations,
)
from deltadock.storage.repositories import TenantRepository
from deltadock.storage.tables import Scope
from deltadock.storage.tenancy import LOCAL_TENANT
from tests.api.support import Api, StandInNode, bearer, issue_key, weights

ROLES = {
    "read": (Scope.READ,),
    "write": (Scope.WRITE,),
    "infer": (Scope.INFER,),
    "admin": (Scope.ADMIN,),
}
ALLOWED: dict[str, set[str]] = {
    "public": {"nobody", "read", "write", "infer", "admin", "operator"},
    "read": {"read", "operator"},
    "page": {"read", "operator"},
    "write": {"write", "operator"},
    "infer": {"infer", "operator"},
    "models": {"read", "infer", "operator"},
    "admin": {"admin", "operator"},
    "operator": {"operator"},
    "node": set(),
}
"""Which callers each rule admits; `operator` has every scope of the operator's tenant."""
ACCESS = Path(__file__).parents[3] / "docs" / "operate" / "access.md"
KINDS = {
    PUBLIC: "public",
    READ: "read",
    PAGE: "page",
    ADMIN_PAGE: "admin",
    OPERATOR_PAGE: "operator",
    WRITE: "write",
    INFER: "infer",
    MODELS: "models",
    ADMIN: "admin",
    OPERATOR: "operator",
    NODE: "node",
}


def hides(operation: str) -> bool:
    """Whether an operation is about an object of a tenant, which is a 404 for any other tenant."""
    rule, (method, path) = RULES[operation], operation.split(" ")
    return (
        "{" in path
        and rule not in {NODE, OPERATOR}
        and not path.startswith("/v1/projects/")  # each tenant has its own of every name
        and not (path.startswith("/parts/deltas/") and method == "GET")  # what is gone is removed
    )


def documented() -> str:
    """The table of docs/operate/access.md."""
    columns = ["nobody", *ROLES, "operator"]
    lines = [
        f"| route | {' | '.join(columns)} | of another tenant |",
        f"|---|{'---|' * (len(columns) + 1)}",
    ]
    for operation, rule in RULES.items():
        allowed = ALLOWED[KINDS[rule]]
        cells = " | ".join("yes" if column in allowed else "" for column in columns)
        where = "node's secret" if rule is NODE else "404" if hides(operation) else ""
        lines.append(f"| `{re.sub(':[a-z]+}', '}', operation)}` | {cells} | {where} |")
    return "\n".join(lines)


def test_the_documented_table_is_that_of_the_rules() -> None:
    assert documented() in ACCESS.read_text(encoding="utf-8"), f"Replace its table:\n{documented()}"


class TestTable:
    @pytest.fixture
    def settings_fields(self) -> dict[str, Any]:
        return {"node_secret": "s3cret"}

    def test_every_route_admits_whom_its_rule_names(self, api: Api, acme: str) -> None:
        """A row a route, a column a caller: refused with 401 or 403, or let through."""
        settings = api.resources.settings
        keys = {name: issue_key(settings, tenant=acme, scopes=s) for name, s in ROLES.items()}
        callers = {"nobody": {}, "operator": bearer(api.key)}
        callers |= {name: bearer(key) for name, key in keys.items()}
        wrong = {}
        with httpx.Client(base_url=api.client.base_url, timeout=30) as client:
            for operation, rule in RULES.items():
                method, path = operation.split(" ")
                if operation.endswith("/events"):
                    continue  # streams; the same dependency as GET /v1/jobs/{job_id}
                path = re.sub(r"{[^}]*}", "x", path.replace("{delta_id:prefix}", "dlt_x"))
                admitted = set()
                for name, headers in callers.items():
                    answer = client.request(method, path, headers=headers)
                    refused = answer.status_code in {401, 403} or (
                        answer.status_code == 303
                        and answer.headers["location"].startswith("/sign-in?")
                    )
                    # The form of the sign-in has a token of its own.
                    if not refused or rule is PUBLIC:
                        admitted.add(name)
                if admitted != ALLOWED[KINDS[rule]]:
                    wrong[operation] = admitted
        assert wrong == {}


def test_a_route_without_a_rule_stops_the_start(settings: Any) -> None:
    app = FastAPI(openapi_url=None, docs_url=None, redoc_url=None)

    @app.post("/v1/new/{thing}")
    def new(thing: str) -> None:
        """A route that nobody has a rule for."""

    assert operations(app.routes) == {"POST /v1/new/{thing}"}
    with pytest.raises(RuntimeError, match=r"POST /v1/new/\{thing\}"):
        RuleTable(app.routes)


def test_no_rule_is_for_a_route_that_is_gone(api: Api) -> None:
    from deltadock.api.main import app

    assert set(RULES) == operations(app.routes)
    unknown = RuleTable(app.routes).find("GET", "/v1/unknown")
    assert unknown == Rule(tuple(Scope)), "a 404 needs a key too"


@pytest.fixture
def acme(api: Api) -> str:
    """Another tenant's id."""
    with api.resources.database.session_scope() as session:
        return TenantRepository(session).add("acme").id


@pytest.fixture
def other(api: Api, acme: str) -> Iterator[Api]:
    """The api as another tenant uses it."""
    headers = bearer(issue_key(api.resources.settings, tenant=acme))
    with httpx.Client(base_url=api.client.base_url, timeout=30, headers=headers) as client:
        yield Api(client, api.resources)


def unknown_like(name: str) -> str:
    """A name or id of the same form that nobody has."""
    kind, _, rest = name.rpartition("_")
    return f"{kind}_{'b' * len(rest)}" if kind else name[::-1] if len(name) > 3 else name


def test_another_tenants_objects_are_not_found(api: Api, other: Api) -> None:
    body = api.delta_body()
    upload = api.open_upload()
    delta = api.client.post("/v1/deltas", json=body).json()["delta"]
    api.make_ready(delta)
    base = api.client.get("/v1/bases/tiny").json()["id"]
    key = api.client.get("/v1/keys").json()["data"][0]["id"]
    hook = api.client.post("/v1/webhooks", json={"url": "https://hooks.example.com/"}).json()["id"]
    project, _, model = body["name"].partition("/")
    ids = {
        "{model:path}": delta["id"], "{upload_id}": upload, "{path:file}": "config.json",
        "{path:path}": "model.safetensors", "{number}": "1", "{base}": base,
        "{delta_id:reference}": delta["id"], "{delta_id:prefix}": delta["id"],
        "{reference:reference}": delta["id"], "{job_id}": delta["job"], "{key_id}": key,
        "{webhook_id}": hook, "{message_id}": "msg_x", "{tenant}": LOCAL_TENANT,
        "{project}": project, "{model}": model, "{alias}": "default",
    }  # fmt: skip
    unknown = {field: unknown_like(value) for field, value in ids.items()}
    bodies = {"aliases": {"version": 1}, "generate": {"prompt": "x"}}
    seen: dict[str, int] = {}
    told: dict[str, tuple[str, str]] = {}

    def ask(operation: str, names: dict[str, str]) -> str:
        """What another tenant is told, with the object's name left out."""
        method, path = operation.split(" ")
        kind = next((bodies[part] for part in bodies if f"/{part}" in path), {})
        path = re.sub(r"{[^}]*}", lambda found: names[found[0]], path)
        content = kind if method in {"POST", "PUT", "PATCH"} and "/files/" not in path else None
        answer = other.client.request(method, path, json=content)
        seen[operation] = answer.status_code
        text = re.sub("[0-9a-f]{32}", "a request's id", answer.text)
        for name in (f"{names['{project}']}/{names['{model}']}", *names.values()):
            text = text.replace(name, "NAME") if len(name) > 6 else text
        return text

    for operation in filter(hides, RULES):
        told[operation] = ask(operation, ids), ask(operation, unknown)
    assert {operation: status for operation, status in seen.items() if status != 404} == {}
    assert {operation: texts for operation, texts in told.items() if len(set(texts)) > 1} == {}
    for model in (delta["id"], body["name"], "tiny"):
        ask = {"model": model, "prompt": "x"}
        answer = other.client.post("/v1/completions", json=ask)
        assert answer.json()["error"]["code"] == "model_not_found"
    for listing in ("/v1/bases", "/v1/deltas", "/v1/jobs", "/v1/models"):
        assert other.client.get(listing).json()["data"] == [], listing
    assert delta["name"] not in other.client.get("/").text


def test_only_the_tenants_own_names_are_suggested(api: Api, other: Api) -> None:
    api.delta(name="maths/skills")
    routes = {
        "/v1/deltas/maths/skils:1": "'maths/skills'",
        "/v1/registry/maths/skill": "'maths/skills'",
        "/v1/bases/tny": "'tiny'",
        "/v1/models/tinyy": "'tiny'",
    }
    for route, name in routes.items():
        assert f"Did you mean {name}?" in api.client.get(route).text, route
        assert "Did you mean" not in other.client.get(route).text, route


def test_what_another_tenant_uploaded_cannot_be_used_or_told(api: Api, other: Api) -> None:
    """Digests of another tenant's checkpoint, text and equal request give what unknown ones do."""
    body = api.delta_body()
    delta = api.client.post("/v1/deltas", json=body).json()["delta"]
    api.make_ready(delta)
    assert other.client.post("/v1/deltas", json=body).status_code == 404, "the base is private"
    base = {"name": "mine", "checkpoint": body["checkpoint"]}
    assert other.client.post("/v1/bases", json=base).status_code == 404
    other.base()
    answer = other.client.post("/v1/deltas", json=body)
    assert (answer.status_code, "checkpoint" in answer.json()["detail"]) == (404, True)
    preview = {name: body[name] for name in ("base", "checkpoint", "method", "bits")}
    assert other.client.post("/v1/previews", json=preview).status_code == 404
    assert other.delta_body()["checkpoint"] == body["checkpoint"]
    text = {"source": "text", "digest": api.calibration(b"Only here. " * 40)}
    answer = other.client.post("/v1/deltas", json={**body, "calibration": text})
    assert (answer.status_code, "calibration" in answer.json()["detail"]) == (404, True)
    answer = other.client.post("/v1/deltas", json=body)
    assert answer.status_code == 202, "compressed anew, though an equal artifact exists"
    assert answer.json()["delta"]["version"] == 1


def test_a_shared_base_is_read_and_compressed_against_but_not_changed(
    api: Api, other: Api, acme: str, node: StandInNode, node_url: str
) -> None:
    digest = api.base()
    assert other.client.patch("/v1/bases/tiny", json={"shared": True}).status_code == 403
    shared = api.client.patch("/v1/bases/tiny", json={"shared": True}).json()
    assert shared["shared"]
    assert other.client.get("/v1/bases/tiny").json() == shared
    assert [base["name"] for base in other.client.get("/v1/bases").json()["data"]] == ["tiny"]
    api.register(node_url, base=digest)
    ask = {"model": "tiny", "prompt": "x"}
    assert other.client.post("/v1/completions", json=ask).status_code == 200
    assert node.requests[-1]["headers"]["deltadock-tenant"] == acme
    body = {
        "name": "a/b", "base": "tiny", "checkpoint": other.checkpoint(weights(1)),
        "method": "adamix", "bits": 1.0,
    }  # fmt: skip
    delta = other.client.post("/v1/deltas", json=body)
    assert delta.status_code == 202, delta.text
    other.base()  # a base of one's own name comes first
    assert not other.client.get("/v1/bases/tiny").json()["shared"]
    api.client.patch("/v1/bases/tiny", json={"shared": False})
    assert other.client.get(f"/v1/bases/{shared['id']}").status_code == 404
    kept = other.client.get(f"/v1/deltas/{delta.json()['delta']['id']}").json()
    assert kept["base"]["id"] == shared["id"]


def test_nodes_do_not_tell_what_another_tenant_uses(api: Api, other: Api) -> None:
    base = api.base()
    delta = api.delta()
    digest = api.make_ready(delta)
    held = {"digest": digest, "tier": "device", "bytes": 5}
    foreign = {"digest": "e" * 64, "tier": "disk", "bytes": 7}
    api.register("http://127.0.0.1:1", base=base, deltas=[held, foreign])
    [node] = api.client.get("/v1/nodes").json()["data"]
    assert [h["artifact"] for h in node["deltas"]] == [digest, "e" * 64]
    serving = {
        "id": "node_a", "state": "ready", "base": None, "base_name": None, "adopts": True,
        "url": None, "capacity": None, "admitted": None, "delta_slots": None, "held": {},
        "deltas": [], "usage": None, "started_at": None, "seen_at": None,
    }  # fmt: skip
    assert other.client.get("/v1/nodes").json()["data"] == [serving]
    api.register("http://127.0.0.1:1", base=base, deltas=[held, foreign], adopts=False)
    assert other.client.get("/v1/nodes").json()["data"] == [], "it serves no base of theirs"
    other.base()
    assert other.make_ready(other.delta()) == digest
    serving |= {"adopts": False, "base": base, "base_name": "tiny"}
    assert other.client.get("/v1/nodes").json()["data"] == [serving]
    page = other.client.get("/parts/nodes").text
    assert "tiny" in page
    assert not [told for told in (digest[:12], "127.0.0.1:1", "sequences", "slots") if told in page]
