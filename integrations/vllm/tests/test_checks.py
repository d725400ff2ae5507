"""What the plug-in decides without an engine: versions, files, and deltas that it refuses."""

import asyncio
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from deltadock_vllm import check_version
from deltadock_vllm.checks import EngineFiles, base_manifest, check_servable
from deltadock_vllm.fetching import fetch, fetch_registered
from deltadock_vllm.many import hooks
from deltadock_vllm.many.names import DeltaNames, Found
from vllm import SamplingParams
from vllm.exceptions import VLLMValidationError
from vllm.lora.request import LoRARequest

from deltadock.artifacts.encodings import Encoded, encode_alias, encode_exact, encode_new_rows
from deltadock.artifacts.reader import Artifact
from deltadock.artifacts.writer import write_artifact
from deltadock.client.cache import cached_path
from deltadock.errors import DeltadockError, InvalidInput, NotFound, UnsupportedModel
from integrations.vllm.tests.conftest import Registry
from integrations.vllm.tests.engine import BASE, write_quantized

NORM, EMBEDDING, HEAD = "model.norm.weight", "model.embed_tokens.weight", "lm_head.weight"
TOKENS, WIDTH = 1536, 256


def exact(rows: int, *columns: int) -> Encoded:
    shape = (rows, *columns)
    return encode_exact(np.ones(shape, np.uint16), "BF16", shape)


def refusal(
    folder: Path,
    tensors: dict[str, Encoded],
    engine: EngineFiles | None = None,
    files: dict[str, str] | None = None,
    base_digest: str | None = None,
) -> str | None:
    """The code with which a delta of these tensors is refused."""
    manifest = {
        "base_digest": base_digest or base_manifest(BASE).weights_digest,
        "finetuned_digest": "f" * 64,
        "model_type": "qwen2", "method": "adamix", "nominal_bits": 1.0, "settings": {}, "seed": 0,
        "calibration": None, "checkpoint_bytes": 1, "parameters": 1, "version": "0",
        "files": files or {}, "matrices": {},
    }  # fmt: skip
    path = folder / "it.delta"
    write_artifact(path, tensors, manifest)
    with Artifact(path) as artifact:
        try:
            check_servable(artifact, engine or EngineFiles(BASE, BASE, BASE))
        except DeltadockError as error:
            return error.code
    return None


def test_a_version_outside_the_range_is_refused() -> None:
    check_version("0.32.0")
    check_version("0.32.4+cpu")
    for other in ("0.31.9", "0.33.0", "1.32.0"):
        with pytest.raises(RuntimeError, match=r"0\.32"):
            check_version(other)


def test_a_delta_of_other_tensors_or_another_base_is_refused(tmp_path: Path) -> None:
    head = (TOKENS, WIDTH)
    cases: dict[str | None, dict[str, Encoded]] = {
        None: {
            EMBEDDING: exact(*head), HEAD: encode_alias(EMBEDDING, head, "BF16"),
        },
        "invalid_artifact": {"model.layers.9.mlp.up_proj.weight": exact(2, 2)},
        "unsupported_model": {EMBEDDING: exact(*head), HEAD: exact(*head)},
    }  # fmt: skip
    for code, tensors in cases.items():
        assert refusal(tmp_path, tensors) == code
    added = encode_new_rows(None, np.ones((2, WIDTH), np.uint16), TOKENS, "BF16")
    assert refusal(tmp_path, {EMBEDDING: added}) == "unsupported_model"
    assert refusal(tmp_path, {EMBEDDING: exact(TOKENS + 2, WIDTH)}) == "unsupported_model"
    assert refusal(tmp_path, {NORM: exact(WIDTH)}, base_digest="b" * 64) == "base_mismatch"


def test_files_that_the_engine_was_not_started_with_are_refused(tmp_path: Path) -> None:
    tensors = {NORM: exact(WIDTH)}
    own = {"chat_template.jinja": "{{ messages }}"}
    assert refusal(tmp_path, tensors, None, own) == "unsupported_model"
    tokenizer = tmp_path / "tokenizer"
    shutil.copytree(BASE, tokenizer, ignore=shutil.ignore_patterns("*.safetensors"))
    (tokenizer / "chat_template.jinja").write_text("{{ messages }}")
    started = EngineFiles(BASE, tokenizer, BASE)
    assert refusal(tmp_path, tensors, started, own) is None
    assert refusal(tmp_path, tensors, started, {}) == "unsupported_model"
    generation = {"generation_config.json": '{"eos_token_id": 7}'}
    for folder, code in ((BASE, "unsupported_model"), (None, None)):
        started = EngineFiles(BASE, BASE, folder)
        assert refusal(tmp_path, tensors, started, generation) == code


