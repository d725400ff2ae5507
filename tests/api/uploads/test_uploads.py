"""Uploads: complete files are stored, rejected and interrupted ones leave nothing."""

import base64
import http.client
import json
import os
import pickle
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from deltadock.api.protocol import PIECE_BYTES, Body, Protocol
from deltadock.api.uploads.receive import BATCH_BYTES
from deltadock.artifacts.checkpoint import CheckpointManifest
from deltadock.artifacts.folder import scan_folder
from tests.api.support import CONFIG, TEXT, Api, sha256, weights
from tests.waiting import wait_until

LIMIT = 4_000_000


@pytest.fixture
def settings_fields() -> dict[str, Any]:
    return {"max_file_bytes": LIMIT}


def assert_nothing_stored(api: Api, upload: str) -> None:
    assert api.staged() == []
    assert api.blobs() == set()
    assert api.client.get(f"/v1/uploads/{upload}").json()["files"] == []


def test_an_uploaded_checkpoint_equals_a_scan_of_its_folder(api: Api, tmp_path: Path) -> None:
    files = {"config.json": CONFIG, "model.safetensors": weights(), "tokenizer.json": b"{}"}
    done = api.upload("checkpoint", files)
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    for name, data in files.items():
        (folder / name).write_bytes(data)
    manifest = scan_folder(folder)
    assert done["state"] == "complete"
    assert done["checkpoint"] == {
        "digest": manifest.digest,
        "weights_digest": manifest.weights_digest,
        "model_type": "llama",
        "total_bytes": manifest.total_bytes,
    }
    stored = api.resources.blobs.read(manifest.digest, 1 << 20)
    assert CheckpointManifest.from_json(stored) == manifest
    assert api.blobs() == {manifest.digest, *map(sha256, files.values())}
    assert api.staged() == []
    assert api.client.get(f"/v1/uploads/{done['id']}").json() == done


def test_a_file_can_be_replaced(api: Api) -> None:
    upload = api.open_upload()
    for data in (b"{}", CONFIG):
        answer = api.put(upload, "config.json", data)
        assert answer.json() == {
            "path": "config.json",
            "size": len(data),
            "sha256": sha256(data),
            "stored": True,
            "parts": None,
        }
    assert len(api.client.get(f"/v1/uploads/{upload}").json()["files"]) == 1


def test_files_that_arrive_again_replace_damaged_ones(api: Api) -> None:
    files = {"config.json": CONFIG, "model.safetensors": weights()}
    done = api.upload("checkpoint", files)
    folder = api.resources.settings.blob_folder / "blobs"
    for data in (*files.values(), api.resources.blobs.read(done["checkpoint"]["digest"], 1 << 20)):
        path = folder / sha256(data)
        path.chmod(0o644)
        path.write_bytes(b"?" + data[1:])
    assert api.upload("checkpoint", files)["checkpoint"] == done["checkpoint"]
    for name in api.blobs():
        assert sha256((folder / name).read_bytes()) == name


def test_a_file_that_was_found_damaged_is_asked_for_until_it_arrives(api: Api) -> None:
    files = {"config.json": CONFIG, "model.safetensors": weights()}
    api.upload("checkpoint", files)

    def stored() -> dict[str, bool]:
        return {file["path"]: file["stored"] for file in api.announce(files)["files"]}

    for _ in range(2):  # a node finds it
        api.register("http://10.0.0.7:8100", damaged=[sha256(files["model.safetensors"])])
    assert stored() == {"config.json": True, "model.safetensors": False}
    api.put(api.open_upload(), "model.safetensors", files["model.safetensors"])
    assert stored() == {"config.json": True, "model.safetensors": True}


