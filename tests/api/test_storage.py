"""What is stored, by kind; deleting and restoring; rules for fine-tunes; the two commands."""

import os
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import typer

from deltadock.cli import storage as commands
from deltadock.storage import collection
from deltadock.storage.collection import Collector
from deltadock.storage.tables import JobRow, UploadRow
from deltadock.storage.tenancy import LOCAL_TENANT
from tests.api.support import CONFIG, Api, weights


def on_disk(api: Api) -> int:
    """As `du --apparent-size` of the blob folder's files."""
    folders = os.walk(api.resources.settings.blob_folder)
    return sum(Path(at, name).stat().st_size for at, _, names in folders for name in names)


def stored(api: Api) -> dict[str, int]:
    api.resources.storage._fresh_until = 0.0
    answer = api.client.get("/v1/storage").json()
    return {kind: usage["bytes"] for kind, usage in answer.items()}


@pytest.fixture(autouse=True)
def _no_blob_is_young(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(collection, "YOUNG", timedelta(seconds=-60))


def collect(api: Api, **fields: Any) -> dict[str, int]:
    """Collect with these settings, as a trial says before; bytes by kind."""
    settings = api.resources.settings.model_copy(update=fields)
    collector = Collector(api.resources.database, api.resources.blobs, settings)
    tried = collector.try_run()
    found = collector.run()
    assert tried == found
    return {str(kind): usage.bytes for kind, usage in found.usage.items()}


def test_the_totals_are_what_is_on_disk(api: Api) -> None:
    ready = api.delta()
    api.make_ready(ready)
    queued = api.delta(seed=2, name="maths/other")
    api.resources.blobs.put_work(f"{queued['job']}/fingerprint/0", b"block")
    api.put(api.open_upload(), "model.safetensors.index.json", b'{"weight_map": {}}')
    api.resources.blobs.put_bytes(b"nobody's")
    found = stored(api)
    assert found["total"] == on_disk(api) > 0
    assert sum(found.values()) == 2 * found["total"]
    assert (found["artifacts"], found["work"], found["unreferenced"]) == (8, 5, 8)
    assert found["uploads"] == 18
    assert found["calibration"] > 0
    page = api.client.get("/").text
    assert "Stored for all tenants" in page
    assert "unreferenced 8" in page


def test_a_deleted_delta_can_be_restored_until_it_is_collected(api: Api) -> None:
    delta = api.delta()
    digest = api.make_ready(delta)
    url = f"/v1/deltas/{delta['id']}"
    before = api.client.get(url).json()
    assert api.client.post(f"{url}/restore").status_code == 404, "it is not deleted"
    api.client.delete(url)
    assert collect(api) == {}
    assert api.client.post(f"{url}/restore").json() == before
    api.client.delete(url)
    held = {"digest": digest, "tier": "host", "bytes": 8}
    api.register("http://127.0.0.1:1", deltas=[held])
    assert collect(api, undo_days=0.0) == {}, "a node has it in memory"
    api.register("http://127.0.0.1:1", deltas=[held | {"tier": "disk"}])
    assert collect(api, undo_days=0.0) == {"artifacts": 8}
    assert api.client.post(f"{url}/restore").status_code == 404
    assert digest not in api.blobs()


def age(api: Api, days: float) -> None:
    """Make everything that has happened so far older."""
    with api.resources.database.session_scope() as session:
        for upload in session.query(UploadRow):
            upload.updated_at -= timedelta(days=days)
        for job in session.query(JobRow).where(JobRow.finished_at.is_not(None)):
            assert job.finished_at is not None
            job.finished_at -= timedelta(days=days)


def test_the_rule_of_the_project_drops_fine_tunes_and_keeps_bases(api: Api) -> None:
    body = api.delta_body()
    delta = api.client.post("/v1/deltas", json=body).json()["delta"]
    rule = "/v1/projects/maths/retention"
    assert api.client.get(rule).json() == {"rule": "keep", "is_default": True}
    assert api.client.put(rule, json={"rule": "ready"}).json()["rule"] == "ready"
    assert collect(api) == {}, "its job needs the fine-tune"
    api.make_ready(delta)
    assert api.client.put(rule, json={"rule": "30"}).status_code == 200
    age(api, 29)
    assert collect(api) == {}
    age(api, 2)
    dropped = collect(api)
    assert dropped.keys() == {"checkpoints"}
    assert dropped["checkpoints"] > 100
    assert collect(api) == {}
    assert api.client.get(f"/v1/deltas/{delta['id']}").json()["state"] == "ready"
    again = api.client.post("/v1/deltas", json=body | {"seed": 5})
    assert (again.status_code, again.json()["code"]) == (404, "not_found")
    assert body["checkpoint"] == api.delta_body()["checkpoint"], "it can be uploaded again"
    assert api.client.post("/v1/deltas", json=body | {"seed": 5}).status_code == 202
    assert api.client.put(rule, json={"rule": None}).status_code == 200
    assert api.client.put(rule, json={"rule": "sometimes"}).status_code == 422
    assert collect(api, calibration_days=0) == {}, "the new job needs its text"


def test_a_dropped_upload_takes_nothing_and_does_not_complete_again(api: Api) -> None:
    files = {"config.json": CONFIG, "model.safetensors": weights(0)}
    upload = api.upload("checkpoint", files)
    base = {"name": "tiny", "checkpoint": upload["checkpoint"]["digest"]}
    api.client.post("/v1/bases", json=base).raise_for_status()
    api.client.delete("/v1/bases/tiny").raise_for_status()
    assert collect(api, undo_days=0).keys() == {"checkpoints"}
    url = f"/v1/uploads/{upload['id']}"
    for answer in (
        api.client.post(f"{url}/complete"),
        api.put(upload["id"], "config.json", CONFIG),
        api.client.delete(url),
    ):
        assert (answer.status_code, answer.json()["code"]) == (409, "conflict")
        assert "was dropped" in answer.json()["detail"]
    assert api.client.get(url).json()["state"] == "dropped"


def test_a_complete_upload_that_nothing_needs_can_be_deleted(api: Api) -> None:
    body = api.delta_body()
    tune, text = body["checkpoint"], body["calibration"]["digest"]
    base = api.client.get("/v1/bases/tiny").json()["checkpoint"]["digest"]
    delta = api.client.post("/v1/deltas", json=body).json()["delta"]
    uploads = {
        (upload["checkpoint"] or upload["calibration"])["digest"]: f"/v1/uploads/{upload['id']}"
        for upload in api.client.get("/v1/uploads").json()["data"]
    }

    def refusal(digest: str) -> str:
        answer = api.client.delete(uploads[digest])
        assert (answer.status_code, answer.json()["code"]) == (409, "conflict")
        detail: str = answer.json()["detail"]
        return detail

    assert refusal(base).endswith("is needed: it is the base 'tiny'.")
    assert refusal(tune).endswith("is needed: it is the fine-tune of maths/skills:1.")
    assert refusal(text).endswith("is needed: a job reads it.")
    api.make_ready(delta)
    assert api.client.delete(uploads[text]).status_code == 204
    api.client.delete(f"/v1/deltas/{delta['id']}").raise_for_status()
    assert "fine-tune" in refusal(tune), "the delta can be restored"
    assert "artifacts" in collect(api, undo_days=0)
    assert api.client.delete(uploads[tune]).status_code == 204
    assert collect(api).keys() == {"checkpoints"}
    assert "base" in refusal(base)
    tenant = api.client.get(f"/v1/tenants/{LOCAL_TENANT}").json()
    assert tenant["usage"]["bytes"] == len(CONFIG) + len(weights(0))
    answer = api.client.post("/v1/deltas", json=body)
    assert (answer.status_code, answer.json()["code"]) == (404, "not_found")
    assert api.delta_body()["checkpoint"] == tune, "it can be uploaded again"


def test_a_checkpoint_that_becomes_nothing_is_kept_for_some_days(api: Api) -> None:
    body = api.delta_body()
    age(api, 6)
    assert collect(api) == {}
    age(api, 2)
    assert collect(api).keys() == {"checkpoints"}
    answer = api.client.post("/v1/deltas", json=body)
    assert (answer.status_code, answer.json()["code"]) == (404, "not_found")
    api.client.post("/v1/deltas", json=api.delta_body()).raise_for_status()
    age(api, 8)
    assert collect(api) == {}, "bases and fine-tunes stay"


def test_a_fine_tune_goes_after_all_of_its_deltas_whatever_the_rule(api: Api) -> None:
    one, other = api.delta(), api.delta(name="maths/other", seed=1)
    assert one["id"] != other["id"]
    for delta in (one, other):
        api.make_ready(delta, artifact=delta["id"].encode())
    api.client.delete(f"/v1/deltas/{one['id']}").raise_for_status()
    age(api, 8)
    collect(api, undo_days=0)
    assert collect(api) == {}, "another delta is of it"
    api.client.delete(f"/v1/deltas/{other['id']}").raise_for_status()
    assert collect(api) == {}, "the delta can be restored"
    assert collect(api, undo_days=0).keys() == {"artifacts"}
    assert collect(api).keys() == {"checkpoints"}


def test_the_bytes_of_a_deleted_base_are_kept_for_some_days(api: Api) -> None:
    body = api.delta_body()
    base = f"/v1/bases/{body['base']}"
    assert api.client.delete(base).status_code == 204
    assert collect(api) == {}
    assert collect(api, undo_days=0).keys() == {"checkpoints"}
    assert api.client.post(f"{base}/restore").status_code == 404
    api.base()
    assert api.client.get(base).status_code == 200, "it can be uploaded again"


def test_blocks_of_jobs_that_will_not_continue_are_dropped(api: Api) -> None:
    delta = api.delta()
    job = delta["job"]
    api.resources.blobs.put_work(f"{job}/fingerprint/0", b"block")
    api.resources.blobs.put_work("job_gone/fingerprint/0", b"left")
    assert collect(api) == {"work": 4}
    api.client.post(f"/v1/jobs/{job}/cancel")
    assert collect(api) == {}, "it may be retried"
    age(api, 8)
    assert collect(api) == {"work": 5}


def test_the_commands_print_what_goes_and_what_differs(
    api: Api, capsys: pytest.CaptureFixture[str]
) -> None:
    home = api.resources.settings.home
    api.make_ready(api.delta())
    lost = api.resources.blobs.put_bytes(b"nobody's")
    commands.gc(home, dry_run=True)
    assert "unreferenced" in capsys.readouterr().out
    commands.reconcile(home)
    assert f"unreferenced {lost} 8 B" in capsys.readouterr().out
    commands.gc(home)
    assert lost not in api.blobs()
    capsys.readouterr()
    artifact = next(iter(api.client.get("/v1/deltas").json()["data"]))["artifact"]["digest"]
    api.resources.blobs.delete(artifact)
    with pytest.raises(typer.Exit):
        commands.reconcile(home)
    assert capsys.readouterr().out.startswith(f"missing {artifact}\nMissing: 1 blob.")
