"""Checkpoints: which files they may have, and by what they are known."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st

from deltadock.artifacts.checkpoint import (
    CheckpointManifest,
    FileEntry,
    FileInspector,
    TensorEntry,
    assemble,
    check_path,
    weight_files,
)
from deltadock.artifacts.folder import read_headers, scan_folder
from deltadock.errors import InvalidCheckpoint, MalformedSafetensors, UnsafeFile

CONFIG = {"model_type": "qwen2", "hidden_size": 4}
TENSORS: dict[str, Any] = {
    "model.a": np.arange(6, dtype=np.float32).reshape(2, 3),
    "model.b": np.arange(4, dtype=np.float16),
    "model.c": np.array(3, np.int64),
}


def save(folder: Path, *shards: dict[str, Any], config: Any = CONFIG) -> Path:
    """A checkpoint folder with one file a shard."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    for number, shard in enumerate(shards):
        safetensors.numpy.save_file(shard, folder / f"model-{number}.safetensors")
    return folder


@pytest.mark.parametrize(
    "path",
    [
        "config.json",
        "model-00001-of-00002.safetensors",
        "model.safetensors.index.json",
        "tokenizer.model",
        "merges.txt",
        "chat_template.jinja",
        "README.md",
        "additional_chat_templates/tool use.jinja",
        "notes – käse.txt",
        "x" * 196 + ".txt",
    ],
)
def test_paths_of_checkpoints_are_accepted(path: str) -> None:
    assert check_path(path) == path


@pytest.mark.parametrize(
    "path",
    [
        "",
        "..",
        "../config.json",
        "a/../../config.json",
        "a/../config.json",
        "./config.json",
        "a//config.json",
        "a/config.json/",
        "/config.json",
        "//host/config.json",
        "C:\\config.json",
        "a\\config.json",
        ".hidden.json",
        ".git/config.json",
        "a/.b/config.json",
        "a\nb.json",
        "a\0.json",
        "a\x7f.json",
        "a\u202e.json",
        "\ud800.json",
        "x" * 251 + ".json",
        "é" * 126 + ".json",
        "pytorch_model.bin",
        "consolidated.00.pth",
        "optimizer.pt",
        "model.ckpt",
        "data.pkl",
        "modeling_custom.py",
        "tf_model.h5",
        "weights.npz",
    ],
)
def test_unsafe_paths_are_rejected(path: str) -> None:
    with pytest.raises(UnsafeFile):
        check_path(path)


@pytest.mark.parametrize(
    "path", [".", "run.sh", "model.gguf", "safetensors", "a.json.exe", "x.JSON"]
)
def test_files_that_no_checkpoint_needs_are_rejected(path: str) -> None:
    with pytest.raises(InvalidCheckpoint, match="leave it out"):
        check_path(path)


@given(st.text(max_size=30))
def test_what_is_accepted_stays_inside_the_folder(path: str) -> None:
    for name in (path, path + ".json", "a/" + path + ".txt"):
        try:
            check_path(name)
        except InvalidCheckpoint:
            continue
        folder = Path("/checkpoint")
        assert (folder / name).resolve().is_relative_to(folder)
        assert (folder / name).relative_to(folder).as_posix() == name


@given(st.lists(st.binary(max_size=40), max_size=6))
def test_a_file_is_known_by_size_and_hash_in_any_chunking(chunks: list[bytes]) -> None:
    inspector = FileInspector("config.json")
    for chunk in chunks:
        inspector.update(chunk)
    file, tensors = inspector.finish()
    whole = b"".join(chunks)
    assert (file.path, file.size, file.sha256) == (
        "config.json",
        len(whole),
        hashlib.sha256(whole).hexdigest(),
    )
    assert tensors == []


def test_weights_are_looked_into() -> None:
    inspector = FileInspector("model.safetensors")
    inspector.update(safetensors.numpy.save(TENSORS))
    _, tensors = inspector.finish()
    assert {tensor.name: tensor for tensor in tensors} == {
        name: TensorEntry(
            name,
            {"f": f"F{8 * array.itemsize}", "i": "I64"}[array.dtype.kind],
            array.shape,
            "model.safetensors",
            hashlib.sha256(array.tobytes()).hexdigest(),
        )
        for name, array in TENSORS.items()
    }


def test_the_inspector_refuses_paths_and_bytes() -> None:
    with pytest.raises(UnsafeFile):
        FileInspector("pytorch_model.bin")
    inspector = FileInspector("model.safetensors")
    with pytest.raises(MalformedSafetensors):
        inspector.update(b"\x80\x02}q\0." * 4)


