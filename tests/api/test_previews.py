"""Predicted artifact sizes."""

from typing import Any

import pytest

from tests.api.support import CONFIG, Api, weights

LAYER = {"model.layers.0.mlp.up_proj.weight": (64, 32)}


def request_body(api: Api, **more: Any) -> dict[str, Any]:
    """A valid preview request on the base `tiny`."""
    api.base(data=weights(0, rows=16, **LAYER))
    checkpoint = api.checkpoint(weights(1, rows=16, **LAYER))
    return {"base": "tiny", "checkpoint": checkpoint, "method": "adamix", **more}


def test_a_preview_returns_sizes_and_stores_nothing(api: Api) -> None:
    body = request_body(api, bits=2.0)
    blobs = api.blobs()
    answer = api.client.post("/v1/previews", json=body)
    assert answer.status_code == 200
    size = answer.json()
    assert (size["method"], size["bits"]) == ("adamix", 2.0)
    assert size["parameters"] == 16 * 8 + 8 + 64 * 32
    assert size["checkpoint_bytes"] == 2 * size["parameters"]
    assert size["artifact_bytes"] == sum(part["bytes"] for part in size["parts"])
    assert size["ratio"] == size["checkpoint_bytes"] / size["artifact_bytes"]
    kinds = {part["kind"]: part for part in size["parts"]}
    assert kinds.keys() == {"linear layers", "embeddings", "other tensors", "manifest"}
    assert kinds["linear layers"]["weights"] == 64 * 32
    assert kinds["other tensors"]["bytes"] == 8 * 4
    assert api.client.get("/v1/deltas").json()["data"] == []
    assert api.blobs() == blobs


def test_unchanged_tensors_take_no_bytes(api: Api) -> None:
    body = request_body(api, bits=1.0)
    files = {
        "config.json": CONFIG,
        "model.safetensors": weights(0, rows=16, **LAYER),
        "generation_config.json": b"{}",
    }
    same = api.upload("checkpoint", files)["checkpoint"]["digest"]
    size = api.client.post("/v1/previews", json=body | {"checkpoint": same}).json()
    assert [part["kind"] for part in size["parts"]] == ["manifest"]


def test_a_fine_tune_that_equals_its_base_is_rejected(api: Api) -> None:
    body = request_body(api, bits=1.0)
    base = api.client.get("/v1/bases/tiny").json()["checkpoint"]["digest"]
    answer = api.client.post("/v1/previews", json=body | {"checkpoint": base})
    assert (answer.status_code, answer.json()["code"]) == (409, "unchanged_checkpoint")


def test_a_family_that_cannot_be_run_is_refused_where_the_method_runs_it(api: Api) -> None:
    config = {"config.json": b'{"model_type": "made_up"}'}
    base, tuned = (
        api.upload("checkpoint", config | {"model.safetensors": weights(seed)})["checkpoint"]
        for seed in (0, 1)
    )
    api.client.post("/v1/bases", json={"name": "unknown", "checkpoint": base["digest"]})
    body = {"base": "unknown", "checkpoint": tuned["digest"]}
    for route, more in (("/v1/previews", {}), ("/v1/deltas", {"name": "a/b"})):
        answer = api.client.post(route, json=body | more)
        assert (answer.status_code, answer.json()["code"]) == (409, "unsupported_model"), route
        assert "'made_up' cannot be calibrated yet" in answer.json()["detail"]
        assert api.client.post(route, json=body | more | {"method": "exact"}).is_success


def test_a_size_becomes_a_budget(api: Api) -> None:
    body = request_body(api)
    size = api.client.post("/v1/previews", json=body | {"target_bytes": 4_500}).json()
    assert size["artifact_bytes"] <= 4_500
    assert 0 < size["bits"] <= 8


@pytest.mark.parametrize(
    ("change", "status", "code"),
    [
        ({"max_kl": 0.01}, 409, "invalid_goal"),
        ({"ratio": 500.0}, 409, "invalid_goal"),
        ({"bits": 1.0, "ratio": 2.0}, 422, "invalid_goal"),
        ({"bits": 99.0}, 422, "bits_out_of_range"),
        ({"method": "zip"}, 422, "unknown_method"),
        ({"base": "other"}, 404, "not_found"),
        ({"checkpoint": "0" * 64}, 404, "not_found"),
        ({"seed": 1}, 422, "invalid_input"),
    ],
)
def test_invalid_preview_requests_are_rejected(
    api: Api, change: dict[str, Any], status: int, code: str
) -> None:
    answer = api.client.post("/v1/previews", json=request_body(api) | change)
    assert (answer.status_code, answer.json()["code"]) == (status, code)


def test_another_architecture_is_rejected(api: Api) -> None:
    body = request_body(api) | {"checkpoint": api.checkpoint(weights(1, rows=9))}
    answer = api.client.post("/v1/previews", json=body)
    assert (answer.status_code, answer.json()["code"]) == (409, "architecture_mismatch")
