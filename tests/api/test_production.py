"""The api on Postgres and S3, from upload to download."""

import random
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from deltadock.api.main import create_app
from deltadock.api.uploads import arrivals
from deltadock.client.blocking import Client
from deltadock.settings import Settings
from deltadock.storage.blobs import parts
from tests.api.support import CONFIG, TEXT, Api, bearer, issue_key, serving, sha256, weights


@pytest.fixture
def settings_fields() -> dict[str, str]:
    """Settings that a test overrides."""
    return {}


@pytest.fixture
def api(
    tmp_path: Path,
    migrated_postgres: str,
    s3_bucket: dict[str, str],
    broker_url: str,
    settings_fields: dict[str, str],
) -> Iterator[Api]:
    fields = {
        "home": str(tmp_path),
        "database_url": migrated_postgres,
        "broker_url": broker_url,
        **s3_bucket,
    }
    fields |= settings_fields
    settings = Settings.model_validate(fields)
    app = create_app(settings)
    headers = bearer(issue_key(settings))
    with serving(app) as url, httpx.Client(base_url=url, timeout=60, headers=headers) as client:
        yield Api(client, app.state.resources)


def test_from_upload_to_download(api: Api) -> None:
    delta = api.delta()
    artifact = bytes(range(256)) * 1000
    api.make_ready(delta, artifact)
    url = f"/v1/deltas/{delta['id']}/artifact"
    assert api.client.get(url).content == artifact
    part = api.client.get(url, headers={"Range": "bytes=-5"})
    assert (part.status_code, part.content) == (206, artifact[-5:])
    assert api.client.get("/readyz").json()["status"] == "ok"


def test_concurrent_requests_agree(api: Api) -> None:
    upload = api.open_upload()
    for path, data in (("config.json", CONFIG), ("model.safetensors", weights(1))):
        assert api.put(upload, path, data).status_code == 200
    with ThreadPoolExecutor(6) as pool:
        completes = list(
            pool.map(lambda _: api.client.post(f"/v1/uploads/{upload}/complete"), range(6))
        )
    assert {answer.status_code for answer in completes} == {200}
    assert len({answer.text for answer in completes}) == 1

    body = api.delta_body()
    with ThreadPoolExecutor(6) as pool:
        deltas = list(pool.map(lambda _: api.client.post("/v1/deltas", json=body), range(6)))
    assert sorted(answer.status_code for answer in deltas) == [200] * 5 + [202]


def test_a_rejected_file_is_not_stored(api: Api) -> None:
    upload = api.open_upload("calibration")
    answer = api.put(upload, "text.txt", TEXT, **{"X-Content-SHA256": "0" * 64})
    assert answer.json()["code"] == "hash_mismatch"
    assert not api.resources.blobs.exists(sha256(TEXT))
    assert api.client.get(f"/v1/uploads/{upload}").json()["files"] == []