def test_a_folder_is_scanned(tmp_path: Path) -> None:
    folder = save(tmp_path / "a", TENSORS)
    (folder / "merges.txt").write_text("a b")
    # What is no part of a checkpoint: documents, other formats, hidden files, folders.
    for name in ("README.md", "training_args.bin", "logo.png", "._model-0.safetensors", ".x.json"):
        (folder / name).write_bytes(b"\0\1")
    (folder / "runs.json").mkdir()
    manifest = scan_folder(folder)
    assert [file.path for file in manifest.files] == [
        "config.json",
        "merges.txt",
        "model-0.safetensors",
    ]
    assert [tensor.name for tensor in manifest.tensors] == sorted(TENSORS)
    assert manifest.config == CONFIG
    assert manifest.total_bytes == sum(
        (folder / file.path).stat().st_size for file in manifest.files
    )


def test_weights_are_known_however_they_are_sharded(tmp_path: Path) -> None:
    one = scan_folder(save(tmp_path / "one", TENSORS))
    names = sorted(TENSORS)
    shards = [{name: TENSORS[name]} for name in reversed(names)]
    many = scan_folder(save(tmp_path / "many", *shards))
    assert one.weights_digest == many.weights_digest
    assert one.digest != many.digest


@pytest.mark.parametrize(
    "change",
    [
        {"model.a": TENSORS["model.a"] + np.float32(1e-6)},
        {"model.a": TENSORS["model.a"].reshape(3, 2)},
        {"model.b": TENSORS["model.b"].view(np.int16)},
        {"model.d": TENSORS["model.c"]},
    ],
)
def test_other_weights_have_another_digest(tmp_path: Path, change: dict[str, Any]) -> None:
    before = scan_folder(save(tmp_path / "before", TENSORS))
    after = scan_folder(save(tmp_path / "after", {**TENSORS, **change}))
    assert before.weights_digest != after.weights_digest


def test_another_config_is_another_checkpoint_of_the_same_weights(tmp_path: Path) -> None:
    one = scan_folder(save(tmp_path / "one", TENSORS))
    two = scan_folder(save(tmp_path / "two", TENSORS, config={**CONFIG, "rope": 1}))
    assert one.weights_digest == two.weights_digest
    assert one.digest != two.digest


def test_digests_do_not_move() -> None:
    """What bases and blobs are called must stay what it is: stored deltas name it."""
    tensors = [
        TensorEntry("b", "F32", (1,), "2.safetensors", "1" * 64),
        TensorEntry("a", "BF16", (2, 3), "1.safetensors", "0" * 64),
    ]
    by_name = tuple(sorted(tensors, key=lambda entry: entry.name))
    manifest = CheckpointManifest((), by_name, {"model_type": "qwen2"})
    leaves = [json.dumps(["a", "BF16", [2, 3], "0" * 64]), json.dumps(["b", "F32", [1], "1" * 64])]
    root = b"".join(hashlib.sha256(leaf.encode()).digest() for leaf in leaves)
    assert manifest.weights_digest == hashlib.sha256(root).hexdigest()
    assert manifest.digest == ("376623cce9ddf84c5359f5c25e0f56756228cc159c2c99b06a255413072d168d")


def test_a_manifest_survives_its_json(tmp_path: Path) -> None:
    manifest = scan_folder(save(tmp_path / "a", TENSORS))
    again = CheckpointManifest.from_json(manifest.to_json())
    assert again == manifest
    assert again.digest == hashlib.sha256(manifest.to_json()).hexdigest() == manifest.digest


ENTRY = TensorEntry("a", "F32", (1,), "model.safetensors", "0" * 64)


@pytest.mark.parametrize(
    ("tensors", "config", "message"),
    [
        ([ENTRY], None, "config.json is missing"),
        ([ENTRY], b"{", "not valid JSON"),
        ([ENTRY], b"\xff\xfe", "not valid JSON"),
        ([ENTRY], b'{"model_type":' + b"[" * 100_000, "not valid JSON"),
        ([ENTRY], b'{"a":' + b"[" * 500 + b"]" * 500 + b"}", "nested more than 128 levels deep"),
        ([ENTRY], b'{"a": {"\\ud800": 1}}', "half a surrogate pair"),
        ([ENTRY], b"[]", "not a JSON object"),
        ([ENTRY], b"{}", "names no model_type"),
        ([ENTRY], b'{"model_type": 7}', "names no model_type"),
        ([], b'{"model_type": "qwen2"}', r"no \.safetensors file"),
        ([ENTRY, ENTRY], b'{"model_type": "qwen2"}', "'a' is in two files"),
    ],
)
def test_incomplete_checkpoints_are_rejected(
    tensors: list[TensorEntry], config: bytes | None, message: str
) -> None:
    with pytest.raises(InvalidCheckpoint, match=message):
        assemble([FileEntry(ENTRY.file, 0, "0" * 64)], tensors, config)


