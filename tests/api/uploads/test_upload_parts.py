"""Announced files: what is here is skipped, large ones come in parts, all is hashed again."""

import base64
import errno
import hashlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from deltadock.api.uploads import completion
from deltadock.api.uploads.completion import Completer
from deltadock.cli.processes import free_ports
from deltadock.errors import DeltadockError, Unavailable
from deltadock.settings import Settings
from deltadock.storage.blobs import PartedFile, local_parts, parts
from deltadock.storage.blobs.local import LocalBlobStore
from deltadock.storage.blobs.local_parts import LocalPartedFile
from deltadock.storage.database import migrate
from deltadock.storage.repositories import UploadRepository
from deltadock.storage.tables import UploadKind, UploadRow, UploadState
from deltadock.storage.tenancy import LOCAL_TENANT
from tests.api.support import CONFIG, TEXT, Api, bearer, issue_key, sha256, weights
from tests.waiting import wait_until

PART = 1 << 20
WEIGHTS = weights(rows=80_000)  # 2.56 MB
OTHER = weights(1)
FILES = {"config.json": CONFIG, "model.safetensors": WEIGHTS}


@pytest.fixture(autouse=True)
def _small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts, "MIN_PART_BYTES", PART)


def part(number: int, data: bytes = WEIGHTS) -> bytes:
    return data[(number - 1) * PART : number * PART]


def send_parts(api: Api, upload: str, path: str, data: bytes, numbers: list[int]) -> None:
    with ThreadPoolExecutor(3) as pool:
        answers = list(pool.map(lambda n: api.put_part(upload, path, n, part(n, data)), numbers))
    assert [answer.status_code for answer in answers] == [200] * len(numbers)


def complete(api: Api, upload: str) -> httpx.Response:
    return api.client.post(f"/v1/uploads/{upload}/complete")


def parted(api: Api) -> frozenset[str]:
    return api.resources.blobs.parted_uploads()


def test_parts_in_parallel_and_any_order_become_a_checkpoint(api: Api) -> None:
    upload = api.announce(FILES)
    assert [file["parts"] for file in upload["files"]] == [None, {"bytes": PART, "count": 3}]
    assert upload["expires_at"] > upload["created_at"]
    assert api.put(upload["id"], "config.json", CONFIG).json()["stored"]
    send_parts(api, upload["id"], "model.safetensors", WEIGHTS, [3, 1])
    listed = api.client.get(f"/v1/uploads/{upload['id']}/files/model.safetensors/parts").json()
    assert (listed["arrived"], [missing["number"] for missing in listed["missing"]]) == (
        [1, 3],
        [2],
    )
    assert api.client.put(listed["missing"][0]["url"], content=part(2)).status_code == 200
    send_parts(api, upload["id"], "model.safetensors", WEIGHTS, [2, 2, 1])
    done = complete(api, upload["id"])
    assert done.status_code == 200, done.text
    # The same checkpoint as one that is sent in whole files.
    assert done.json()["checkpoint"] == api.upload("checkpoint", FILES)["checkpoint"]
    assert complete(api, upload["id"]).json() == done.json()
    assert (done.json()["expires_at"], parted(api), api.staged()) == (None, frozenset(), [])


def test_space_is_reserved_once_however_many_parts_come_first(
    api: Api, monkeypatch: pytest.MonkeyPatch
) -> None:
    both, begin = threading.Barrier(2), LocalBlobStore.begin_parts
    free = PART  # of a disk

    def begin_together(*arguments: Any) -> PartedFile:
        file = begin(*arguments)
        both.wait(20)
        return file

    def reserve(_descriptor: int, size: int, _others: int) -> None:
        nonlocal free
        if size > free:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        free -= size

    monkeypatch.setattr(local_parts, "reserve", reserve)
    upload = api.announce(FILES)["id"]
    assert api.put_part(upload, "model.safetensors", 1, part(1)).status_code == 507
    assert list(api.resources.blobs.entries("parts")) == []
    monkeypatch.setattr(LocalBlobStore, "begin_parts", begin_together)
    free = len(WEIGHTS)
    send_parts(api, upload, "model.safetensors", WEIGHTS, [1, 2])
    assert free == 0