def test_others_write_while_a_checkpoint_is_put_together(
    api: Api, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With 100,000 tensors that takes seconds, for which SQLite would take no other writes."""
    upload = api.open_upload()
    for path, data in {"config.json": CONFIG, "model.safetensors": weights()}.items():
        api.put(upload, path, data)
    put_bytes, others = api.resources.blobs.put_bytes, []

    def put_manifest(data: bytes) -> str:
        others.append(api.open_upload())
        return put_bytes(data)

    monkeypatch.setattr(api.resources.blobs, "put_bytes", put_manifest)
    answer = api.client.post(f"/v1/uploads/{upload}/complete")
    assert (answer.status_code, answer.json()["state"], len(others)) == (200, "complete", 1)


def test_a_file_that_changes_while_a_checkpoint_is_put_together_counts(
    api: Api, monkeypatch: pytest.MonkeyPatch
) -> None:
    upload = api.open_upload()
    for path, data in {"config.json": CONFIG, "model.safetensors": weights()}.items():
        api.put(upload, path, data)
    put_bytes = api.resources.blobs.put_bytes
    changes = iter([weights(1)])

    def put_manifest(data: bytes) -> str:
        if (changed := next(changes, None)) is not None:
            assert api.put(upload, "model.safetensors", changed).status_code == 200
        return put_bytes(data)

    monkeypatch.setattr(api.resources.blobs, "put_bytes", put_manifest)
    api.client.post(f"/v1/uploads/{upload}/complete")
    wait_until(lambda: api.client.get(f"/v1/uploads/{upload}").json()["state"] == "complete")
    done = api.client.get(f"/v1/uploads/{upload}").json()
    monkeypatch.undo()
    assert done["checkpoint"]["digest"] == api.checkpoint(weights(1))


def test_a_truncated_file_is_not_taken_for_stored(api: Api) -> None:
    files = {"config.json": CONFIG, "model.safetensors": weights()}
    api.upload("checkpoint", files)
    path = api.resources.settings.blob_folder / "blobs" / sha256(CONFIG)
    path.chmod(0o644)
    path.write_bytes(CONFIG[:-1])
    announced = api.announce(files)["files"]
    assert {file["path"]: file["stored"] for file in announced} == {
        "config.json": False,
        "model.safetensors": True,
    }


def content_digest(data: bytes) -> str:
    return f"sha-256=:{base64.b64encode(bytes.fromhex(sha256(data))).decode()}:"


def test_announced_digests_are_checked(api: Api) -> None:
    upload = api.open_upload()
    good = {"Content-Digest": content_digest(CONFIG), "X-Content-SHA256": sha256(CONFIG).upper()}
    assert api.put(upload, "config.json", CONFIG, **good).status_code == 200


def test_a_file_with_a_wrong_digest_is_not_stored(api: Api) -> None:
    for headers, code in (
        ({"Content-Digest": content_digest(b"other")}, "hash_mismatch"),
        ({"X-Content-SHA256": sha256(b"other")}, "hash_mismatch"),
        (
            {"Content-Digest": content_digest(CONFIG), "X-Content-SHA256": sha256(b"other")},
            "hash_mismatch",
        ),
        ({"Content-Digest": "sha-256=:bm90IDMyIGJ5dGVz:"}, "invalid_input"),
        ({"Content-Digest": "md5=:bm90IDMyIGJ5dGVz:"}, "invalid_input"),
        ({"X-Content-SHA256": "abc"}, "invalid_input"),
    ):
        upload = api.open_upload()
        answer = api.put(upload, "config.json", CONFIG, **headers)
        assert (answer.status_code, answer.json()["code"]) == (422, code)
        assert_nothing_stored(api, upload)


@contextmanager
def begin_put(
    api: Api, path: str, size: int, **headers: str
) -> Iterator[http.client.HTTPConnection]:
    """The headers of a PUT of `size` bytes; closes the connection at the end."""
    address = urlsplit(str(api.client.base_url))
    connection = http.client.HTTPConnection(address.hostname or "", address.port, timeout=30)
    connection.putrequest("PUT", path)
    connection.putheader("Content-Length", str(size))
    connection.putheader("Authorization", f"Bearer {api.key}")
    for name, value in headers.items():
        connection.putheader(name, value)
    connection.endheaders()
    try:
        yield connection
    finally:
        connection.close()


def invalid_header(change: dict[str, Any]) -> bytes:
    header = {"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} | change}
    raw = json.dumps(header).encode()
    return len(raw).to_bytes(8, "little") + raw + bytes(8)


def test_a_rejected_file_is_not_stored(api: Api) -> None:
    for path, data, code in (
        ("model.safetensors", weights()[:-1], "malformed_safetensors"),
        ("model.safetensors", weights() + b"\0", "malformed_safetensors"),
        ("model.safetensors", weights()[:20], "malformed_safetensors"),
        ("model.safetensors", b"", "malformed_safetensors"),
        ("model.safetensors", pickle.dumps({"w": [1.0]}), "malformed_safetensors"),
        ("model.safetensors", invalid_header({"shape": [3]}), "malformed_safetensors"),
        ("model.safetensors", invalid_header({"dtype": "F99"}), "malformed_safetensors"),
        ("model.safetensors", invalid_header({"data_offsets": [4, 12]}), "malformed_safetensors"),
        ("pytorch_model.bin", pickle.dumps({"w": [1.0]}), "unsafe_file"),
        ("modeling_evil.py", b"import os", "unsafe_file"),
        ("..%2F..%2Fconfig.json", CONFIG, "unsafe_file"),
        ("%2Fetc%2Fconfig.json", CONFIG, "unsafe_file"),
        ("a%5Cconfig.json", CONFIG, "unsafe_file"),
        ("picture.png", b"", "invalid_checkpoint"),
    ):
        upload = api.open_upload()
        answer = api.put(upload, path, data)
        assert (answer.status_code, answer.json()["code"]) == (422, code)
        assert_nothing_stored(api, upload)


def test_an_invalid_header_is_rejected_before_the_body_ends(
    api: Api, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error is sent once the header has arrived, before the rest of the body."""
    upload = api.open_upload()
    timers, receive = [], Protocol.data_received

    def watched(protocol: Protocol, data: bytes) -> None:
        receive(protocol, data)
        timers.append(protocol.timeout_keep_alive_task)

    monkeypatch.setattr(Protocol, "data_received", watched)
    data = invalid_header({"dtype": "F99"}) + bytes(2 * BATCH_BYTES)
    with begin_put(api, f"/v1/uploads/{upload}/files/model.safetensors", LIMIT) as connection:
        connection.send(data)
        answer = connection.getresponse()
        assert json.loads(answer.read())["code"] == "malformed_safetensors"
        connection.send(bytes(LIMIT - len(data)))  # which a client may only notice afterwards
        connection.request("GET", "/healthz")
        assert connection.getresponse().status == 200
    assert not any(timers), "a connection is not idle while the rest of a body arrives"
    assert_nothing_stored(api, upload)


def test_a_body_read_from_the_socket_ends_where_the_next_request_begins(
    api: Api, monkeypatch: pytest.MonkeyPatch
) -> None:
    upload, data = api.open_upload(), os.urandom(LIMIT)
    read, read_into = [], Body.read_into

    async def counted(body: Body, buffer: memoryview) -> int:
        read.append(await read_into(body, buffer))
        return read[-1]

    monkeypatch.setattr(Body, "read_into", counted)
    path = f"/v1/uploads/{upload}/files/tokenizer.json"
    with begin_put(api, path, LIMIT, Expect="100-continue") as connection:
        connection.send(data + b"GET /healthz HTTP/1.1\r\nConnection: close\r\n\r\n")
        with connection.sock.makefile("rb") as stream:
            answers = stream.read()
    first, stored, healthy = answers.split(b"HTTP/1.1 ")[1:]
    assert first.startswith(b"100 ")
    assert stored.startswith(b"200 ")
    assert sha256(data).encode() in stored
    assert healthy.startswith(b"200 ")
    assert LIMIT - 2 * PIECE_BYTES < sum(read) < LIMIT


def test_a_too_large_content_length_is_413(api: Api) -> None:
    upload = api.open_upload()
    answer = api.put(upload, "tokenizer.json", bytes(LIMIT + 1))
    assert (answer.status_code, answer.json()["code"]) == (413, "too_large")
    assert_nothing_stored(api, upload)


def test_a_too_large_stream_is_413(api: Api) -> None:
    upload = api.open_upload()

    def chunks() -> Iterator[bytes]:
        for _ in range(LIMIT // 100_000 + 1):
            yield bytes(100_000)

    answer = api.client.put(f"/v1/uploads/{upload}/files/tokenizer.json", content=chunks())
    assert (answer.status_code, answer.json()["code"]) == (413, "too_large")
    assert_nothing_stored(api, upload)


def test_a_disconnected_client_leaves_no_staging_file(api: Api) -> None:
    upload = api.open_upload()
    with begin_put(api, f"/v1/uploads/{upload}/files/tokenizer.json", LIMIT) as connection:
        connection.send(bytes(2 * BATCH_BYTES))
        wait_until(lambda: api.staged() != [])
    wait_until(lambda: api.staged() == [])
    assert_nothing_stored(api, upload)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "config.json is missing"),
        ({"config.json": CONFIG}, "no .safetensors file"),
        ({"model.safetensors": weights()}, "config.json is missing"),
        ({"config.json": b"{", "model.safetensors": weights()}, "not valid JSON"),
        (
            {"config.json": CONFIG, "a.safetensors": weights(), "b.safetensors": weights()},
            "in two files",
        ),
        (
            {
                "config.json": CONFIG,
                "model-00001-of-00002.safetensors": weights(),
                "model.safetensors.index.json": json.dumps(
                    {"weight_map": {"x": "model-00002-of-00002.safetensors"}}
                ).encode(),
            },
            "model-00002-of-00002.safetensors",
        ),
        (
            {
                "config.json": CONFIG,
                "weights.safetensors": weights(),
                "model.safetensors.index.json": b"[]",
            },
            "not a shard index",
        ),
    ],
)
def test_an_incomplete_checkpoint_stays_open(
    api: Api, files: dict[str, bytes], message: str
) -> None:
    upload = api.open_upload()
    for path, data in files.items():
        assert api.put(upload, path, data).status_code == 200
    answer = api.client.post(f"/v1/uploads/{upload}/complete")
    assert (answer.status_code, answer.json()["code"]) == (409, "invalid_checkpoint")
    assert message in answer.json()["detail"]
    assert api.client.get(f"/v1/uploads/{upload}").json()["state"] == "open"