def test_folders_without_safetensors_are_rejected(tmp_path: Path) -> None:
    folder = save(tmp_path / "a")
    with pytest.raises(InvalidCheckpoint, match=r"no \.safetensors file"):
        scan_folder(folder)
    (folder / "consolidated.00.pth").write_bytes(b"\x80\x02.")
    with pytest.raises(UnsafeFile, match="pickle"):
        scan_folder(folder)
    with pytest.raises(InvalidCheckpoint, match="is not a folder"):
        scan_folder(tmp_path / "nowhere")
    with pytest.raises(InvalidCheckpoint, match="is not a folder"):
        scan_folder(folder / "config.json")


def test_a_truncated_shard_is_rejected(tmp_path: Path) -> None:
    folder = save(tmp_path / "a", TENSORS)
    shard = folder / "model-0.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(MalformedSafetensors, match="ends inside tensor"):
        scan_folder(folder)


@pytest.mark.parametrize("change", [-1, 1])
def test_a_shards_header_tells_its_length(tmp_path: Path, change: int) -> None:
    folder = save(tmp_path / "a", TENSORS)
    assert read_headers(folder).tensors
    shard = folder / "model-0.safetensors"
    os.truncate(shard, shard.stat().st_size + change)
    with pytest.raises(MalformedSafetensors, match=r"model-0\.safetensors: .*its header tells of"):
        read_headers(folder)


def test_a_tensor_in_two_shards_is_rejected(tmp_path: Path) -> None:
    with pytest.raises(InvalidCheckpoint, match="in two files"):
        scan_folder(save(tmp_path / "a", TENSORS, {"model.a": TENSORS["model.b"]}))


@pytest.mark.parametrize("dtype", ["F8_E4M3", "F8_E5M2", "F16", "BF16", "F32", "F64"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 1e39])
def test_tensors_that_are_not_finite_are_found_in_any_chunking(dtype: str, bad: float) -> None:
    kinds = {"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "F16": torch.float16,
             "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64}  # fmt: skip
    largest = min(torch.finfo(kinds[dtype]).max, torch.finfo(torch.float32).max)
    good = torch.tensor([0.0, -0.0, 1.0, largest, -largest, 0.5, 2.0]).to(kinds[dtype])
    tensor = good.clone()
    tensor[4] = torch.tensor(bad, dtype=torch.float64)
    expected = set() if tensor.float().isfinite().all() else {"b"}
    data = safetensors.torch.save(
        {"a": good, "b": tensor, "c": good.clone(), "n": torch.tensor([-1])}
    )
    for size in (1, 3, 7, len(data)):
        found: set[str] = set()
        inspector = FileInspector("model.safetensors", found)
        for begin in range(0, len(data), size):
            inspector.update(data[begin : begin + size])
        inspector.finish()
        assert found == expected


def test_weights_are_those_that_from_pretrained_reads() -> None:
    shards = {"a-00001.safetensors", "a-00002.safetensors"}
    index = json.dumps({"weight_map": dict(zip("xy", sorted(shards), strict=True))}).encode()
    others = {"consolidated.safetensors", "adapter_model.safetensors", "original/a.safetensors"}
    assert weight_files({*shards, *others}, index) == shards
    assert weight_files({*shards, *others, "model.safetensors"}, index) == {"model.safetensors"}
    assert weight_files({"weights.safetensors", *others}, None) == {"weights.safetensors"}
    assert weight_files(others, None) == frozenset()
    with pytest.raises(InvalidCheckpoint, match=r"a-00002.*1 of 2 shards are missing"):
        weight_files({"a-00001.safetensors"}, index)
    for bad in (b"[]", b"{", b'{"weight_map": {"x": 1}}', b'{"weight_map": {"x": []}}'):
        with pytest.raises(InvalidCheckpoint):
            weight_files({"weights.safetensors"}, bad)


def test_a_shard_outside_the_folder_is_not_read(tmp_path: Path) -> None:
    save(tmp_path / "secret", TENSORS)
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    outside = {"weight_map": {"x": "../secret/model.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(outside))
    with pytest.raises(InvalidCheckpoint, match="is not there"):
        scan_folder(folder)