def test_what_is_here_is_not_sent_again(api: Api) -> None:
    api.upload("checkpoint", FILES)
    # Stored as a text, too, but never inspected as one.
    calibration = api.announce({"text.jsonl": CONFIG}, "calibration")
    assert not calibration["files"][0]["stored"]
    renamed = {"generation_config.json": CONFIG, "tokenizer.json": WEIGHTS, **FILES}
    upload = api.announce(renamed)
    stored = {file["path"]: file["stored"] for file in upload["files"]}
    assert stored == {path: path != "tokenizer.json" for path in renamed}
    again = api.announce(FILES)
    assert complete(api, again["id"]).status_code == 200
    # Deleted bytes are asked for again.
    api.resources.blobs.delete(sha256(WEIGHTS))
    assert [file["stored"] for file in api.announce(FILES)["files"]] == [True, False]


def test_a_wrong_file_is_named_and_the_good_ones_are_kept(api: Api) -> None:
    other = weights(1, rows=80_000)
    files = {**FILES, "a.safetensors": other}
    upload = api.announce(files)["id"]
    api.put(upload, "config.json", CONFIG)
    wrong = WEIGHTS[:-1] + bytes([WEIGHTS[-1] ^ 1])
    send_parts(api, upload, "a.safetensors", other, [1, 2, 3])
    send_parts(api, upload, "model.safetensors", wrong, [1, 2, 3])
    answer = complete(api, upload)
    assert (answer.status_code, answer.json()["code"]) == (409, "hash_mismatch")
    assert answer.json()["file"] == "model.safetensors"
    assert sha256(wrong) in answer.json()["detail"]
    assert not api.resources.blobs.exists(sha256(wrong))
    state = api.client.get(f"/v1/uploads/{upload}").json()
    assert (state["state"], state["error"]["file"]) == ("open", "model.safetensors")
    assert {file["path"]: file["stored"] for file in state["files"]} == {
        "a.safetensors": True,
        "config.json": True,
        "model.safetensors": False,
    }
    assert complete(api, upload).status_code == 409  # its parts are gone
    send_parts(api, upload, "model.safetensors", WEIGHTS, [1, 2, 3])
    done = complete(api, upload).json()
    assert (done["state"], done["error"], done["ignored"]) == ("complete", None, ["a.safetensors"])


def test_a_file_of_the_right_hash_that_is_no_checkpoint_is_rejected(api: Api) -> None:
    data = bytes(8) + os.urandom(2 * PART)
    upload = api.announce({"config.json": CONFIG, "model.safetensors": data})["id"]
    api.put(upload, "config.json", CONFIG)
    send_parts(api, upload, "model.safetensors", data, [1, 2, 3])
    answer = complete(api, upload)
    assert (answer.status_code, answer.json()["code"]) == (409, "malformed_safetensors")
    assert not api.resources.blobs.exists(sha256(data))


def test_announced_files_that_cannot_be_are_rejected(api: Api, subtests: pytest.Subtests) -> None:
    good = {"path": "config.json", "size": 1, "sha256": "0" * 64}
    for change, kind, code in (
        ({"path": "../config.json"}, "checkpoint", "unsafe_file"),
        ({"path": "model.bin"}, "checkpoint", "unsafe_file"),
        ({"path": "picture.png"}, "checkpoint", "invalid_checkpoint"),
        ({"path": "model.safetensors", "size": 2**62}, "checkpoint", "too_large"),
        ({"size": -1}, "checkpoint", "invalid_input"),
        ({"sha256": "0" * 63}, "checkpoint", "invalid_input"),
        ({"path": "config.json"}, "calibration", "invalid_calibration"),
        ({"unknown": 1}, "checkpoint", "invalid_input"),
    ):
        with subtests.test(change=change):
            body = {"kind": kind, "files": [good | change]}
            assert api.client.post("/v1/uploads", json=body).json()["code"] == code
    for kind, files in (("checkpoint", [good, good]), ("calibration", [good, good])):
        body = {"kind": kind, "files": [file | {"path": "a.txt"} for file in files]}
        assert api.client.post("/v1/uploads", json=body).status_code == 422
    assert api.client.get("/v1/uploads").json()["data"] == []


