"""Imports by reference: only from places that the operator allows; nothing leads out of them."""

import json
import os
import re
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from deltadock.api.uploads.sources import FolderSource, SourceFile, open_source, source_files
from deltadock.artifacts.checkpoint import SHARD_INDEX
from deltadock.errors import DeltadockError, Forbidden, InvalidInput, NotFound
from deltadock.settings import Settings
from deltadock.storage.blobs import make_blob_store
from deltadock.storage.repositories import UploadRepository
from deltadock.storage.tables import UploadFileRow, UploadKind, UploadRow
from deltadock.storage.tenancy import LOCAL_TENANT
from tests.api.support import CONFIG, TEXT, Api, serving, sha256, weights
from tests.waiting import wait_until

FILES = {"config.json": CONFIG, "model.safetensors": weights(), "trainer_state.json": b"{}"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A checkpoint in an allowed folder, beside a folder that is not allowed."""
    for place in ("models/tuned", "models-private"):
        (tmp_path / place).mkdir(parents=True)
        for name, data in FILES.items():
            (tmp_path / place / name).write_bytes(data)
    (tmp_path / "models/text.txt").write_bytes(TEXT)
    return tmp_path / "models"


@pytest.fixture
def settings_fields(folder: Path) -> dict[str, Any]:
    return {"import_sources": [f"file://{folder}"]}


def finished(api: Api, source: str, kind: str = "checkpoint") -> dict[str, Any]:
    """The upload after its import ended."""
    answer = api.client.post("/v1/uploads", json={"kind": kind, "source": source})
    assert answer.status_code == 201, answer.text
    assert answer.json()["source"] == source
    url = f"/v1/uploads/{answer.json()['id']}"
    wait_until(lambda: api.client.get(url).json()["state"] != "completing")
    upload: dict[str, Any] = api.client.get(url).json()
    return upload


def completed(api: Api, upload_id: str) -> dict[str, Any]:
    """The upload after another try."""
    url = f"/v1/uploads/{upload_id}"
    assert api.client.post(f"{url}/complete").status_code in {200, 202}
    wait_until(lambda: api.client.get(url).json()["state"] != "completing")
    upload: dict[str, Any] = api.client.get(url).json()
    return upload


def test_a_folder_is_imported(api: Api, folder: Path) -> None:
    upload = finished(api, f"file://{folder}/tuned")
    assert (upload["state"], upload["error"], upload["ignored"]) == ("complete", None, [])
    assert upload["checkpoint"] == api.upload("checkpoint", FILES)["checkpoint"]
    text = finished(api, f"file://{folder}/text.txt", "calibration")
    assert text["calibration"] == {"digest": sha256(TEXT), "size": len(TEXT)}
    assert api.staged() == []


def test_a_damaged_source_is_named_and_can_be_tried_again(api: Api, folder: Path) -> None:
    path = folder / "tuned" / "model.safetensors"
    path.write_bytes(FILES["model.safetensors"][:-1])
    upload = finished(api, f"file://{folder}/tuned")
    assert upload["state"] == "open"
    assert (upload["error"]["code"], upload["error"]["file"]) == (
        "malformed_safetensors",
        "model.safetensors",
    )
    assert api.put(upload["id"], "model.safetensors", b"").status_code == 409
    path.write_bytes(FILES["model.safetensors"])
    assert api.client.post(f"/v1/uploads/{upload['id']}/complete").status_code == 200


def test_what_the_source_has_otherwise_by_now_is_imported_again(api: Api, folder: Path) -> None:
    place = folder / "tuned"
    (place / "tokenizer.json").write_bytes(b"{}")
    (place / "config.json").write_bytes(b'{"hidden_size": 8}')  # no model_type
    upload = finished(api, f"file://{place}")
    assert (upload["state"], upload["error"]["code"]) == ("open", "invalid_checkpoint")
    (place / "model.safetensors").write_bytes(weights(1))  # as many bytes
    (place / "config.json").write_bytes(CONFIG)
    (place / "tokenizer.json").unlink()
    upload = completed(api, upload["id"])
    assert (upload["state"], upload["error"], upload["ignored"]) == ("complete", None, [])
    assert {file["path"]: file["sha256"] for file in upload["files"]} == {
        "config.json": sha256(CONFIG),
        "model.safetensors": sha256(weights(1)),
    }


def test_what_the_source_still_has_is_not_read_again(
    api: Api, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "tuned" / "config.json").write_bytes(b'{"hidden_size": 8}')
    upload = finished(api, f"file://{folder}/tuned")
    assert upload["state"] == "open"
    (folder / "tuned" / "config.json").write_bytes(CONFIG)
    read, paths = FolderSource.read, []

    def noting(self: FolderSource, path: str, file: SourceFile) -> Iterator[bytes]:
        paths.append(path)
        return read(self, path, file)

    monkeypatch.setattr(FolderSource, "read", noting)
    assert completed(api, upload["id"])["state"] == "complete"
    assert paths == ["config.json"]


def shards(value: float) -> dict[str, bytes]:
    """A checkpoint of two shards with this weight."""
    names = {name: f"model-0000{n}-of-00002.safetensors" for n, name in ((1, "a"), (2, "b"))}
    tensor = np.full((8, 8), value, np.float32)
    return {
        SHARD_INDEX: json.dumps({"weight_map": names}).encode(),
        **{file: save({name: tensor}) for name, file in names.items()},
    }


def test_shards_replace_a_whole_file(api: Api, folder: Path) -> None:
    place = folder / "tuned"
    (place / "config.json").write_bytes(b'{"hidden_size": 8}')
    upload = finished(api, f"file://{place}")
    (place / "model.safetensors").unlink()
    for name, data in {"config.json": CONFIG, **shards(1)}.items():
        (place / name).write_bytes(data)
    upload = completed(api, upload["id"])
    assert (upload["state"], upload["ignored"]) == ("complete", [])
    assert {file["path"] for file in upload["files"]} == {"config.json", *shards(1)}


def test_a_folder_that_is_saved_into_meanwhile_is_not_mixed(
    api: Api, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = folder / "tuned"
    (place / "model.safetensors").unlink()
    first, second = shards(1), shards(2)
    for name, data in first.items():
        (place / name).write_bytes(data)
    put_file = UploadRepository.put_file

    def saves_then(self: UploadRepository, upload: UploadRow, file: UploadFileRow) -> None:
        put_file(self, upload, file)
        if file.path.startswith("model-00001") and file.sha256 == sha256(first[file.path]):
            for name, data in second.items():
                (place / name).write_bytes(data)

    monkeypatch.setattr(UploadRepository, "put_file", saves_then)
    upload = finished(api, f"file://{place}")
    assert (upload["state"], upload["error"]["code"]) == ("open", "invalid_input")
    assert "changed while it was imported" in upload["error"]["message"]
    upload = completed(api, upload["id"])
    assert (upload["state"], upload["error"]) == ("complete", None)
    stored = {file["path"]: file["sha256"] for file in upload["files"]}
    assert {name: sha256(data) for name, data in second.items()}.items() <= stored.items()


def test_what_is_to_be_imported_counts(
    api: Api, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = len(CONFIG) + len(FILES["model.safetensors"])
    tenant = f"/v1/tenants/{LOCAL_TENANT}"
    api.client.patch(tenant, json={"max_bytes": size + 10}).raise_for_status()
    read, may_read = FolderSource.read, threading.Event()

    def waiting(self: FolderSource, path: str, file: SourceFile) -> Iterator[bytes]:
        assert may_read.wait(60)
        return read(self, path, file)

    monkeypatch.setattr(FolderSource, "read", waiting)
    (folder / "tuned" / "config.json").write_bytes(b" " * len(CONFIG))
    body = {"kind": "checkpoint", "source": f"file://{folder}/tuned"}
    upload = api.client.post("/v1/uploads", json=body).json()["id"]
    assert api.client.get(tenant).json()["usage"]["bytes"] == size
    for refused in (
        api.client.post("/v1/uploads", json=body),
        api.put(api.open_upload(), "tokenizer.json", bytes(11)),
    ):
        assert (refused.status_code, refused.json()["code"]) == (403, "quota_exceeded")
    may_read.set()
    url = f"/v1/uploads/{upload}"
    wait_until(lambda: api.client.get(url).json()["state"] == "open")
    assert api.client.get(tenant).json()["usage"]["bytes"] == size

    (folder / "tuned" / "config.json").write_bytes(CONFIG + bytes(11))
    refused = api.client.post(f"{url}/complete")
    assert (refused.status_code, refused.json()["code"]) == (403, "quota_exceeded")
    (folder / "tuned" / "config.json").write_bytes(CONFIG)
    assert completed(api, upload)["state"] == "complete"
    assert api.client.get(tenant).json()["usage"]["bytes"] == size


def test_nothing_leads_out_of_the_allowed_folder(
    api: Api, folder: Path, subtests: pytest.Subtests
) -> None:
    secret = folder.parent / "models-private"
    (folder / "way-out").symlink_to(secret)
    (folder / "loop").symlink_to(folder / "loop")
    (folder / "sneaky").mkdir()
    (folder / "sneaky" / "config.json").symlink_to(secret / "config.json")
    (folder / "sneaky" / "model.safetensors").write_bytes(FILES["model.safetensors"])
    codes = {403: "forbidden", 422: "invalid_input"}
    for source, status in (
        (f"file://{secret}", 403),
        (f"file://{folder}/../models-private", 403),
        (f"file://{folder}/way-out", 403),
        (f"file://{folder}/sneaky", 403),
        (f"file://{folder}/loop", 403),
        (f"file://{folder}/%2e%2e/models-private", 404),
        ("file:///", 403),
        ("file:///etc", 403),
        ("file:///proc/self", 403),
        ("file://localhost/etc", 422),
        (f"FILE://{folder}", 422),
        (str(folder), 422),
        ("s3://models/tuned", 403),
        ("hf://org/name", 403),
        ("http://127.0.0.1/", 422),
        (f"file://{folder}/absent", 404),
        (f"file://{folder}/a\0b", 403),
        ("", 422),
    ):
        with subtests.test(source=source):
            body = {"kind": "checkpoint", "source": source}
            answer = api.client.post("/v1/uploads", json=body)
            assert answer.status_code == status, answer.text
            # Outside, an answer does not tell what exists.
            if "absent" not in source and "%2e" not in source:
                assert answer.json()["code"] == codes[status]
    both = {"kind": "checkpoint", "source": f"file://{folder}/tuned", "files": [
        {"path": "config.json", "size": 1, "sha256": "0" * 64}]}  # fmt: skip
    assert api.client.post("/v1/uploads", json=both).status_code == 422
    assert api.client.get("/v1/uploads").json()["data"] == []


def test_a_link_that_is_placed_after_the_check_is_not_followed(folder: Path) -> None:
    settings = Settings(import_sources=[f"file://{folder}"])
    source = open_source(f"file://{folder}/tuned", settings)
    files = source_files(source, UploadKind.CHECKPOINT)
    (folder / "tuned" / "config.json").unlink()
    (folder / "tuned" / "config.json").symlink_to(folder.parent / "models-private/config.json")
    with pytest.raises(Forbidden):
        list(source.read("config.json", files["config.json"]))
    (folder / "tuned" / "config.json").unlink()
    os.mkfifo(folder / "tuned" / "config.json")
    with pytest.raises(InvalidInput, match="regular"):
        list(source.read("config.json", files["config.json"]))


def test_imports_are_off_by_default(folder: Path) -> None:
    with pytest.raises(Forbidden, match="DELTADOCK_IMPORT_SOURCES"):
        open_source(f"file://{folder}", Settings(import_sources=[]))


def test_s3_prefixes_are_imported(
    s3_settings: dict[str, str], tmp_path: Path, subtests: pytest.Subtests
) -> None:
    fields = s3_settings | {"home": str(tmp_path), "s3_bucket": "own"}
    fields["import_sources"] = ["s3://deltadock/models", "s3://own"]  # type: ignore[assignment]
    settings = Settings.model_validate(fields)
    client = make_blob_store(settings).client  # type: ignore[attr-defined]
    for name, data in FILES.items():
        for prefix in ("models/tuned", "models/tuned-2", "models-private"):
            client.put_object(Bucket="deltadock", Key=f"{prefix}/{name}", Body=data)
    client.put_object(Bucket="deltadock", Key="models/text.txt", Body=TEXT)
    for uri in ("s3://deltadock/models/tuned", "s3://deltadock/models/tuned/"):
        source = open_source(uri, settings)
        files = source_files(source, UploadKind.CHECKPOINT)
        assert {name: file.size for name, file in files.items()} == {
            name: len(FILES[name]) for name in ("config.json", "model.safetensors")
        }
        assert b"".join(source.read("config.json", files["config.json"])) == CONFIG
        assert source_files(source, UploadKind.CHECKPOINT) == files
    text = open_source("s3://deltadock/models/text.txt", settings)
    before = source_files(text, UploadKind.CALIBRATION)
    assert b"".join(text.read("text.txt", before["text.txt"])) == TEXT
    client.put_object(Bucket="deltadock", Key="models/text.txt", Body=TEXT[::-1])
    assert source_files(text, UploadKind.CALIBRATION) != before
    with pytest.raises(NotFound):
        list(text.read("text.txt", before["text.txt"]))
    refusals: list[tuple[str, type[DeltadockError]]] = [
        ("s3://deltadock/models-private", Forbidden),
        ("s3://deltadock", Forbidden),
        ("s3://own/blobs", Forbidden),  # of every tenant
        ("s3://deltadock/models/absent", NotFound),
    ]
    for uri, error in refusals:
        with subtests.test(uri=uri), pytest.raises(error):
            open_source(uri, settings).list()
    client.close()


def hub(requests: list[str]) -> Starlette:
    """The part of the Hugging Face Hub's protocol that a model's files are read by.

    It serves files at a commit only: a branch may move while they are read.
    """
    commit = "a" * 40

    def is_absent(request: Request) -> bool:
        return request.path_params["name"] != "tuned"

    def moved(request: Request) -> bool:
        return request.path_params["revision"] != commit

    def entry(name: str) -> dict[str, Any]:
        size = len(FILES[name])
        return {"type": "file", "path": name, "size": size, "oid": sha256(FILES[name])}

    async def info(request: Request) -> Response:
        requests.append(request.url.path)
        if is_absent(request):
            return JSONResponse({"error": "x"}, 404, {"X-Error-Code": "RepoNotFound"})
        return JSONResponse({"id": "org/tuned", "sha": commit, "siblings": []})

    async def tree(request: Request) -> Response:
        if is_absent(request) or moved(request):
            return JSONResponse({"error": "x"}, 404, {"X-Error-Code": "RepoNotFound"})
        return JSONResponse([entry(name) for name in FILES])

    async def paths(request: Request) -> Response:
        form = await request.form() if "form" in request.headers["content-type"] else None
        wanted = form.getlist("paths") if form else (await request.json())["paths"]
        return JSONResponse([entry(name) for name in wanted if name in FILES])

    async def resolve(request: Request) -> Response:
        if moved(request):
            return JSONResponse({"error": "x"}, 404, {"X-Error-Code": "RevisionNotFound"})
        data = FILES[request.path_params["file"]]
        span = re.fullmatch(r"bytes=(\d+)-(\d+)", request.headers.get("range", ""))
        part = data[int(span[1]) : int(span[2]) + 1] if span else data
        headers = {"ETag": f'"{sha256(data)}"', "X-Repo-Commit": commit}
        return Response(part, 206 if span else 200, headers)

    repository = "/api/models/org/{name}"
    return Starlette(
        routes=[
            Route(repository, info),
            Route(f"{repository}/revision/{{revision}}", info),
            Route(f"{repository}/tree/{{revision}}", tree),
            Route(f"{repository}/paths-info/{{revision}}", paths, methods=["POST"]),
            Route("/org/{name}/resolve/{revision}/{file}", resolve),
        ]
    )


class TestHub:
    """The hub's client library reads its address when it is imported: other processes would."""

    @pytest.fixture
    def settings_fields(self) -> dict[str, Any]:
        return {"import_sources": ["hf://org"]}

    @pytest.fixture
    def point_to(self, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
        from huggingface_hub import constants, hf_api, hf_file_system

        def point_to(url: str) -> None:
            monkeypatch.setattr(constants, "ENDPOINT", url)
            monkeypatch.setattr(
                constants,
                "HUGGINGFACE_CO_URL_TEMPLATE",
                url + "/{repo_id}/resolve/{revision}/{filename}",
            )
            for module in (hf_api, hf_file_system):
                monkeypatch.setattr(module.constants, "ENDPOINT", url)

        return point_to

    @pytest.fixture
    def requests(self, point_to: Callable[[str], None]) -> Iterator[list[str]]:
        requests: list[str] = []
        with serving(hub(requests)) as url:
            point_to(url)
            yield requests

    def test_a_repository_is_imported(self, api: Api, requests: list[str]) -> None:
        upload = finished(api, "hf://org/tuned@v1")
        assert (upload["state"], upload["error"]) == ("complete", None)
        assert upload["checkpoint"] == api.upload("checkpoint", FILES)["checkpoint"]
        assert requests[0].endswith("/v1")
        assert not any(path.endswith("/main") for path in requests)

    def test_what_cannot_be_imported_is_said(
        self, api: Api, requests: list[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def create(source: str) -> tuple[int, str]:
            body = {"kind": "checkpoint", "source": source}
            answer = api.client.post("/v1/uploads", json=body).json()
            return answer["status"], answer["detail"]

        assert create("hf://org/absent")[0] == 404
        assert create("hf://org")[0] == 422
        assert create("hf://organisation/tuned")[0] == 403
        from huggingface_hub import constants

        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
        status, detail = create("hf://org/tuned")
        assert (status, "does not reach" in detail) == (503, True)
