"""Invalid input is rejected with a stable code and leaves nothing behind."""

import hashlib
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from safetensors.torch import load_file, save_file

from deltadock.client.blocking import Client
from deltadock.errors import ArchitectureMismatch, DeltadockError

from .conftest import SAMPLES, Stored

WEIGHTS = (SAMPLES / "finetuned" / "model.safetensors").read_bytes()


@pytest.fixture
def put(http: httpx.Client) -> Callable[..., httpx.Response]:
    """Puts one file into a new upload."""

    def put(path: str, body: bytes, **headers: str) -> httpx.Response:
        upload = http.post("/v1/uploads", json={"kind": "checkpoint"}).json()["id"]
        answer = http.put(f"/v1/uploads/{upload}/files/{path}", content=body, headers=headers)
        if not answer.is_success:
            assert http.get(f"/v1/uploads/{upload}").json()["files"] == []
        return answer

    return put


def invalid_header() -> bytes:
    header = b'{"w":{"dtype":"F32","shape":[4],"data_offsets":[0,999]}}'
    return len(header).to_bytes(8, "little") + header + bytes(16)


@pytest.mark.parametrize(
    ("path", "body", "code"),
    [
        ("pytorch_model.bin", pickle.dumps({"weight": [1.0]}), "unsafe_file"),
        ("model.safetensors", pickle.dumps({"weight": [1.0]}), "malformed_safetensors"),
        ("model.safetensors", WEIGHTS[:-1000], "malformed_safetensors"),
        ("model.safetensors", invalid_header(), "malformed_safetensors"),
        ("%2e%2e/config.json", b"{}", "unsafe_file"),
    ],
    ids=["pickle", "renamed-pickle", "truncated", "lying", "escaping"],
)
def test_hostile_files_are_rejected(
    put: Callable[..., httpx.Response], path: str, body: bytes, code: str
) -> None:
    answer = put(path, body)
    assert answer.status_code == 422
    assert answer.json()["code"] == code
    assert answer.headers["content-type"] == "application/problem+json"


def test_a_wrong_hash_is_rejected(put: Callable[..., httpx.Response]) -> None:
    wrong = hashlib.sha256(b"other bytes").hexdigest()
    answer = put("model.safetensors", WEIGHTS, **{"X-Content-SHA256": wrong})
    assert (answer.status_code, answer.json()["code"]) == (422, "hash_mismatch")


@pytest.mark.parametrize(
    ("change", "status", "code"),
    [
        ({"method": "zip"}, 422, "unknown_method"),
        ({"bits": 0.001}, 422, "bits_out_of_range"),
        ({"bits": 17.0}, 422, "bits_out_of_range"),
        ({"base": "nothing"}, 404, "not_found"),
        ({"checkpoint": "0" * 64}, 404, "not_found"),
        ({"ratio": 10.0}, 422, "invalid_goal"),
        ({"calibration": {"sources": []}}, 422, "invalid_input"),
        ({"name": "../etc"}, 422, "invalid_input"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_invalid_delta_requests_are_rejected(
    stored: Stored, http: httpx.Client, change: dict[str, Any], status: int, code: str
) -> None:
    request_body = {
        "name": "maths/other",
        "base": "sample-base",
        "checkpoint": stored.finetuned["digest"],
        "method": "adamix",
        "bits": 1.0,
        "calibration": {"source": "text", "digest": stored.calibration},
    }
    answer = http.post("/v1/deltas", json=request_body | change)
    assert (answer.status_code, answer.json()["code"]) == (status, code)
    names = {delta["name"] for delta in http.get("/v1/deltas").json()["data"]}
    assert "maths/other" not in names


@pytest.mark.parametrize(
    "path", ["/v1/deltas/dlt_x", "/v1/jobs/job_x", "/v1/uploads/upl_x", "/v1/bases/x", "/v1/x"]
)
def test_unknown_ids_are_404(http: httpx.Client, path: str) -> None:
    answer = http.get(path)
    assert (answer.status_code, answer.json()["code"]) == (404, "not_found")


def changed(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> Path:
    """A copy of the sample fine-tune with changed weights."""
    shutil.copytree(SAMPLES / "finetuned", folder)
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_another_architecture_is_rejected_before_a_job_starts(
    stored: Stored, client: Client, tmp_path: Path
) -> None:
    name = "model.layers.0.mlp.up_proj.weight"

    def narrow(weights: dict[str, torch.Tensor]) -> None:
        weights[name] = weights[name][:-8].clone()

    other = client.upload_folder(changed(tmp_path / "narrow", narrow))
    with pytest.raises(ArchitectureMismatch, match=name):
        client.create_delta("maths/narrow", "sample-base", other.digest, method="exact")
    assert stored.delta["id"] in {delta.id for delta in client.deltas()}


def test_non_finite_weights_fail_the_job(stored: Stored, client: Client, tmp_path: Path) -> None:
    def diverge(weights: dict[str, torch.Tensor]) -> None:
        weights["model.norm.weight"][3] = torch.inf

    diverged = client.upload_folder(changed(tmp_path / "diverged", diverge))
    accepted = client.create_delta("maths/diverged", "sample-base", diverged.digest, method="exact")
    job = client.wait(accepted.job.id)
    assert (job.state, job.failure.code) == ("failed", "non_finite_weights")
    delta = accepted.delta.id
    with pytest.raises(DeltadockError) as error:
        client.report(delta)
    assert error.value.code == "not_ready"
    with pytest.raises(DeltadockError) as error:
        client.generate(delta, "x", max_tokens=1)
    assert error.value.code == "not_ready"
    assert stored.delta["state"] == "ready"