def test_parts_that_cannot_be_are_rejected(api: Api, subtests: pytest.Subtests) -> None:
    upload = api.announce({**FILES, "tokenizer.json": b"{}"})["id"]
    api.put(upload, "config.json", CONFIG)
    digest = base64.b64encode(hashlib.sha256(b"other").digest()).decode()
    wrong = {"Content-Digest": f"sha-256=:{digest}:"}
    for path, number, data, headers, status in (
        ("model.safetensors", 3, part(1), {}, 409),
        ("model.safetensors", 1, b"short", {}, 409),
        ("model.safetensors", 4, b"", {}, 409),
        ("model.safetensors", 1, part(1), wrong, 422),
        ("config.json", 1, CONFIG, {}, 409),
        ("tokenizer.json", 1, b"{}", {}, 409),
        ("other.json", 1, b"{}", {}, 404),
    ):
        with subtests.test(path=path, number=number):
            assert api.put_part(upload, path, number, data, **headers).status_code == status
    chunked = api.client.put(  # of unknown length
        f"/v1/uploads/{upload}/files/model.safetensors/parts/3", content=iter([bytes(PART)] * 2)
    )
    assert chunked.status_code == 409
    listed = api.client.get(f"/v1/uploads/{upload}/files/model.safetensors/parts").json()
    assert listed["arrived"] == []
    answer = api.put(upload, "tokenizer.json", b"[]")  # other bytes than announced
    assert answer.json()["code"] == "hash_mismatch"
    incomplete = complete(api, upload).json()
    assert (incomplete["status"], "tokenizer.json" in incomplete["detail"]) == (409, False)
    assert "model.safetensors" in incomplete["detail"]