def test_concurrent_completes_agree(api: Api) -> None:
    uploads = [api.open_upload() for _ in range(2)]
    for upload in uploads:
        api.put(upload, "config.json", CONFIG)
        api.put(upload, "model.safetensors", weights())
    with ThreadPoolExecutor(8) as pool:
        answers = list(
            pool.map(lambda upload: api.client.post(f"/v1/uploads/{upload}/complete"), uploads * 4)
        )
    assert {answer.status_code for answer in answers} == {200}
    assert len({answer.json()["checkpoint"]["digest"] for answer in answers}) == 1


def test_a_concurrent_put_and_complete_are_consistent(api: Api) -> None:
    """Either the file is in the checkpoint, or it was rejected."""
    for attempt in range(5):
        upload = api.open_upload()
        api.put(upload, "config.json", CONFIG)
        api.put(upload, "model.safetensors", weights())
        extra = json.dumps({"attempt": attempt}).encode()
        barrier = threading.Barrier(2)

        def put(upload: str = upload, extra: bytes = extra, barrier: Any = barrier) -> int:
            barrier.wait()
            return api.put(upload, "tokenizer.json", extra).status_code

        with ThreadPoolExecutor(1) as pool:
            status = pool.submit(put)
            barrier.wait()
            done = api.client.post(f"/v1/uploads/{upload}/complete").json()
        digest = done["checkpoint"]["digest"]
        manifest = CheckpointManifest.from_json(api.resources.blobs.read(digest, 1 << 20))
        assert status.result() in {200, 409}
        assert (status.result() == 200) == ("tokenizer.json" in [f.path for f in manifest.files])


