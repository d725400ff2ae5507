"""Lists read a bounded number of rows by indexes, and refuse query parameters they do not have."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any

import anyio
import pytest
from sqlalchemy import Connection, event
from starlette.testclient import TestClient

from deltadock.api.access import authentication
from deltadock.api.dependencies import Resources
from deltadock.api.main import create_app
from deltadock.api.paging import Cursor
from deltadock.errors import NotFound
from deltadock.settings import Settings
from deltadock.storage.database import migrate
from deltadock.storage.repositories import (
    DeltaRepository,
    JobRepository,
    KeyRepository,
    NodeRepository,
    UploadRepository,
)
from deltadock.storage.repositories.retention import DropLimits, DroppableUploads, Rule
from deltadock.storage.tables import UploadKind
from deltadock.storage.tenancy import EVERY_TENANT, LOCAL_TENANT
from deltadock.storage.usage import measure
from tests import seed
from tests.api.support import bearer, issue_key

LISTS = (
    "/v1/deltas?limit=2",
    "/v1/deltas?limit=2&sort=name",
    "/v1/deltas?limit=2&sort=size",
    "/v1/deltas?limit=2&sort=kl",
    "/v1/deltas?limit=2&base=pilot-0.3b",
    "/v1/deltas?limit=2&method=adamix",
    "/v1/deltas?limit=2&state=ready",
    "/v1/deltas?limit=2&owner=key_x",
    "/v1/deltas?limit=2&name=maths/skills",
    "/v1/deltas?limit=2&state=ready&sort=kl&method=adamix",
    "/v1/jobs?limit=2",
    "/v1/jobs?limit=2&state=ready&state=failed",
    "/v1/jobs?limit=2&base=pilot-0.3b",
    "/v1/deltas?limit=2&text=skil",
    "/v1/deltas?limit=2&tag=x&state=ready",
    "/v1/deltas/maths/skills",
    "/v1/registry?limit=2&text=skil",
    "/v1/registry/maths/skills",
    "/v1/registry/maths/skills/history",
    "/v1/resolve/maths/skills@default",
    "/v1/models?limit=2",
    "/v1/models/maths/skills",
    "/v1/bases?limit=2",
    "/v1/nodes",
    "/v1/keys?limit=1",
    "/v1/tenants?limit=1",
    "/v1/audit?limit=2",
    "/v1/audit?limit=2&action=alias.move",
    "/v1/audit?limit=2&object=maths/skills",
    "/v1/audit?limit=2&key=key_x",
    "/",
    "/nodes",
    "/parts/totals",
    "/deltas/maths/skills",
    "/models/maths/skills",
    "/jobs",
    "/bases",
    "/new",
    "/try",
    "/audit",
    "/v1/uploads?limit=2",
    "/v1/uploads?limit=2&state=open&state=completing",
)
ACCESS = re.compile(r"FROM (api_keys|tenants)\b(?!.*LIMIT)", re.DOTALL)
"""Statements about the caller, which precede every request."""
WHOLE_TENANT = re.compile(r"(?<! totals) USING .*\((tenant_id|state|base_id)=\?\)$")
"""A walk over all rows of a tenant, state or base, unless it stops at a limit."""
SMALL = re.compile(
    r"SCAN (nodes\b|tenants\b"
    r"|jobs USING (COVERING )?INDEX ix_jobs_(begun|waiting)"
    r"|uploads USING INDEX ix_uploads_unfinished)"
)
"""Of a row per running process or tenant, of what expires, and of the jobs that wait."""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestClient]:
    settings = Settings(home=tmp_path_factory.mktemp("home"))
    migrate(settings.sqlalchemy_url)
    app = create_app(settings)
    resources: Resources = app.state.resources
    resources.blobs.prepare()
    seed.seed(resources.database, resources.blobs)
    with resources.database.session_scope() as session:
        held = {"digest": "a" * 64, "tier": "device", "bytes": 1, "references": 0, "pinned": False}
        NodeRepository(session).put(
            "node_a", "http://10.0.0.1", lives_seconds=600, base_digest="b" * 64, adopts=False,
            draining=False, capacity=1, admitted=0, delta_slots=1, deltas=[held],
        )  # fmt: skip
    with TestClient(app, headers=bearer(issue_key(settings))) as client:
        yield client


@contextmanager
def executed(
    site: TestClient, ignored: re.Pattern[str] | None = ACCESS
) -> Iterator[list[tuple[str, Any]]]:
    """Statements of the app with their parameters."""
    engine = site.app.state.resources.database.engine  # type: ignore[attr-defined]
    seen: list[tuple[str, Any]] = []

    def record(_c: Connection, _cursor: object, sql: str, parameters: Any, *_: object) -> None:
        if sql.startswith(("SELECT", "WITH")) and not (ignored and ignored.search(sql)):
            seen.append((sql, parameters))

    event.listen(engine, "before_cursor_execute", record)
    try:
        yield seen
    finally:
        event.remove(engine, "before_cursor_execute", record)


@pytest.mark.parametrize("path", LISTS)
def test_every_statement_of_a_list_uses_an_index(site: TestClient, path: str) -> None:
    """No table is scanned, nothing but a bounded set is sorted, no report but a page's is read."""
    with executed(site) as statements:
        assert site.get(path).status_code == 200
    assert 1 <= len(statements) <= 12
    reports = [sql for sql, _ in statements if "report" in sql]
    assert len(reports) == path.startswith("/deltas/")
    check_plans(site, statements)