def test_a_calibration_text_in_parts_is_checked(api: Api) -> None:
    for data, status in ((TEXT * 2_500, 200), (TEXT[:-2] * 2_500 + b"\xff", 409)):
        upload = api.announce({"text.txt": data}, "calibration")["id"]
        count = -(-len(data) // PART)
        send_parts(api, upload, "text.txt", data, list(range(1, count + 1)))
        assert complete(api, upload).status_code == status


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Completions wait for the event, and requests do not wait for completions."""
    go = threading.Event()
    run = Completer.run

    def wait_and_run(self: Completer, upload_id: str) -> None:
        go.wait(20)
        run(self, upload_id)

    monkeypatch.setattr(Completer, "run", wait_and_run)
    monkeypatch.setattr(completion, "WAIT_SECONDS", 0.05)
    yield go
    go.set()


def sent(api: Api) -> str:
    """An upload whose parts are all here."""
    upload: str = api.announce(FILES)["id"]
    api.put(upload, "config.json", CONFIG)
    send_parts(api, upload, "model.safetensors", WEIGHTS, [1, 2, 3])
    return upload


def hash_ahead(api: Api) -> None:
    """Wait until what has arrived is hashed."""
    for file in api.resources.completer.ahead._files.values():
        assert file.work is not None
        file.work.result(10)


@pytest.mark.parametrize(
    ("change", "is_read", "status"),
    [("nothing", False, 200), ("a part again", True, 200), ("a flipped bit", True, 409)],
)
def test_what_was_hashed_on_arrival_is_read_again_only_if_it_has_changed(
    api: Api, monkeypatch: pytest.MonkeyPatch, change: str, is_read: bool, status: int
) -> None:
    upload = sent(api)
    hash_ahead(api)
    (data,) = api.resources.settings.blob_folder.glob("parts/*/*/data")
    if change == "a part again":
        send_parts(api, upload, "model.safetensors", WEIGHTS, [2])
        hash_ahead(api)
    elif change == "a flipped bit":
        time.sleep(0.02)  # files are dated by the clock's last tick
        with data.open("r+b") as file:
            file.seek(PART)
            file.write(bytes([WEIGHTS[PART] ^ 1]))
    starts = []
    read = LocalPartedFile.read

    def reading(self: LocalPartedFile, start: int, end: int) -> Iterator[bytes]:
        starts.append(start)
        return read(self, start, end)

    monkeypatch.setattr(LocalPartedFile, "read", reading)
    assert complete(api, upload).status_code == status
    assert starts == [0 if is_read else 3 * PART]


def test_what_cannot_be_hashed_on_arrival_is_read_when_it_is_completed(
    api: Api, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as failing:
        failing.setattr(LocalPartedFile, "read", lambda *_: 1 / 0)
        upload = sent(api)
        hash_ahead(api)
    [file] = api.resources.completer.ahead._files.values()
    assert not file.is_running, "another file may take its place"
    assert complete(api, upload).status_code == 200


def test_a_long_completion_goes_on_in_the_background(
    api: Api, slow: threading.Event, subtests: pytest.Subtests
) -> None:
    upload = sent(api)
    for _ in range(2):
        answer = complete(api, upload)
        assert (answer.status_code, answer.json()["state"]) == (202, "completing")
        assert 0 <= answer.json()["percent"] < 1  # config.json is stored
    for change in (
        api.put(upload, "config.json", CONFIG),
        api.put_part(upload, "model.safetensors", 1, part(1)),
        api.client.get(f"/v1/uploads/{upload}/files/model.safetensors/parts"),
    ):
        assert (change.status_code, change.json()["code"]) == (409, "conflict")
    slow.set()
    url = f"/v1/uploads/{upload}"
    wait_until(lambda: api.client.get(url).json()["state"] == "complete")


def test_an_upload_can_be_aborted_while_it_completes(api: Api, slow: threading.Event) -> None:
    upload = sent(api)
    assert complete(api, upload).status_code == 202
    assert api.client.delete(f"/v1/uploads/{upload}").status_code == 204
    assert parted(api) == frozenset()
    slow.set()
    api.resources.completer.submit(upload, LOCAL_TENANT, None).result(10)
    assert api.client.get(f"/v1/uploads/{upload}").status_code == 404
    assert not api.resources.blobs.exists(sha256(WEIGHTS))


def test_a_store_that_fails_meanwhile_is_tried_again(
    api: Api, monkeypatch: pytest.MonkeyPatch
) -> None:
    upload = sent(api)
    link = LocalBlobStore.link
    failures = iter([Unavailable("The store is down.")])

    def fail_once(self: LocalBlobStore, *arguments: Any) -> None:
        if error := next(failures, None):
            raise error
        link(self, *arguments)

    monkeypatch.setattr(LocalBlobStore, "link", fail_once)
    monkeypatch.setattr("deltadock.api.uploads.completion.RETRY_SECONDS", 0.0)
    assert complete(api, upload).status_code == 202
    assert complete(api, upload).status_code == 200


def test_a_store_that_fails_for_long_opens_the_upload_again(
    api: Api, monkeypatch: pytest.MonkeyPatch
) -> None:
    upload = sent(api)

    def fail(*_: Any) -> None:
        raise Unavailable("The store is down.")

    monkeypatch.setattr("deltadock.api.uploads.completion.RETRY_SECONDS", 0.0)
    with monkeypatch.context() as patch:
        patch.setattr(LocalBlobStore, "link", fail)
        for _ in range(completion.RETRIES):
            answer = complete(api, upload).json()
            assert (answer["state"], answer["error"]["code"]) == ("completing", "unavailable")
        assert complete(api, upload).status_code == 503
    state = api.client.get(f"/v1/uploads/{upload}").json()
    assert (state["state"], state["error"]["message"]) == ("open", "The store is down.")
    done = complete(api, upload)
    assert (done.status_code, done.json()["error"]) == (200, None)


@pytest.mark.parametrize("which", ["sent", "stored"])
def test_a_damaged_file_is_sent_again(api: Api, which: str) -> None:
    api.upload("checkpoint", FILES if which == "stored" else {**FILES, "model.safetensors": OTHER})
    path = api.resources.settings.blob_folder / "blobs" / sha256(CONFIG)
    path.chmod(0o644)
    path.write_bytes(b"?" + CONFIG[1:])
    upload = api.announce(FILES)["id"]
    if which == "sent":
        send_parts(api, upload, "model.safetensors", WEIGHTS, [1, 2, 3])
    answer = complete(api, upload)
    assert (answer.status_code, answer.json()["code"]) == (502, "damaged_blob")
    state = api.client.get(f"/v1/uploads/{upload}").json()
    assert state["state"] == "open"
    assert [file["path"] for file in state["files"] if not file["stored"]] == ["config.json"]
    if which == "sent":  # in the background, which cannot answer
        assert (state["error"]["code"], state["error"]["file"]) == ("damaged_blob", "config.json")
    assert complete(api, upload).status_code == 409, "it has not arrived"
    assert api.put(upload, "config.json", CONFIG).status_code == 200
    assert complete(api, upload).status_code == 200
    assert path.read_bytes() == CONFIG


def test_uploads_are_listed(api: Api) -> None:
    ids = [api.announce(FILES)["id"], api.upload("checkpoint", FILES)["id"], api.open_upload()]
    first = api.client.get("/v1/uploads", params={"limit": 2}).json()
    assert [upload["id"] for upload in first["data"]] == ids[:0:-1]
    rest = api.client.get("/v1/uploads", params={"after": first["next"]}).json()
    assert ([upload["id"] for upload in rest["data"]], rest["next"]) == ([ids[0]], None)
    assert [file["path"] for file in rest["data"][0]["files"]] == list(FILES)
    done = api.client.get("/v1/uploads?state=complete&state=dropped").json()["data"]
    assert [upload["checkpoint"]["model_type"] for upload in done] == ["llama"]
    assert api.client.get("/v1/uploads?after=upl_x").status_code == 404


def test_another_tenants_bytes_are_not_here(api: Api) -> None:
    api.upload("checkpoint", FILES)
    with api.resources.database.read_scope() as session:
        stored = {
            tenant: UploadRepository(session, tenant).stored_files(
                UploadKind.CHECKPOINT, [sha256(WEIGHTS)]
            )
            for tenant in (LOCAL_TENANT, "ten_other")
        }
    assert [len(files) for files in stored.values()] == [1, 0]


class TestProcess:
    """A real api process that is killed in the middle of a part."""

    @pytest.fixture
    def environment(self, tmp_path: Path, broker_url: str) -> dict[str, str]:
        home = tmp_path / "home"
        migrate(f"sqlite:///{home / 'deltadock.db'}")
        return {
            "DELTADOCK_HOME": str(home),
            "DELTADOCK_BROKER_URL": broker_url,
            "DELTADOCK_LEASE_SECONDS": "1",
        }

    def start(self, environment: dict[str, str], port: int) -> subprocess.Popen[bytes]:
        process = subprocess.Popen(
            [sys.executable, "-m", "uvicorn", "deltadock.api.main:app", "--port", str(port)],
            env=os.environ | environment,
            stderr=subprocess.DEVNULL,
        )
        wait_until(lambda: self.answers(port))
        return process

    def answers(self, port: int) -> bool:
        try:
            return httpx.get(f"http://127.0.0.1:{port}/healthz").is_success
        except httpx.TransportError:
            return False

    def test_an_upload_resumes_after_the_api_is_killed_mid_part(
        self, environment: dict[str, str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.undo()  # the process has parts of 16 MiB
        size = parts.MIN_PART_BYTES
        data = weights(rows=(2 * size) // 32)
        port = free_ports(1)[0]
        url = f"http://127.0.0.1:{port}"
        headers = bearer(issue_key(Settings(home=Path(environment["DELTADOCK_HOME"]))))
        files = {"config.json": CONFIG, "model.safetensors": data}
        process = self.start(environment, port)
        with httpx.Client(base_url=url, timeout=60, headers=headers) as client:
            upload = Api(client, None).announce(files)["id"]  # type: ignore[arg-type]
            target = f"/v1/uploads/{upload}/files"
            client.put(f"{target}/config.json", content=CONFIG)
            client.put(f"{target}/model.safetensors/parts/2", content=data[size : 2 * size])
            with socket.create_connection(("127.0.0.1", port)) as half:
                head = f"PUT {target}/model.safetensors/parts/1 HTTP/1.1\r\nHost: x\r\n"
                head += f"Authorization: {headers['Authorization']}\r\n"
                half.sendall(f"{head}Content-Length: {size}\r\n\r\n".encode())
                half.sendall(data[: size // 2])
                time.sleep(0.3)
                process.kill()
                process.wait(10)
        process = self.start(environment, port)
        with httpx.Client(base_url=url, timeout=60, headers=headers) as client:
            listed = client.get(f"{target}/model.safetensors/parts").json()
            assert listed["arrived"] == [2]
            for missing in listed["missing"]:
                start = (missing["number"] - 1) * size
                client.put(missing["url"], content=data[start : start + missing["size"]])
            answer = client.post(f"/v1/uploads/{upload}/complete")
            # Killed once more, while the bytes are hashed or just after.
            assert answer.status_code in {200, 202}
            process.send_signal(signal.SIGKILL)
            process.wait(10)
        process = self.start(environment, port)
        try:

            def state() -> Any:
                return httpx.get(f"{url}/v1/uploads/{upload}", headers=headers).json()

            wait_until(lambda: state()["state"] == UploadState.COMPLETE)
            assert state()["checkpoint"]["total_bytes"] == sum(map(len, files.values()))
        finally:
            process.terminate()
            process.wait(20)


def test_the_uploads_of_a_tenant_do_not_keep_anothers_from_completing(
    api: Api, monkeypatch: pytest.MonkeyPatch
) -> None:
    acme = api.client.post("/v1/tenants", json={"name": "acme"}).json()["id"]
    go_on = threading.Event()
    real = Completer._complete

    def slow(self: Completer, upload: UploadRow) -> DeltadockError | None:
        if upload.tenant_id == acme:
            go_on.wait(30)
        return real(self, upload)

    monkeypatch.setattr(Completer, "_complete", slow)
    monkeypatch.setattr(completion, "WAIT_SECONDS", 0.2)
    headers = bearer(issue_key(api.resources.settings, tenant=acme))
    with httpx.Client(base_url=api.client.base_url, timeout=30, headers=headers) as client:
        other = Api(client, api.resources)
        for _ in range(3):
            assert complete(other, sent(other)).status_code == 202
    mine = sent(api)
    complete(api, mine)
    url = f"/v1/uploads/{mine}"
    try:
        wait_until(lambda: api.client.get(url).json()["state"] == "complete")
    finally:
        go_on.set()
