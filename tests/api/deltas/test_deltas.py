"""Deltas: validation, deduplication, versions, reports and cancellation."""

import json
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import redis
from sqlalchemy import event

from deltadock.api import health
from deltadock.compression.options import default_method
from deltadock.storage.repositories import DeltaRepository, JobRepository
from deltadock.storage.repositories.jobs import JobProgress
from deltadock.storage.tables import JobState
from deltadock.storage.tenancy import LOCAL_TENANT
from tests.api.support import CONFIG, Api, sha256, weights


def queued_jobs(broker_url: str) -> list[str]:
    """Job ids of the compress tasks that are queued in the broker."""
    with redis.Redis.from_url(broker_url, decode_responses=True) as connection:
        messages = connection.lrange("gpu", 0, -1)
    assert isinstance(messages, list)
    headers = [json.loads(message)["headers"] for message in messages]
    assert {header["task"] for header in headers} <= {"deltadock.compress"}
    return [json.loads(header["argsrepr"].replace("'", '"'))[0] for header in headers]


def test_creating_a_delta_creates_a_job(api: Api, broker_url: str) -> None:
    body = api.delta_body()
    answer = api.client.post("/v1/deltas", json=body)
    assert answer.status_code == 202
    delta, job = answer.json()["delta"], answer.json()["job"]
    assert answer.headers["location"] == f"/v1/jobs/{job['id']}"
    assert (delta["name"], delta["version"], delta["state"]) == ("maths/skills", 1, "queued")
    assert delta["base"]["name"] == "tiny"
    source = {"source": "text", "digest": body["calibration"]["digest"], "weight": 1.0}
    assert delta["calibration"] == {"sources": [source], "tokens": 262_144, "length": 2048}
    assert (delta["bits"], delta["goal"]) == (1.0, {"kind": "bits", "value": 1.0})
    assert delta["artifact"] is delta["metrics"] is delta["error"] is None
    assert api.client.get(f"/v1/deltas/{delta['id']}").json() == delta
    assert api.client.get(f"/v1/jobs/{job['id']}").json() == job
    assert queued_jobs(broker_url) == [job["id"]]