def test_closed_uploads_accept_no_files(api: Api) -> None:
    complete = api.upload("calibration", {"text.txt": TEXT})["id"]
    aborted = api.open_upload()
    url = f"/v1/uploads/{aborted}"
    assert api.client.delete(url).status_code == 204
    assert api.put(complete, "text.txt", TEXT).json()["code"] == "conflict"
    for answer in (
        api.put(aborted, "text.txt", TEXT),
        api.client.post(f"{url}/complete"),
        api.client.get(url),
        api.client.delete(url),
    ):
        assert (answer.status_code, answer.json()["code"]) == (404, "not_found")


def test_unknown_uploads_are_not_found(api: Api) -> None:
    for answer in (
        api.client.get("/v1/uploads/upl_x"),
        api.client.delete("/v1/uploads/upl_x"),
        api.client.post("/v1/uploads/upl_x/complete"),
        api.put("upl_x", "config.json", CONFIG),
    ):
        assert (answer.status_code, answer.json()["code"]) == (404, "not_found")
    assert api.staged() == []


def test_files_that_a_model_does_not_need_are_ignored(api: Api) -> None:
    upload = api.open_upload()
    needed = {"config.json": CONFIG, "model.safetensors": weights(), "merges.txt": b"a b"}
    left = {
        "trainer_state.json": b"{}",
        "all_results.json": b"{}",
        "README.md": b"# A model",
        "consolidated.safetensors": weights(),
        "adapter_model.safetensors": weights(),
        "checkpoint-2/model.safetensors": weights(),
    }
    for path, data in (needed | left).items():
        assert api.put(upload, path, data).status_code == 200
    done = api.client.post(f"/v1/uploads/{upload}/complete").json()
    assert done["ignored"] == sorted(left)
    alone = api.upload("checkpoint", needed)
    assert alone["checkpoint"] == done["checkpoint"]
    assert alone["ignored"] == []


def test_the_error_names_folders_with_weights(api: Api) -> None:
    upload = api.open_upload()
    api.put(upload, "config.json", CONFIG)
    for step in (5, 20):
        api.put(upload, f"checkpoint-{step}/model.safetensors", weights())
    answer = api.client.post(f"/v1/uploads/{upload}/complete")
    assert (answer.status_code, answer.json()["code"]) == (409, "invalid_checkpoint")
    assert "such as 'checkpoint-20'" in answer.json()["detail"]


def test_an_upload_for_a_base_whose_name_is_taken_is_refused_at_its_start(api: Api) -> None:
    api.base("tiny", weights(0))
    api.client.delete("/v1/bases/tiny").raise_for_status()  # its name stays taken
    other, same = sha256(weights(1)), sha256(weights(0))

    def announce(digest: str, **fields: Any) -> int:
        files = [{"path": "model.safetensors", "size": len(weights(0)), "sha256": digest}]
        body = {"kind": "checkpoint", "files": files, **fields}
        return api.client.post("/v1/uploads", json=body).status_code

    assert announce(other, base="tiny") == 409
    assert announce(other, base="small") == 201
    assert announce(other) == 201
    api.resources.blobs.delete(same)  # as after damage: the base is sent again under its name
    assert announce(same, base="tiny") == 201
