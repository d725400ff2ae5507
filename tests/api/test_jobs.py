"""Jobs: listing with filters, the log, the place in the queue, retrying."""

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from sqlalchemy import update

from deltadock.client.blocking import Client
from deltadock.storage import repositories
from deltadock.storage.repositories import JobRepository
from deltadock.storage.tables import JobState, UploadRow, UploadState
from deltadock.storage.tenancy import LOCAL_TENANT
from tests.api.support import Api


def listed(api: Api, **query: Any) -> list[str]:
    answer = api.client.get("/v1/jobs", params=query)
    assert answer.status_code == 200, answer.text
    return [job["id"] for job in answer.json()["data"]]


def fail(api: Api, job: str, code: str = "worker_lost", message: str = "Too little.") -> None:
    with api.resources.database.session_scope() as session:
        jobs = JobRepository(session, LOCAL_TENANT)
        assert jobs.acquire(job, "worker", 60)
        assert jobs.finish(job, "worker", JobState.FAILED, error_code=code, error_message=message)


def test_jobs_are_listed_newest_first_and_filtered(api: Api) -> None:
    body = api.delta_body()
    made = [
        api.client.post("/v1/deltas", json={**body, "seed": seed, "priority": priority}).json()
        for seed, priority in ((1, "normal"), (2, "low"), (3, "high"))
    ]
    first, second, third = (answer["job"]["id"] for answer in made)
    assert [answer["job"]["queue_position"] for answer in made] == [1, 2, 1]
    page = api.client.get("/v1/jobs", params={"limit": 2}).json()
    assert [job["id"] for job in page["data"]] == [third, second]
    assert [job["queue_position"] for job in page["data"]] == [1, 3]
    assert listed(api, limit=2, after=page["next"]) == [first]
    fail(api, first)
    assert listed(api, state="failed") == [first]
    assert listed(api, state=["failed", "queued"], base="tiny") == [third, second, first]
    assert api.client.get("/v1/jobs", params={"base": "another"}).status_code == 404
    assert listed(api, delta=made[1]["delta"]["id"]) == [second]
    assert listed(api, delta=f"{made[1]['delta']['name']}:2") == [second]
    assert api.client.delete(f"/v1/deltas/{made[1]['delta']['id']}").status_code == 204
    assert listed(api, delta=made[1]["delta"]["id"]) == [second], "ids of deleted ones do too"
    for unknown in ("dlt_x", "maths/none", "maths/none:1"):
        assert api.client.get("/v1/jobs", params={"delta": unknown}).status_code == 404
    moment = made[1]["job"]["created_at"]
    assert listed(api, created_from=moment) == [third, second]
    assert listed(api, created_before=moment) == [first]
    failed = api.client.get(f"/v1/jobs/{first}").json()
    assert (failed["queue_position"], failed["expected_at"]) == (None, None)
    assert failed["started_at"] <= failed["finished_at"]
    assert api.client.get("/v1/jobs", params={"after": "job_x"}).status_code == 404
    assert api.client.get("/v1/jobs", params={"state": "lost"}).status_code == 422


def test_a_failed_job_is_retried_and_its_log_tells(api: Api) -> None:
    delta = api.delta()
    job = f"/v1/jobs/{delta['job']}"
    assert api.client.post(f"{job}/retry").status_code == 409, "it is queued"
    fail(api, delta["job"])
    failed = api.client.get(job).json()
    assert (failed["error"]["code"], failed["can_retry"]) == ("worker_lost", True)
    retried = api.client.post(f"{job}/retry")
    assert retried.status_code == 202
    again = retried.json()
    assert (again["state"], again["error"], again["queue_position"]) == ("queued", None, 1)
    assert not again["can_retry"]
    log = api.client.get(f"{job}/log", params={"limit": 2}).json()
    assert [line["message"] for line in log["data"]] == [
        "Attempt 1 starts on worker.",
        "Failed (worker_lost): Too little.",
    ]
    rest = api.client.get(f"{job}/log", params={"after": log["next"]}).json()
    assert [line["message"] for line in rest["data"]] == ["Queued again on request."]
    assert rest["next"] is None
    assert api.client.post("/v1/jobs/job_x/retry").status_code == 404
    api.client.post(f"{job}/cancel")
    assert api.client.delete(f"/v1/deltas/{delta['id']}").status_code == 204
    assert api.client.post(f"{job}/retry").status_code == 409, "its delta was deleted"


