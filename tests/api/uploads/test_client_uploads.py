"""The client's uploads: only what is missing is sent, and what broke off is resumed."""

import threading
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from deltadock.api.uploads import completion
from deltadock.client import uploads
from deltadock.client.blocking import Client
from deltadock.errors import HashMismatch, MalformedSafetensors, StorageFull, Unavailable
from deltadock.storage.blobs import parts
from tests.api.support import CONFIG, TEXT, Api, sha256, weights
from tests.storage.faulty_proxy import Fault, FaultyProxy, faulty_proxy
from tests.waiting import wait_until

PART = 1 << 20
KEPT = ("config.json", "model.safetensors", "tokenizer.json")
LEFT = ("trainer_state.json", "training_args.bin", "README.md", "checkpoint-2/optimizer.pt")


@pytest.fixture(autouse=True)
def _small_parts_and_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts, "MIN_PART_BYTES", PART)
    monkeypatch.setattr(uploads, "POLL_SECONDS", 0.02)
    monkeypatch.setattr(uploads.random, "uniform", lambda *_: 0.0)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """What a trainer leaves: a checkpoint with a file of four parts, and more."""
    folder = tmp_path / "checkpoint"
    for name in (*KEPT, *LEFT):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"{}")
    (folder / "config.json").write_bytes(CONFIG)
    (folder / "model.safetensors").write_bytes(weights(rows=120_000))
    return folder


@pytest.fixture
def proxy(api: Api) -> Iterator[FaultyProxy]:
    with faulty_proxy(str(api.client.base_url)) as proxy:
        yield proxy


@pytest.fixture
def client(api: Api, proxy: FaultyProxy) -> Iterator[Client]:
    with Client(proxy.url, api.key) as client:
        yield client


def sent(proxy: FaultyProxy) -> list[str]:
    """What was sent since the last call: names of files, and names with parts."""
    puts = [entry for entry in proxy.requests if entry.startswith("PUT")]
    proxy.requests.clear()
    return sorted(put.partition("/files/")[2] for put in puts)


EVERYTHING = [
    "config.json",
    *(f"model.safetensors/parts/{number}" for number in (1, 2, 3, 4)),
    "tokenizer.json",
]


def test_of_a_trainers_folder_the_model_is_sent_once(
    api: Api, client: Client, proxy: FaultyProxy, folder: Path
) -> None:
    seen: dict[str, list[int]] = {}
    checkpoint = client.upload_folder(
        folder, lambda name, done, _: seen.setdefault(name, []).append(done)
    )
    assert sent(proxy) == EVERYTHING
    size = (folder / "model.safetensors").stat().st_size
    steps = seen["model.safetensors"]
    assert steps == sorted(steps)
    assert (steps[0], steps[-1], len(steps)) == (0, size, 5)
    assert {name: done[-1] for name, done in seen.items()} == {
        name: (folder / name).stat().st_size for name in KEPT
    }
    assert client.upload_folder(folder) == checkpoint
    (folder / "tokenizer.json").write_bytes(b"[]")
    assert client.upload_folder(folder) != checkpoint
    assert sent(proxy) == ["tokenizer.json"]
    text = folder / "text.txt"
    text.write_bytes(TEXT * 2_500)
    assert client.upload_calibration(text) == sha256(TEXT * 2_500)


def test_parts_that_break_off_are_sent_again(
    client: Client, proxy: FaultyProxy, folder: Path
) -> None:
    proxy.faults = [
        Fault("PUT", "parts/2", reset_request=100),
        Fault("PUT", "parts/3", status=503),
        Fault("PUT", "parts/4", lose_answer=True),
        Fault("PUT", "config.json", lose_answer=True),
        Fault("GET", "/parts", lose_answer=True),
    ]
    assert client.upload_folder(folder).total_bytes > 3 * PART
    again = [EVERYTHING[0], EVERYTHING[2], EVERYTHING[3]]
    assert sent(proxy) == sorted(EVERYTHING + again)  # part 4 was there


def test_an_upload_that_was_interrupted_is_continued(
    api: Api, client: Client, proxy: FaultyProxy, folder: Path
) -> None:
    proxy.faults = [Fault("PUT", "parts/3", status=503, times=99)]
    with pytest.raises(Unavailable):
        client.upload_folder(folder)
    assert set(sent(proxy)) == set(EVERYTHING)
    proxy.faults = []
    client.upload_folder(folder)
    assert sent(proxy) == ["model.safetensors/parts/3"]
    assert len(api.client.get("/v1/uploads").json()["data"]) == 1


def test_a_part_that_another_process_sends_once_more_is_waited_for(
    api: Api, client: Client, folder: Path
) -> None:
    data = (folder / "model.safetensors").read_bytes()[PART : 2 * PART]
    others: list[threading.Thread] = []

    def send_again(name: str, done: int, size: int) -> None:
        if name == "model.safetensors" and done == size and not others:
            (upload,) = api.client.get("/v1/uploads").json()["data"]
            url = f"/v1/uploads/{upload['id']}/files/{name}/parts"

            def slowly() -> Iterator[bytes]:
                yield data[: PART // 2]
                time.sleep(0.5)
                yield data[PART // 2 :]

            length = {"Content-Length": str(PART)}
            put = partial(api.client.put, f"{url}/2", content=slowly(), headers=length)
            others.append(threading.Thread(target=put))
            others[0].start()
            wait_until(lambda: 2 not in api.client.get(url).json()["arrived"])

    assert client.upload_folder(folder, send_again).total_bytes > 3 * PART
    others[0].join()
    assert [upload["state"] for upload in api.client.get("/v1/uploads").json()["data"]] == [
        "complete"
    ]


def test_an_upload_that_another_process_completes_meanwhile_is_taken(
    api: Api, client: Client, proxy: FaultyProxy, folder: Path
) -> None:
    def complete(name: str, done: int, size: int) -> None:
        if (name, done) == ("model.safetensors", 0):
            with Client(str(api.client.base_url), api.key) as other:
                other.upload_folder(folder)

    assert client.upload_folder(folder, complete).total_bytes > 3 * PART
    assert len(api.client.get("/v1/uploads").json()["data"]) == 1


def test_a_rejected_upload_is_aborted(api: Api, client: Client, folder: Path) -> None:
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[:-1])
    with pytest.raises(MalformedSafetensors):
        client.upload_folder(folder)
    assert api.client.get("/v1/uploads").json()["data"] == []
    assert api.resources.blobs.parted_uploads() == frozenset()


def test_a_file_that_changes_meanwhile_is_rejected(client: Client, folder: Path) -> None:
    def change(name: str, *_: int) -> None:
        if name == "config.json":
            with (folder / "model.safetensors").open("r+b") as file:
                file.seek(-1, 2)
                file.write(b"\x55")

    with pytest.raises(HashMismatch, match=r"model\.safetensors"):
        client.upload_folder(folder, change)


def test_a_completion_that_is_tried_again_is_told(
    api: Api,
    client: Client,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    put_bytes = api.resources.blobs.put_bytes
    failures = iter([StorageFull("The store is full.")])

    def fail_once(data: bytes) -> str:
        if (error := next(failures, None)) is not None:
            raise error
        return put_bytes(data)

    monkeypatch.setattr(completion, "RETRY_SECONDS", 0.5)
    monkeypatch.setattr(api.resources.blobs, "put_bytes", fail_once)
    client.upload_folder(folder)
    told = [record.getMessage() for record in caplog.records if record.name == uploads.__name__]
    assert told == ["The server checks the files again later: The store is full."]
