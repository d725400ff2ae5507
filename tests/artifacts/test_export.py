"""From a delta back to a checkpoint that any engine loads."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, Qwen2Config, Qwen2ForCausalLM

from deltadock.artifacts.encodings import (
    Encoded,
    encode_exact,
    encode_svd,
    quantize_rows_midrise,
)
from deltadock.artifacts.export import merge
from deltadock.artifacts.folder import scan_folder
from deltadock.artifacts.reader import Artifact
from deltadock.artifacts.writer import write_artifact
from deltadock.errors import BaseMismatch, Conflict, InvalidArtifact, InvalidCheckpoint
from tests.artifacts.make_golden import MANIFEST
from tests.artifacts.samples import sparse_rows, svd_matrix

QUERY = "model.layers.0.self_attn.q_proj.weight"
BIAS = "model.layers.0.self_attn.q_proj.bias"
EMBEDDING = "model.embed_tokens.weight"


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random Qwen2 in bfloat16."""
    folder = tmp_path_factory.mktemp("export") / "base"
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=96,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
    )
    Qwen2ForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    return folder


def changes() -> dict[str, Encoded]:
    """A tensor of every kind."""
    bias = np.arange(32, dtype=np.uint16) + 0x3F80
    return {
        QUERY: encode_svd(svd_matrix(8, 32, 32, seed=1), "BF16", {}),
        "model.layers.1.mlp.down_proj.weight": encode_svd(svd_matrix(5, 32, 48), "BF16", {}),
        EMBEDDING: quantize_rows_midrise(sparse_rows(96, 32, seed=2, scale=0.01), 4, "BF16"),
        BIAS: encode_exact(bias, "BF16", (32,)),
    }


Write = Callable[..., Path]


@pytest.fixture
def write(base: Path, tmp_path: Path) -> Write:
    """Writes a delta of `base`; keyword arguments go into the manifest."""

    def write(tensors: dict[str, Encoded] | None = None, **manifest: Any) -> Path:
        path = tmp_path / "tuned.delta"
        known = {"base_digest": scan_folder(base).weights_digest, "files": {}}
        write_artifact(
            path, changes() if tensors is None else tensors, {**MANIFEST, **known, **manifest}
        )
        return path

    return write


def expected(base: Path, delta: Path) -> dict[str, Tensor]:
    """Base plus delta, rounded once to bfloat16."""
    tensors = load_file(base / "model.safetensors")
    with Artifact(delta) as artifact:
        for name, record in artifact.records.items():
            if record["kind"] == "exact":
                raw = torch.from_numpy(artifact.exact(name).copy())
                tensors[name] = raw.view(torch.bfloat16)
            else:
                total = tensors[name].float().numpy() + artifact.dense(name)
                tensors[name] = torch.from_numpy(total).to(torch.bfloat16)
    return tensors