def check_plans(site: TestClient, statements: list[tuple[str, Any]]) -> None:
    engine = site.app.state.resources.database.engine  # type: ignore[attr-defined]
    for sql, parameters in statements:
        with engine.connect() as connection:
            plan = connection.exec_driver_sql(f"EXPLAIN QUERY PLAN {sql}", parameters).all()
        steps = [row[3] for row in plan]
        scans = [step for step in steps if re.match(r"SCAN (?!\(|anon|CONSTANT)", step)]
        if "LIMIT" in sql and not any("TEMP B-TREE" in step for step in steps):
            scans = [step for step in scans if "USING INDEX" not in step]  # stops at the limit
        assert all(map(SMALL.match, scans)), (sql, steps)
        walks = [step for step in steps if WHOLE_TENANT.search(step)]
        assert not walks or "LIMIT" in sql, (sql, steps)


def test_rows_of_many_ids_are_found_by_their_ids(site: TestClient) -> None:
    ids = [f"x{number}" for number in range(100)]
    database = site.app.state.resources.database  # type: ignore[attr-defined]
    with executed(site, ignored=None) as statements, database.read_scope() as session:
        JobRepository(session, LOCAL_TENANT).show_all(ids)
        DeltaRepository(session, LOCAL_TENANT).with_ids(ids)
        KeyRepository(session, LOCAL_TENANT).names(ids)
        UploadRepository(session, LOCAL_TENANT).stored_files(UploadKind.CHECKPOINT, ids)
    assert len(statements) == 5
    check_plans(site, statements)


def test_measuring_the_store_reads_the_rows_of_its_files_only(site: TestClient) -> None:
    resources = site.app.state.resources  # type: ignore[attr-defined]
    with executed(site) as statements:
        usage = measure(resources.database, resources.blobs)
    assert usage["artifacts"].files
    assert len(statements) == 4
    check_plans(site, statements)


def test_all_that_is_asked_of_unfinished_uploads_finds_them_by_their_index(
    site: TestClient,
) -> None:
    database = site.app.state.resources.database  # type: ignore[attr-defined]
    with executed(site) as statements, database.session_scope() as session:
        uploads = UploadRepository(session, EVERY_TENANT)
        uploads.count_unfinished()
        UploadRepository(session, LOCAL_TENANT).bytes_to_arrive()
        UploadRepository(session, LOCAL_TENANT).bytes_to_import()
        uploads.unleased()
        uploads.abandoned(datetime.now(UTC), 10)
    assert len(statements) == 5
    check_plans(site, statements)