def test_a_chat_template_of_its_own_is_found_where_requests_are_rendered_with_it(
    tmp_path: Path,
) -> None:
    tensors, started = {NORM: exact(WIDTH)}, EngineFiles(BASE, BASE, BASE)
    config = json.loads((BASE / "tokenizer_config.json").read_text())
    in_config = json.dumps(config | {"chat_template": "{{ messages }}"})
    for files in ({"chat_template.jinja": "{{ messages }}"}, {"tokenizer_config.json": in_config}):
        assert refusal(tmp_path, tensors, started, files) == "unsupported_model"
        with Artifact(tmp_path / "it.delta") as artifact:
            assert check_servable(artifact, started, own_template=True) == "{{ messages }}"
    other = json.dumps(config | {"chat_template": "{{ messages }}", "padding_side": "odd"})
    for files in ({"tokenizer_config.json": other}, {"tokenizer_config.json": "["}):
        refusal(tmp_path, tensors, started, files)
        with Artifact(tmp_path / "it.delta") as artifact, pytest.raises(DeltadockError):
            check_servable(artifact, started, own_template=True)


def test_a_base_that_is_stored_quantized_is_refused(tmp_path: Path) -> None:
    folder = write_quantized(tmp_path / "quantized")
    started = EngineFiles(folder, folder, folder)
    assert refusal(tmp_path, {NORM: exact(WIDTH)}, started) == "unsupported_model"
    full = started._replace(base=BASE)
    assert refusal(tmp_path, {NORM: exact(WIDTH)}, full) is None


def test_a_config_of_its_own_is_refused(tmp_path: Path) -> None:
    config = json.loads((BASE / "config.json").read_text())
    tensors, started = {NORM: exact(WIDTH)}, EngineFiles(BASE, BASE, BASE)
    cases = {
        json.dumps(config | {"use_cache": False}): None,
        json.dumps(config | {"rms_norm_eps": 0.5}): "unsupported_model",
        json.dumps(config | {"hidden_act": "gelu"}): "architecture_mismatch",
        "[": "invalid_artifact",
    }
    for text, code in cases.items():
        assert refusal(tmp_path, tensors, started, {"config.json": text}) == code


def test_names_digests_and_files_are_fetched_and_verified(
    registry: Registry, deltas: dict[str, Path]
) -> None:
    file = fetch(str(deltas["adamix"]))
    named = fetch("maths/skills")
    assert named.digest == file.digest
    assert named.path == cached_path(file.digest)
    named.path.write_bytes(b"something else")
    assert fetch_registered(file.digest).path.read_bytes() == deltas["adamix"].read_bytes()
    assert fetch("maths/skills:2").digest == fetch(str(deltas["bitdelta"])).digest
    for unknown in ("maths/none", "0" * 64, "/nowhere/it.delta"):
        with pytest.raises(NotFound):
            fetch(unknown)
    with pytest.raises(InvalidInput):
        fetch_registered(str(deltas["adamix"]))


def test_a_rendered_request_is_not_refused_when_its_delta_was_evicted_meanwhile(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A delta with a template of its own, between the check of its name and the engine's queue."""

    class Engine:
        vllm_config = SimpleNamespace(lora_config=SimpleNamespace(max_cpu_loras=1))

        async def collective_rpc(self, _method: str, args: tuple[int, str]) -> list[dict[str, str]]:
            return [{"state": "ready"}]

        async def add_request(
            self, prompt: str, params: object, lora_request: LoRARequest | None = None
        ) -> str:
            return "queued"

    def refuse(_names: DeltaNames, _path: str) -> None:
        raise UnsupportedModel("It has a chat template of its own.")

    monkeypatch.setattr(DeltaNames, "check_path", refuse)
    monkeypatch.setattr(
        DeltaNames,
        "resolve",
        lambda _, name: Found(LoRARequest(name, ord(name), f"/{name}.delta"), None),
    )
    engine = Engine()
    add = hooks._adding_async(Engine.add_request)

    async def serve() -> None:
        names = hooks._names(engine, engine.vllm_config)
        rendered, _ = await names.find("a", hooks._loader(engine))
        await names.find("b", hooks._loader(engine))  # evicts a
        assert await add(engine, "prompt", SamplingParams(), lora_request=rendered) == "queued"
        with pytest.raises(VLLMValidationError, match="template of its own"):
            await add(
                engine, "prompt", SamplingParams(), lora_request=LoRARequest("c", 9, "/c.delta")
            )

    asyncio.run(serve())