def assert_equal(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype, name
        assert torch.equal(ours[name], tensor), name


def test_the_merged_folder_holds_base_plus_delta(base: Path, write: Write, tmp_path: Path) -> None:
    delta, out = write(), tmp_path / "out"
    merge(base, delta, out)
    assert_equal(load_file(out / "model.safetensors"), expected(base, delta))
    assert not torch.equal(
        load_file(out / "model.safetensors")[QUERY], load_file(base / "model.safetensors")[QUERY]
    )


@pytest.mark.parametrize("shard_bytes", [5 * 2**30, 20_000, 1])
def test_transformers_loads_it(base: Path, write: Write, tmp_path: Path, shard_bytes: int) -> None:
    delta, out = write(), tmp_path / "out"
    merge(base, delta, out, shard_bytes=shard_bytes)
    model, info = AutoModelForCausalLM.from_pretrained(out, dtype="auto", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    state = model.state_dict()
    assert torch.equal(state.pop("lm_head.weight"), state[EMBEDDING])
    assert_equal(state, expected(base, delta))
    assert scan_folder(out).config == scan_folder(base).config


def test_shards_are_no_larger_than_asked(base: Path, write: Write, tmp_path: Path) -> None:
    out = tmp_path / "out"
    merge(base, write(), out, shard_bytes=20_000)
    shards = sorted(out.glob("*.safetensors"))
    assert [shard.name for shard in shards] == [
        f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        for number in range(1, len(shards) + 1)
    ]
    assert len(shards) > 1
    for shard in shards:
        assert sum(tensor.nbytes for tensor in load_file(shard).values()) <= 20_000
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert index["weight_map"] == {
        name: shard.name for shard in shards for name in load_file(shard)
    }


def test_a_sharded_base_is_merged_the_same(base: Path, write: Write, tmp_path: Path) -> None:
    sharded, delta = tmp_path / "sharded", write()
    merge(base, write({}), sharded, shard_bytes=20_000)
    delta = write()
    merge(sharded, delta, tmp_path / "out")
    assert_equal(load_file(tmp_path / "out" / "model.safetensors"), expected(base, delta))
    assert not (tmp_path / "out" / "model.safetensors.index.json").exists()


def test_files_are_the_finetunes(base: Path, write: Write, tmp_path: Path) -> None:
    text = "{{ messages }}\r\nü\n"
    config = (base / "config.json").read_text().replace('"use_cache": true', '"use_cache": false')
    files = {"chat_template.jinja": text, "config.json": config, "generation_config.json": None}
    out = tmp_path / "out"
    merge(base, write(files=files), out)
    assert (out / "chat_template.jinja").read_bytes() == text.encode()
    assert json.loads((out / "config.json").read_text())["use_cache"] is False
    assert sorted(path.name for path in out.iterdir()) == [
        "chat_template.jinja",
        "config.json",
        "model.safetensors",
    ]


def test_a_delta_of_nothing_is_the_base(base: Path, write: Write, tmp_path: Path) -> None:
    merge(base, write({}), tmp_path / "out")
    assert scan_folder(tmp_path / "out").weights_digest == scan_folder(base).weights_digest


def test_the_folder_is_as_readable_as_any_other(base: Path, write: Write, tmp_path: Path) -> None:
    out = tmp_path / "out"
    merge(base, write(), out)
    (tmp_path / "plain").mkdir()
    (tmp_path / "plain" / "file").touch()
    assert out.stat().st_mode == (tmp_path / "plain").stat().st_mode
    modes = {path.stat().st_mode for path in out.iterdir()}
    assert modes == {(tmp_path / "plain" / "file").stat().st_mode}


def test_an_empty_folder_is_filled(
    base: Path, write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    merge(base, write(), out)
    assert (out / "model.safetensors").is_file()
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    merge(base, tmp_path / "tuned.delta", Path())
    assert (here / "model.safetensors").is_file()


def test_parents_are_made(base: Path, write: Write, tmp_path: Path) -> None:
    merge(base, write(), tmp_path / "new" / "out")
    assert (tmp_path / "new" / "out" / "config.json").is_file()


def test_what_is_there_stays(base: Path, write: Write, tmp_path: Path) -> None:
    delta, folder, file = write(), tmp_path / "folder", tmp_path / "file"
    folder.mkdir()
    (folder / "precious.txt").touch()
    file.touch()
    for out in (folder, file):
        with pytest.raises(Conflict):
            merge(base, delta, out)
    assert sorted(path.name for path in tmp_path.rglob("*")) == [
        "file",
        "folder",
        "precious.txt",
        "tuned.delta",
    ]


def test_another_base_is_rejected(base: Path, write: Write, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(base, other)
    tensors = load_file(other / "model.safetensors")
    tensors[BIAS][0] += 1
    save_file(tensors, other / "model.safetensors")
    delta = write()
    with pytest.raises(BaseMismatch, match=scan_folder(base).weights_digest):
        merge(other, delta, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other", "tuned.delta"]


def test_a_failure_leaves_nothing(base: Path, write: Write, tmp_path: Path) -> None:
    out = tmp_path / "out"
    square = encode_svd(svd_matrix(3, 33, 32), "BF16", {})
    short = encode_exact(np.zeros(31, np.uint16), "BF16", (31,))
    for tensors, message in (
        ({QUERY: square}, r"\[33, 32\]"),
        ({BIAS: short}, r"\[31\]"),
        ({"model.ghost": short}, "'model.ghost', which the base lacks"),
    ):
        with pytest.raises(InvalidArtifact, match=message):
            merge(base, write(tensors), out)
        assert [path.name for path in tmp_path.iterdir()] == ["tuned.delta"]


def test_a_damaged_delta_is_rejected(base: Path, write: Write, tmp_path: Path) -> None:
    delta = write()
    content = bytearray(delta.read_bytes())
    content[-1] ^= 1
    delta.write_bytes(content)
    with pytest.raises(InvalidArtifact, match="damaged"):
        merge(base, delta, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["tuned.delta"]


def test_a_base_that_is_none_is_rejected(write: Write, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(InvalidCheckpoint):
        merge(tmp_path / "empty", write(), tmp_path / "out")
    assert not (tmp_path / "out").exists()
