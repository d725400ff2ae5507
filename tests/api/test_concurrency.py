"""Requests at once: more than there are threads and connections, on both databases."""

from collections import Counter
from typing import Any

import anyio
import httpx
import pytest

from tests.api.support import Api

AT_ONCE = 120
"""Twice the threads, and the connections, of a process, and some that wait."""


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
    assert read_at_once(api, url) == {200: AT_ONCE}


def test_jobs_are_followed_at_once(api: Api) -> None:
    job = api.delta()["job"]
    api.client.post(f"/v1/jobs/{job}/cancel").raise_for_status()
    assert read_at_once(api, f"/v1/jobs/{job}/events") == {200: AT_ONCE}
    assert read_at_once(api, "/v1/jobs/job_x/events") == {404: AT_ONCE}


def read_at_once(api: Api, url: str) -> Counter[int]:
    """The statuses of that many requests at once."""
    statuses: Counter[int] = Counter()

    async def read(client: httpx.AsyncClient) -> None:
        statuses[(await client.get(url)).status_code] += 1

    async def read_all() -> None:
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
                group.start_soon(read, client)

    anyio.run(read_all)
    return statuses