def test_a_name_without_a_default_says_what_became_of_its_newest_version(api: Api) -> None:
    delta = api.delta()
    name, job = delta["name"], delta["job"]
    said = api.client.get(f"/v1/deltas/{name}").json()["detail"]
    assert said == (
        f"{name} has no default version: its newest, {name}:1, is not ready yet (queued). "
        f"See GET /v1/jobs/{job}."
    )
    fail(api, job, "non_finite_weights", "Upload an earlier checkpoint.")
    assert (
        "has failed (non_finite_weights): Upload an earlier checkpoint. See GET"
        in (api.client.get(f"/v1/deltas/{name}").json()["detail"])
    )
    artifact = api.client.get(f"/v1/deltas/{delta['id']}/artifact").json()
    assert artifact["detail"] == (
        f"{name}:1 has failed (non_finite_weights): Upload an earlier checkpoint. "
        f"See GET /v1/jobs/{job}."
    )


def test_a_job_that_is_being_cancelled_is_not_retried_yet(api: Api) -> None:
    job = f"/v1/jobs/{(job_id := api.delta()['job'])}"
    with api.resources.database.session_scope() as session:
        assert JobRepository(session, LOCAL_TENANT).acquire(job_id, "worker", 60)
    assert api.client.post(f"{job}/cancel").json()["cancel_requested"]
    refused = api.client.post(f"{job}/retry")
    assert refused.status_code == 409
    assert refused.json()["detail"].endswith("is being cancelled. Retry it once it has ended.")


def test_a_job_whose_inputs_are_at_fault_is_not_retried(api: Api) -> None:
    job = f"/v1/jobs/{(job_id := api.delta()['job'])}"
    fail(api, job_id, "non_finite_weights", "Upload an earlier checkpoint.")
    assert api.client.get(job).json()["can_retry"] is False
    refused = api.client.post(f"{job}/retry")
    assert refused.status_code == 409
    assert refused.json()["detail"].endswith("(non_finite_weights): Upload an earlier checkpoint.")
    assert api.client.get(job).json()["state"] == "failed"


def test_a_job_whose_fine_tune_was_dropped_is_not_retried(api: Api) -> None:
    job = f"/v1/jobs/{(job_id := api.delta()['job'])}"
    fail(api, job_id)
    with api.resources.database.session_scope() as session:
        session.execute(
            update(UploadRow)
            .where(UploadRow.checkpoint_digest.is_not(None))
            .values(state=UploadState.DROPPED)
        )
    refused = api.client.post(f"{job}/retry")
    assert refused.status_code == 409
    assert refused.json()["detail"].endswith("is not stored any more. Push it again.")


def test_a_job_that_waits_between_two_attempts_takes_no_longer(
    api: Api, monkeypatch: pytest.MonkeyPatch
) -> None:
    job_id = api.delta()["job"]
    now = datetime.now(UTC)
    with api.resources.database.session_scope() as session, monkeypatch.context() as patched:
        jobs = JobRepository(session, LOCAL_TENANT)
        patched.setattr(repositories.jobs, "database_now", lambda _: now - timedelta(hours=3))
        assert jobs.acquire(job_id, "worker", 60)
        patched.setattr(repositories.jobs, "database_now", lambda _: now - timedelta(hours=2))
        assert jobs.release(job_id, "worker")
    with Client(str(api.client.base_url), api.key) as client:
        job = client.job(job_id)
    assert 7200 <= job.idle_seconds < 7300
    assert job.elapsed is not None
    assert 3600 <= round(job.elapsed) < 3700
    assert "1 h elapsed" in api.client.get(f"/deltas/{job.delta}").text