def test_a_rule_finds_the_deltas_of_an_upload_by_their_index(site: TestClient) -> None:
    database = site.app.state.resources.database  # type: ignore[attr-defined]
    now = datetime.now(UTC)
    limits = DropLimits(now=now, default=Rule.parse("ready"), texts_before=now, undo_from=now)
    of_projects = re.compile("FROM retention")
    with executed(site, of_projects) as statements, database.read_scope() as session:
        DroppableUploads(session, limits).find(["upl_a"])
    assert len(statements) == 4
    check_plans(site, statements)


def test_a_read_takes_one_thread(site: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    """The endpoint's, which makes the answer too; what does not block takes none."""
    taken: list[object] = []
    run = anyio.to_thread.run_sync

    async def run_counted(function: Any, *arguments: Any, **options: Any) -> Any:
        taken.append(function)
        return await run(function, *arguments, **options)

    monkeypatch.setattr(authentication, "CACHE_SECONDS", 60.0)
    site.app.state.resources.keys.forget()  # type: ignore[attr-defined]  # kept for a second only
    job = site.get("/v1/jobs?limit=1").json()["data"][0]["id"]
    monkeypatch.setattr(anyio.to_thread, "run_sync", run_counted)
    for path in (f"/v1/jobs/{job}", "/v1/deltas/maths/skills", "/v1/deltas?limit=2", "/v1/models"):
        taken.clear()
        assert site.get(path).status_code == 200
        assert len(taken) == 1, (path, taken)


def test_a_completion_resolves_its_model_by_one_statement(site: TestClient) -> None:
    for model in ("maths/skills", "maths/skills:1"):
        with executed(site) as statements:
            site.post("/v1/completions", json={"model": model, "prompt": "x"})
        assert len([sql for sql, _ in statements if "FROM nodes" not in sql]) == 1, statements


@pytest.mark.parametrize(
    ("path", "allowed"),
    [
        (
            "/v1/deltas?limit=1&bogus=2",
            "after, base, limit, method, name, owner, sort, state, tag, text",
        ),
        ("/v1/jobs/job_x?bogus=1", "none"),
        ("/v1/methods?bogus", "none"),
        ("/healthz?bogus=1", "none"),
    ],
)
def test_unknown_query_parameters_are_refused(site: TestClient, path: str, allowed: str) -> None:
    answer = site.get(path)
    assert answer.status_code == 422
    assert answer.json()["code"] == "invalid_input"
    assert answer.json()["parameters"] == ["bogus"]
    assert f"This route takes: {allowed}." in answer.json()["detail"]


def test_openai_routes_refuse_unknown_parameters_in_their_format(site: TestClient) -> None:
    answer = site.get("/v1/models?bogus=1")
    assert answer.status_code == 400
    assert "bogus" in answer.json()["error"]["message"]


@pytest.mark.parametrize("after", ["x", "W10", "WyJuYW1lIiwiYSIsMV0", "é", "bnVsbA"])
def test_a_cursor_of_another_sort_or_none_at_all_is_refused(site: TestClient, after: str) -> None:
    assert site.get("/v1/deltas", params={"after": after}).status_code == 404


@pytest.mark.parametrize("place", [(2**63, "x"), (1, "\0")])
def test_a_cursor_holds_only_what_databases_can_compare(place: tuple[int, str]) -> None:
    cursor = Cursor("sort", int, str)
    assert cursor.read(cursor.write((2**63 - 1, "x"))) == (2**63 - 1, "x")
    with pytest.raises(NotFound):
        cursor.read(cursor.write(place))


def test_models_are_pages_of_names_one_entry_each(site: TestClient) -> None:
    names: list[str] = []
    page: dict[str, Any] = {"last_id": None, "has_more": True}
    while page["has_more"]:
        parameters = {"limit": 2} | ({"after": page["last_id"]} if page["last_id"] else {})
        page = site.get("/v1/models", params=parameters).json()
        names += [model["id"] for model in page["data"]]
    assert names == ["pilot-0.3b", *sorted({name for name, _ in seed.READY})]


def test_the_dashboard_filters_and_pages(site: TestClient) -> None:
    page = site.get("/?name=&base=&method=&state=failed&sort=newest").text
    assert "legal/contracts-de" in page
    assert "maths/skills" not in page
    assert "No delta meets these filters" in site.get("/?name=no/such").text