def test_the_task_is_sent_after_a_single_commit(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    body = api.delta_body()
    events_seen: list[str] = []
    engine = api.resources.database.engine
    event.listen(engine, "commit", lambda _connection: events_seen.append("commit"))

    def send(job_id: str) -> None:
        with api.resources.database.read_scope() as session:
            assert JobRepository(session, LOCAL_TENANT).find(job_id) is not None
        events_seen.append("send")

    # Patched on the class: instances have slots.
    monkeypatch.setattr(type(api.resources.tasks), "send_compress", lambda _self, job: send(job))
    assert api.client.post("/v1/deltas", json=body).status_code == 202
    assert events_seen == ["commit", "send"]


class TestBrokerDown:
    @pytest.fixture
    def settings_fields(self) -> dict[str, Any]:
        return {"broker_url": "redis://127.0.0.1:1/0"}

    def test_a_job_that_could_not_be_sent_waits_for_the_sweeper(self, api: Api) -> None:
        delta = api.delta()
        with api.resources.database.read_scope() as session:
            assert JobRepository(session, LOCAL_TENANT).stale(queued_seconds=0) == [delta["job"]]

    def test_the_api_says_that_it_is_not_ready(self, api: Api) -> None:
        answer = api.client.get("/readyz")
        assert answer.status_code == 503
        assert answer.json()["checks"] == {
            "database": "ok",
            "broker": "unavailable",
            "blobs": "ok",
            "node": "unavailable",
        }
        assert api.client.get("/healthz").status_code == 200


def test_a_part_that_does_not_answer_is_not_ready(
    api: Api, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many probes ask, and the database is asked meanwhile."""
    answers = threading.Event()
    monkeypatch.setattr(health, "CHECK_SECONDS", 0.2)
    monkeypatch.setattr(type(api.resources.blobs), "exists", lambda *_: answers.wait(60))
    try:
        for _ in range(3):
            checks = api.client.get("/readyz").json()["checks"]
            assert checks == {
                "database": "ok", "broker": "ok", "blobs": "unavailable", "node": "unavailable",
            }  # fmt: skip
    finally:
        answers.set()


def test_a_repeated_request_returns_the_same_delta(api: Api, broker_url: str) -> None:
    body = api.delta_body()
    first = api.client.post("/v1/deltas", json=body).json()
    again = api.client.post("/v1/deltas", json=body)
    assert again.status_code == 200
    assert again.json() == first
    api.make_ready(first["delta"])
    ready = api.client.post("/v1/deltas", json=body)
    assert ready.status_code == 200
    assert ready.json()["delta"]["state"] == "ready"
    assert len(queued_jobs(broker_url)) == 1


def test_the_first_commit_that_is_given_stays(api: Api) -> None:
    body = api.delta_body()

    def commit_of(**change: str) -> str | None:
        answer = api.client.post("/v1/deltas", json=body | change).json()["delta"]
        assert answer["version"] == 1
        commit: str | None = answer["lineage"]["commit"]
        assert api.client.get(f"/v1/deltas/{answer['id']}").json()["lineage"]["commit"] == commit
        return commit

    assert commit_of() is None
    assert commit_of(commit="abc") == "abc"
    assert commit_of() == commit_of(commit="def") == "abc"


def test_concurrent_equal_requests_create_one_delta(api: Api, broker_url: str) -> None:
    body = api.delta_body()
    with ThreadPoolExecutor(6) as pool:
        answers = list(pool.map(lambda _: api.client.post("/v1/deltas", json=body), range(6)))
    assert sorted(answer.status_code for answer in answers) == [200] * 5 + [202]
    assert len({answer.json()["delta"]["id"] for answer in answers}) == 1
    assert len(queued_jobs(broker_url)) == 1


def test_other_options_create_a_new_version_and_what_was_cancelled_continues(
    api: Api, broker_url: str
) -> None:
    body = api.delta_body()
    first = api.client.post("/v1/deltas", json=body).json()
    second = api.client.post("/v1/deltas", json=body | {"bits": 2.0}).json()["delta"]
    assert second["version"] == 2
    api.client.post(f"/v1/jobs/{first['job']['id']}/cancel")
    again = api.client.post("/v1/deltas", json=body | {"priority": "high"})
    assert (again.status_code, again.json()["delta"]["version"]) == (202, 1)
    job = again.json()["job"]
    assert (job["id"], job["state"], job["priority"]) == (first["job"]["id"], "queued", "high")
    assert queued_jobs(broker_url).count(job["id"]) == 2


def test_another_name_shares_a_ready_artifact(api: Api, broker_url: str) -> None:
    body = api.delta_body()
    digest = api.make_ready(api.client.post("/v1/deltas", json=body).json()["delta"])
    answer = api.client.post("/v1/deltas", json=body | {"name": "maths/copy"})
    assert answer.status_code == 200
    assert answer.json()["delta"]["artifact"]["digest"] == digest
    assert answer.json()["job"]["state"] == "ready"
    assert len(queued_jobs(broker_url)) == 1


def test_invalid_requests_create_no_delta(
    api: Api, broker_url: str, subtests: pytest.Subtests
) -> None:
    body = api.delta_body()
    for change, status, code in (
        ({"method": "magic"}, 422, "unknown_method"),
        ({"bits": 0.01}, 422, "bits_out_of_range"),
        ({"bits": 9}, 422, "bits_out_of_range"),
        ({"ratio": 10.0}, 422, "invalid_goal"),
        ({"bits": None, "ratio": 0.5}, 422, "invalid_goal"),
        ({"bits": None, "ratio": 100_000}, 409, "invalid_goal"),
        ({"bits": None, "target_bytes": 10}, 409, "invalid_goal"),
        ({"checkpoint": api.base()}, 409, "unchanged_checkpoint"),
        ({"bits": None, "target_bytes": 0}, 422, "invalid_goal"),
        ({"bits": None, "target_bytes": 1.5}, 422, "invalid_input"),
        ({"bits": None, "max_kl": -1}, 422, "invalid_goal"),
        ({"bits": None, "min_agreement": 99}, 422, "invalid_goal"),
        ({"method": "exact"}, 422, "bits_out_of_range"),
        ({"method": "lora", "bits": None}, 409, "conflict"),
        ({"bits": "many"}, 422, "invalid_input"),
        ({"name": "no-project"}, 422, "invalid_input"),
        ({"name": "a/b/c"}, 422, "invalid_input"),
        ({"solver": "guess"}, 422, "invalid_input"),
        ({"seed": -1}, 422, "invalid_input"),
        ({"unknown": 1}, 422, "invalid_input"),
        ({"base": "other"}, 404, "not_found"),
        ({"checkpoint": "0" * 64}, 404, "not_found"),
        ({"checkpoint": "not hex"}, 422, "invalid_input"),
        ({"calibration": {"source": "text", "digest": "0" * 64}}, 404, "not_found"),
        ({"calibration": {"sources": [{"digest": "0" * 64}]}}, 404, "not_found"),
        ({"calibration": {"sources": []}}, 422, "invalid_input"),
        ({"calibration": {"sources": [{"source": "sampled"}] * 17}}, 422, "invalid_input"),
        ({"calibration": {"sources": [{"source": "sampled", "weight": 0}]}}, 422, "invalid_input"),
        ({"calibration": {"tokens": 10}}, 422, "invalid_input"),
        ({"calibration": {"length": 1 << 30}}, 422, "invalid_input"),
        ({"calibration": {"source": "url", "digest": "0" * 64}}, 422, "invalid_input"),
    ):
        with subtests.test(change=change):
            answer = api.client.post("/v1/deltas", json=body | change)
            assert (answer.status_code, answer.json()["code"]) == (status, code)
            assert answer.headers["content-type"] == "application/problem+json"
            assert api.client.get("/v1/deltas").json() == {"data": [], "next": None}
            assert queued_jobs(broker_url) == []


@pytest.mark.parametrize(
    ("kind", "value"),
    [("target_bytes", 10**9), ("max_kl", 0.01), ("min_agreement", 0.98)],
)
def test_goals_other_than_bits(api: Api, kind: str, value: float) -> None:
    body = api.delta_body() | {"bits": None, kind: value}
    answer = api.client.post("/v1/deltas", json=body)
    assert answer.status_code == 202
    delta = answer.json()["delta"]
    assert (delta["bits"], delta["goal"]) == (None, {"kind": kind, "value": value})
    assert api.client.post("/v1/deltas", json=body).json()["delta"] == delta
    other = api.client.post("/v1/deltas", json=body | {kind: None}).json()["delta"]
    assert (other["version"], other["goal"]) == (2, {"kind": "bits", "value": 1.0})


def test_a_quality_bound_samples_text_if_none_is_given(api: Api) -> None:
    body = api.delta_body() | {"method": "low-rank", "calibration": None, "bits": None}
    delta = api.client.post("/v1/deltas", json=body | {"max_kl": 0.1}).json()["delta"]
    assert delta["calibration"]["sources"][0]["source"] == "sampled"
    delta = api.client.post("/v1/deltas", json=body | {"target_bytes": 10**9}).json()["delta"]
    assert delta["calibration"] is None


def test_calibration_from_several_sources(api: Api) -> None:
    body = api.delta_body()
    digest = body["calibration"]["digest"]
    mixed = {
        "sources": [{"digest": digest, "weight": 3}, {"source": "sampled"}],
        "tokens": 4096,
        "length": 128,
    }
    answer = api.client.post("/v1/deltas", json=body | {"calibration": mixed})
    assert answer.status_code == 202
    assert answer.json()["delta"]["calibration"] == {
        "sources": [
            {"source": "text", "digest": digest, "weight": 3.0},
            {"source": "sampled", "digest": None, "weight": 1.0},
        ],
        "tokens": 4096,
        "length": 128,
    }


def test_the_same_bytes_under_another_suffix_are_another_text(api: Api) -> None:
    body = api.delta_body()
    deltas = []
    lines = b'{"text": "A fox."}\n' * 500
    for path in ("text.txt", "text.jsonl", "text.txt"):
        digest = api.upload("calibration", {path: lines})["calibration"]["digest"]
        body["calibration"] = {"source": "text", "digest": digest}
        deltas.append(api.client.post("/v1/deltas", json=body).json()["delta"])
    plain, lines, again = deltas
    assert lines["id"] != plain["id"] == again["id"]
    with api.resources.database.read_scope() as session:
        found = [DeltaRepository(session, LOCAL_TENANT).find(each["id"]) for each in deltas]
        suffixes = [each.options["calibration"]["sources"][0]["suffix"] for each in found if each]
    assert suffixes == [".txt", ".jsonl", ".txt"]


def test_without_calibration_text_is_sampled_from_the_fine_tune(api: Api) -> None:
    body = api.delta_body()
    bodies = [
        {key: value for key, value in body.items() if key != "calibration"},
        body | {"calibration": None},
        body | {"calibration": {"source": "sampled"}},
        body | {"calibration": {}},
    ]
    deltas = [api.client.post("/v1/deltas", json=each).json()["delta"] for each in bodies]
    assert len({delta["id"] for delta in deltas}) == 1
    (source,) = deltas[0]["calibration"]["sources"]
    assert source == {"source": "sampled", "digest": None, "weight": 1.0}


def test_a_digest_of_another_blob_is_not_a_calibration_text(api: Api) -> None:
    body = api.delta_body()
    body["calibration"]["digest"] = sha256(CONFIG)
    assert api.client.post("/v1/deltas", json=body).status_code == 404


@pytest.mark.parametrize(
    ("data", "named"),
    [
        (weights(1, rows=9), "model.embed_tokens.weight"),
        (weights(1, **{"model.extra": (2,), "model.more": (2,)}), "model.extra"),
    ],
)
def test_another_architecture_is_rejected(api: Api, data: bytes, named: str) -> None:
    body = api.delta_body() | {"checkpoint": api.checkpoint(data)}
    answer = api.client.post("/v1/deltas", json=body)
    assert (answer.status_code, answer.json()["code"]) == (409, "architecture_mismatch")
    assert named in answer.json()["detail"]


def test_another_model_type_is_rejected(api: Api) -> None:
    files = {"config.json": b'{"model_type": "qwen2"}', "model.safetensors": weights(1)}
    digest = api.upload("checkpoint", files)["checkpoint"]["digest"]
    answer = api.client.post("/v1/deltas", json=api.delta_body() | {"checkpoint": digest})
    assert answer.json()["code"] == "architecture_mismatch"


def test_exact_needs_neither_bits_nor_calibration(api: Api) -> None:
    body = api.delta_body() | {"method": "exact", "bits": None, "calibration": None}
    answer = api.client.post("/v1/deltas", json=body)
    assert answer.status_code == 202
    delta = answer.json()["delta"]
    assert delta["bits"] is delta["goal"] is delta["calibration"] is None


def test_deltas_are_paginated(api: Api) -> None:
    body = api.delta_body()
    ids = [
        api.client.post("/v1/deltas", json=body | {"seed": seed}).json()["delta"]["id"]
        for seed in range(5)
    ]
    first = api.client.get("/v1/deltas", params={"limit": 2}).json()
    second = api.client.get("/v1/deltas", params={"limit": 2, "after": first["next"]}).json()
    third = api.client.get("/v1/deltas", params={"limit": 2, "after": second["next"]}).json()
    pages = [[delta["id"] for delta in page["data"]] for page in (first, second, third)]
    assert pages == [ids[4:2:-1], ids[2:0:-1], ids[:1]]
    assert third["next"] is None
    assert api.client.get("/v1/deltas", params={"after": "dlt_x"}).status_code == 404
    assert api.client.get("/v1/deltas", params={"limit": 0}).status_code == 422


def test_reports_and_metrics(api: Api) -> None:
    delta = api.delta()
    early = api.client.get(f"/v1/deltas/{delta['id']}/report")
    assert (early.status_code, early.json()["code"], early.json()["state"]) == (
        409,
        "not_ready",
        "queued",
    )
    api.make_ready(delta)
    report = api.client.get(f"/v1/deltas/{delta['id']}/report").json()
    assert (report["kl"], report["matrices"]) == (0.01, [{"name": "q"}])
    ready = api.client.get(f"/v1/deltas/{delta['id']}").json()
    assert (ready["state"], ready["percent"], ready["metrics"]["ratio"]) == ("ready", 100, 12.5)


def test_deleted_deltas_are_not_found_and_their_version_is_not_reused(api: Api) -> None:
    body = api.delta_body()
    delta = api.client.post("/v1/deltas", json=body).json()["delta"]
    assert api.client.delete(f"/v1/deltas/{delta['id']}").status_code == 204
    for method, path in (
        ("GET", ""),
        ("DELETE", ""),
        ("GET", "/report"),
        ("GET", "/artifact"),
    ):
        assert api.client.request(method, f"/v1/deltas/{delta['id']}{path}").status_code == 404
    assert api.client.get(f"/v1/jobs/{delta['job']}").json()["state"] == "cancelled"
    assert api.client.post("/v1/deltas", json=body).json()["delta"]["version"] == 2


def test_bases(api: Api) -> None:
    digest = api.checkpoint(weights())
    body = {"name": "tiny", "checkpoint": digest}
    first = api.client.post("/v1/bases", json=body)
    again = api.client.post("/v1/bases", json=body)
    assert (first.status_code, again.status_code) == (201, 200)
    assert first.json() == again.json()
    base = first.json()
    for reference in (base["id"], "tiny"):
        assert api.client.get(f"/v1/bases/{reference}").json() == base
    assert api.client.get("/v1/bases").json() == {"data": [base], "next": None}
    other = {"name": "tiny", "checkpoint": api.checkpoint(weights(1))}
    assert api.client.post("/v1/bases", json=other).json()["code"] == "conflict"
    for bad in ({"name": "a/b"}, {"name": ""}, {"checkpoint": digest.upper()}):
        assert api.client.post("/v1/bases", json=body | bad).json()["code"] == "invalid_input"
    unknown = {"name": "new", "checkpoint": "0" * 64}
    assert api.client.post("/v1/bases", json=unknown).status_code == 404
    assert api.client.get("/v1/bases/none").status_code == 404


def test_a_bases_manifest_has_the_checkpoints_digest(api: Api) -> None:
    digest = api.base()
    answer = api.client.get("/v1/bases/tiny/manifest")
    assert answer.headers["content-type"] == "application/json"
    assert sha256(answer.content) == digest
    tensors = {tensor["name"]: tensor["shape"] for tensor in answer.json()["tensors"]}
    assert tensors == {"model.embed_tokens.weight": [8, 8], "model.norm.weight": [8]}


def test_a_base_is_deleted_when_no_delta_needs_it_and_restored(api: Api) -> None:
    body = api.delta_body()
    delta = api.client.post("/v1/deltas", json=body).json()["delta"]
    base = f"/v1/bases/{body['base']}"
    before = api.client.get(base).json()
    refused = api.client.delete(base)
    assert (refused.status_code, refused.json()["code"]) == (409, "conflict")
    assert "1 delta needs the base" in refused.json()["detail"]
    api.client.delete(f"/v1/deltas/{delta['id']}")
    assert api.client.delete(base).status_code == 204
    assert api.client.get(base).status_code == 404
    assert api.client.get("/v1/bases").json()["data"] == []
    assert api.client.post("/v1/deltas", json=body | {"seed": 1}).status_code == 404
    undone = api.client.post(f"/v1/deltas/{delta['id']}/restore")
    assert f"bring it back first: POST {base}/restore." in undone.json()["detail"]
    assert api.client.post(f"{base}/restore").json() == before
    assert api.client.post(f"{base}/restore").status_code == 404
    assert api.client.post(f"/v1/deltas/{delta['id']}/restore").status_code == 200
    api.client.delete(f"/v1/deltas/{delta['id']}")
    api.client.delete(base)
    named = {"name": before["name"], "checkpoint": before["checkpoint"]["digest"]}
    assert api.client.post("/v1/bases", json=named).json() == before, "its name is kept for it"


def test_methods(api: Api) -> None:
    methods = {method["name"]: method for method in api.client.get("/v1/methods").json()["data"]}
    assert methods["adamix"]["needs_calibration"]
    assert methods["exact"]["bits_min"] is None
    assert [name for name, method in methods.items() if method["default"]] == [
        default_method().name
    ]


def test_the_default_method_needs_no_name(api: Api) -> None:
    body = api.delta_body()
    del body["method"]
    delta = api.client.post("/v1/deltas", json=body).json()["delta"]
    assert delta["method"] == default_method().name


def test_the_event_stream_ends_with_the_job(api: Api) -> None:
    delta = api.delta()
    events: list[dict[str, Any]] = []
    with api.client.stream("GET", f"/v1/jobs/{delta['job']}/events") as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        for line in answer.iter_lines():
            if line.startswith("data: "):
                events.append(json.loads(line.removeprefix("data: ")))
                if len(events) == 1:
                    threading.Thread(target=api.make_ready, args=[delta]).start()
    assert [events[0]["state"], events[-1]["state"]] == ["queued", "ready"]
    assert api.client.get("/v1/jobs/job_x/events").json()["code"] == "not_found"


def test_a_jobs_percent_has_one_decimal(api: Api) -> None:
    job = api.delta()["job"]
    with api.resources.database.session_scope() as session:
        jobs = JobRepository(session, LOCAL_TENANT)
        assert jobs.acquire(job, "worker", 60)
        step = JobProgress(JobState.COMPRESSING, 1, 3, 100 / 3, "block 2 of 3")
        assert jobs.advance(job, "worker", step)
    assert api.client.get(f"/v1/jobs/{job}").json()["percent"] == 33.3
    asked = api.client.post(f"/v1/jobs/{job}/cancel").json()
    assert (asked["state"], asked["cancel_requested"]) == ("compressing", True)
    assert "Cancellation requested" in asked["message"]


def test_cancelling_a_job(api: Api) -> None:
    delta = api.delta()
    for _ in range(2):
        job = api.client.post(f"/v1/jobs/{delta['job']}/cancel").json()
        assert (job["state"], job["error"]["code"]) == ("cancelled", "cancelled")
    assert api.client.post("/v1/jobs/job_x/cancel").status_code == 404