def test_parts_in_memory_are_bounded(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    part = parts.MIN_PART_BYTES
    monkeypatch.setattr(arrivals, "MEMORY_BYTES", 2 * part)
    data = random.randbytes(part + 1000)
    upload = api.announce({"tokenizer.json": data})["id"]
    begun, leave = threading.Event(), threading.Event()

    def stalled() -> Iterator[bytes]:
        yield data[: part - 1]
        begun.set()
        leave.wait(30)
        yield data[part - 1 : part]

    url = f"/v1/uploads/{upload}/files/tokenizer.json/parts"
    with ThreadPoolExecutor(1) as pool:
        headers = {"Content-Length": str(part)}
        first = pool.submit(api.client.put, f"{url}/1", content=stalled(), headers=headers)
        assert begun.wait(30)
        try:
            second = api.put_part(upload, "tokenizer.json", 2, data[part:])
            assert (second.status_code, second.json()["code"]) == (503, "unavailable")
            assert second.headers["retry-after"] == "5"
        finally:
            leave.set()
        assert first.result().status_code == 200
    assert api.put_part(upload, "tokenizer.json", 2, data[part:]).status_code == 200


def test_ids_that_postgres_rejects_are_invalid_input(api: Api) -> None:
    for kind in ("deltas", "uploads", "jobs", "bases"):
        answer = api.client.get(f"/v1/{kind}/a%00b")
        assert (answer.status_code, answer.json()["code"]) == (422, "invalid_input"), kind
    assert api.client.get("/v1/deltas?after=a%00b").status_code == 404
    answer = api.client.post("/v1/completions", json={"model": "a\0b", "prompt": "x"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "invalid_input")


class TestRedirects:
    """Downloads are redirected to an object store that clients can reach."""

    @pytest.fixture
    def settings_fields(self, s3_bucket: dict[str, str]) -> dict[str, str]:
        return {"s3_public_url": s3_bucket["s3_endpoint_url"].replace("127.0.0.1", "localhost")}

    def test_downloads_are_redirected(self, api: Api, tmp_path: Path) -> None:
        delta = api.delta()
        artifact = bytes(range(256)) * 1000
        digest = api.make_ready(delta, artifact)
        url = f"/v1/deltas/{delta['id']}/artifact"

        redirect = api.client.get(url)
        assert (redirect.status_code, redirect.content) == (307, b"")
        assert redirect.headers["location"].startswith("http://localhost:")
        assert redirect.headers["cache-control"] == "no-store"
        answer = api.client.get(url, follow_redirects=True)
        assert (answer.status_code, answer.content) == (200, artifact)
        assert (
            answer.headers["content-disposition"] == f'attachment; filename="{delta["id"]}.delta"'
        )
        assert answer.headers["content-type"] == "application/octet-stream"
        part = api.client.get(url, headers={"Range": "bytes=-5"}, follow_redirects=True)
        assert (part.status_code, part.content) == (206, artifact[-5:])

        # HEAD, conditional and invalid requests are not redirected.
        head = api.client.head(url)
        assert (head.status_code, head.headers["etag"]) == (200, f'"{digest}"')
        assert api.client.get(url, headers={"If-None-Match": f'"{digest}"'}).status_code == 304
        beyond = api.client.get(url, headers={"Range": f"bytes={len(artifact)}-"})
        assert (beyond.status_code, beyond.json()["code"]) == (416, "range_not_satisfiable")
        same = {"Range": "bytes=0-3", "If-Range": f'"{digest}"'}
        assert api.client.get(url, headers=same).content == artifact[:4]
        assert api.client.get(url, headers={"If-Match": f'"{digest}"'}).content == artifact
        assert api.client.head(url, headers={"If-Match": '"other"'}).status_code == 412
        # The store's own ETag, which a client that was redirected before has.
        stored = {"Range": "bytes=0-3", "If-Range": answer.headers["etag"]}
        part = api.client.get(url, headers=stored, follow_redirects=True)
        assert (part.status_code, part.content) == (206, artifact[:4])
        for tag, status in ((answer.headers["etag"], 200), ('"other"', 412)):
            found = api.client.get(url, headers={"If-Match": tag}, follow_redirects=True)
            assert found.status_code == status

        (tmp_path / "x.delta.part").write_bytes(artifact[:100_000])
        with Client(str(api.client.base_url), api.key) as client:
            client.download(delta["id"], tmp_path / "x.delta")
        assert (tmp_path / "x.delta").read_bytes() == artifact

    def test_clients_send_parts_to_the_object_store(
        self, api: Api, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(parts, "MIN_PART_BYTES", 5 << 20)  # S3's minimum
        monkeypatch.setattr("deltadock.api.uploads.endpoints.receive_part", None)
        (tmp_path / "config.json").write_bytes(CONFIG)
        (tmp_path / "model.safetensors").write_bytes(weights(rows=350_000))
        with Client(str(api.client.base_url), api.key) as client:
            checkpoint = client.upload_folder(tmp_path)
            assert client.upload_folder(tmp_path) == checkpoint  # nothing is sent
        digest = sha256((tmp_path / "model.safetensors").read_bytes())
        assert api.resources.blobs.exists(digest)
        assert api.resources.blobs.parted_uploads() == frozenset()
        uploads = api.client.get("/v1/uploads").json()["data"]
        assert [upload["state"] for upload in uploads] == ["complete"] * 2
