"""PEFT adapters are uploaded as checkpoints and imported by the method `lora` only."""

import json
import math
from typing import Any

import numpy as np
from safetensors.numpy import save

from deltadock.storage.repositories import CheckpointRepository
from deltadock.storage.tenancy import LOCAL_TENANT
from tests.api.support import CONFIG, Api, weights

ADAPTER = json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 4}).encode()


def adapter_files() -> dict[str, bytes]:
    factor = {"base_model.model.model.embed_tokens.lora_embedding_A": np.ones((2, 8), np.float32)}
    return {"adapter_config.json": ADAPTER, "adapter_model.safetensors": save(factor)}


def upload_adapter(api: Api) -> dict[str, Any]:
    checkpoint: dict[str, Any] = api.upload("checkpoint", adapter_files())["checkpoint"]
    return checkpoint


def test_an_uploaded_adapter_is_a_checkpoint_with_its_own_model_type(api: Api) -> None:
    checkpoint = upload_adapter(api)
    assert checkpoint["model_type"] == "peft-adapter"
    assert upload_adapter(api) == checkpoint


def test_a_checkpoint_says_whether_it_has_a_chat_template(api: Api) -> None:
    """One that inherits its base's tokenizer takes its template, which is not known here."""
    model = {"config.json": CONFIG, "model.safetensors": weights()}
    configured = {"tokenizer_config.json": b'{"chat_template": "{{ messages }}"}'}
    uploads: list[tuple[dict[str, bytes], bool | None]] = [
        (model, None),
        (model | {"tokenizer.json": b"{}"}, False),
        (model | configured, True),
        (model | {"chat_template.jinja": b"{{ messages }}"}, True),
        (adapter_files(), None),
        (adapter_files() | configured, True),
    ]
    expected = {api.upload("checkpoint", files)["checkpoint"]["digest"]: has_one
                for files, has_one in uploads}  # fmt: skip
    with api.resources.database.read_scope() as session:
        found = CheckpointRepository(session, LOCAL_TENANT).chat_templates(expected)
    assert found == expected


def test_an_adapter_cannot_be_a_base(api: Api) -> None:
    body = {"name": "tiny", "checkpoint": upload_adapter(api)["digest"]}
    answer = api.client.post("/v1/bases", json=body)
    assert answer.status_code == 409
    assert "not a whole model" in answer.json()["detail"]


def test_lora_imports_adapters_only_and_other_methods_reject_them(api: Api) -> None:
    whole = api.delta_body(method="lora", bits=None, calibration=None)
    answer = api.client.post("/v1/deltas", json=whole)
    assert answer.status_code == 409
    assert "not a PEFT adapter" in answer.json()["detail"]
    assert "'optimix'" in answer.json()["detail"]

    adapter = whole | {"checkpoint": upload_adapter(api)["digest"]}
    answer = api.client.post("/v1/deltas", json=adapter | {"method": "adamix", "bits": 1.0})
    assert answer.status_code == 409
    assert "leave the method (`--method`) out, or give 'lora'" in answer.json()["detail"]

    del adapter["method"]
    answer = api.client.post("/v1/deltas", json=adapter)
    assert answer.status_code == 202, answer.text
    assert answer.json()["delta"]["method"] == "lora"
    answer = api.client.post("/v1/deltas", json=adapter | {"method": "lora"})
    assert answer.status_code == 200, "the same request"


def test_an_adapter_that_cannot_be_imported_is_refused_at_creation(api: Api) -> None:
    body = api.delta_body(bits=None, calibration=None)
    del body["method"]
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "use_dora": True}
    files = adapter_files() | {"adapter_config.json": json.dumps(config).encode()}
    body["checkpoint"] = api.upload("checkpoint", files)["checkpoint"]["digest"]
    answer = api.client.post("/v1/deltas", json=body)
    assert (answer.status_code, answer.json()["code"]) == (409, "invalid_adapter")
    assert "use_dora" in answer.json()["detail"]
    preview = {name: body[name] for name in ("base", "checkpoint")}
    answer = api.client.post("/v1/previews", json=preview)
    assert (answer.status_code, answer.json()["code"]) == (409, "invalid_adapter")


def test_an_adapters_preview_counts_its_tensors_and_the_bases_weights(api: Api) -> None:
    base = api.base()
    body = {"base": "tiny", "checkpoint": upload_adapter(api)["digest"]}
    size = api.client.post("/v1/previews", json=body).json()
    manifest = json.loads(api.resources.blobs.read(base, 1 << 20))
    assert (size["method"], size["bits"]) == ("lora", None)
    assert size["parameters"] == sum(math.prod(tensor["shape"]) for tensor in manifest["tensors"])
    assert sum(part["bytes"] for part in size["parts"] if part["kind"] != "manifest") == 2 * 8 * 4


def test_an_adapter_config_that_is_not_an_object_is_rejected(api: Api) -> None:
    upload = api.open_upload()
    api.put(upload, "adapter_config.json", b"[1]")
    api.put(upload, "adapter_model.safetensors", save({"a": np.ones(1)}))
    answer = api.client.post(f"/v1/uploads/{upload}/complete")
    assert answer.status_code == 409
    assert "adapter_config.json is not a JSON object" in answer.json()["detail"]


def test_an_adapter_folder_may_contain_the_bases_config(api: Api) -> None:
    factor = {"base_model.model.model.embed_tokens.lora_embedding_A": np.ones((2, 8), np.float32)}
    files = {
        "adapter_config.json": ADAPTER,
        "adapter_model.safetensors": save(factor),
        "config.json": b'{"model_type": "qwen2"}',
        "checkpoint-2/adapter_model.safetensors": save(factor),
    }
    done = api.upload("checkpoint", files)
    assert done["checkpoint"]["digest"] == upload_adapter(api)["digest"]
    assert done["ignored"] == ["checkpoint-2/adapter_model.safetensors", "config.json"]
