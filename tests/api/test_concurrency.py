"""Requests at once: more than there are threads and connections, on both databases."""

import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final

import anyio
import httpx
import pytest
from sqlalchemy import text

from deltadock.api.quotas import within_bytes
from deltadock.storage.repositories import UploadRepository
from deltadock.storage.tables import UploadFileRow, UploadKind
from deltadock.storage.tenancy import LOCAL_TENANT
from tests.api.support import Api

AT_ONCE: Final = 100
"""Twice the threads, and the connections, of a process, and some that wait."""
WAITING: Final = text(
    "SELECT count(*) FROM pg_locks JOIN pg_database ON pg_database.oid = database "
    "WHERE datname = current_database() AND NOT granted"
)
"""The transactions that wait for a lock."""


@pytest.fixture(params=["sqlite", "postgres"])
def settings_fields(request: pytest.FixtureRequest) -> dict[str, Any]:
    if request.param == "sqlite":
        return {}
    return {"database_url": request.getfixturevalue("migrated_postgres")}


@pytest.mark.parametrize(
    "path", ["/v1/deltas/{id}", "/v1/deltas?base=tiny", "/v1/jobs/{job}/log", "/?base=tiny"]
)
def test_reads_at_once_are_answered(api: Api, path: str) -> None:
    delta = api.delta()
    url = path.format(id=delta["id"], job=delta["job"])
    assert at_once(api, url) == {200: AT_ONCE}


def test_jobs_are_followed_at_once(api: Api) -> None:
    job = api.delta()["job"]
    api.client.post(f"/v1/jobs/{job}/cancel").raise_for_status()
    assert at_once(api, f"/v1/jobs/{job}/events") == {200: AT_ONCE}
    assert at_once(api, "/v1/jobs/job_x/events") == {404: AT_ONCE}


@pytest.mark.parametrize("settings_fields", ["postgres"], indirect=True)
def test_an_upload_and_a_delta_of_a_tenant_with_quotas_do_not_block_each_other(api: Api) -> None:
    limits = {"max_bytes": 10**9, "max_deltas": 9, "max_jobs": 9}
    api.client.patch(f"/v1/tenants/{LOCAL_TENANT}", json=limits).raise_for_status()
    body = api.delta_body()
    with ThreadPoolExecutor(1) as pool:
        with api.resources.database.session_scope() as session:
            file = UploadFileRow(path="a", size=9, sha256="a" * 64, stored=False, tensors=[])
            with within_bytes(session, LOCAL_TENANT):
                UploadRepository(session, LOCAL_TENANT).add(UploadKind.CHECKPOINT, [file])
                answer = pool.submit(api.client.post, "/v1/deltas", json=body)
                while not session.scalar(WAITING):
                    time.sleep(0.01)
        assert answer.result().status_code == 202


def test_writes_at_once_are_answered(api: Api) -> None:
    job = api.delta()["job"]
    assert at_once(api, "/v1/uploads", "POST", {"kind": "checkpoint"}) == {201: AT_ONCE}
    assert at_once(api, f"/v1/jobs/{job}/cancel", "POST") == {200: AT_ONCE}


def at_once(
    api: Api, url: str, method: str = "GET", body: dict[str, Any] | None = None
) -> Counter[int]:
    """The statuses of that many requests at once."""
    statuses: Counter[int] = Counter()

    async def ask(client: httpx.AsyncClient) -> None:
        statuses[(await client.request(method, url, json=body)).status_code] += 1

    async def ask_all() -> None:
        async with (
            httpx.AsyncClient(
                base_url=api.client.base_url,
                headers=api.client.headers,
                timeout=60,
                limits=httpx.Limits(max_connections=None),
            ) as client,
            anyio.create_task_group() as group,
        ):
            for _ in range(AT_ONCE):
                group.start_soon(ask, client)

    anyio.run(ask_all)
    return statuses
