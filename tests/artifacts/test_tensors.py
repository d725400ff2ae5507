"""Artifacts as torch tensors: merging every encoding and dtype, and segments on a device."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, Qwen2Config, Qwen2ForCausalLM

from deltadock.artifacts.encodings import (
    NUMPY_DTYPES,
    decode_dense,
    deflate,
    encode_alias,
    encode_exact,
    encode_new_rows,
    encode_stack,
    quantize_rows_midrise,
)
from deltadock.artifacts.export import merge
from deltadock.artifacts.folder import scan_folder
from deltadock.artifacts.reader import Artifact
from deltadock.artifacts.tensors import (
    TORCH_DTYPES,
    decoded_delta,
    load_segments,
    merged_tensor,
    stored_tensor,
)
from deltadock.artifacts.writer import write_artifact
from deltadock.errors import InvalidArtifact
from tests.artifacts.edits import rewritten
from tests.artifacts.make_golden import GOLDEN, MANIFEST, WIDE
from tests.artifacts.samples import low_rank_sample, rows_sample, sparse_rows, svd_sample

EMBEDDING = "model.embed_tokens.weight"


def bits(values: Any) -> Any:
    """Raw bfloat16 data."""
    return torch.tensor(values).to(TORCH_DTYPES["BF16"]).view(torch.uint16).numpy()


@pytest.mark.parametrize("lossless", [False, True])
def test_a_tensor_with_new_rows_is_longer_than_the_base(tmp_path: Path, lossless: bool) -> None:
    base = torch.randn(5, 3, generator=torch.Generator().manual_seed(0)).bfloat16()
    added = [[1.0, -2.0, 0.5], [3.0, 0.0, 4.0]]
    part = quantize_rows_midrise(sparse_rows(5, 3, seed=1), 8, "BF16")
    encoded = {
        "part": encode_new_rows(part, bits(added), 5, "BF16"),
        "none": encode_new_rows(None, bits(added), 5, "BF16"),
    }
    path = tmp_path / "a.delta"
    write_artifact(path, {k: deflate(e) if lossless else e for k, e in encoded.items()}, MANIFEST)
    with Artifact(path) as artifact:
        for name, change in (("part", torch.from_numpy(decode_dense(part))), ("none", 0)):
            tensor = merged_tensor(artifact, name, base)
            assert torch.equal(tensor[:5], (base.float() + change).bfloat16())
            assert tensor[5:].tolist() == added
            with pytest.raises(InvalidArtifact, match=r"\[5, 3\], but the base has it in \[7, 3\]"):
                merged_tensor(artifact, name, torch.zeros(7, 3))


@pytest.mark.parametrize("sample", [svd_sample, rows_sample, low_rank_sample])
@pytest.mark.parametrize("lossless", [False, True])
def test_a_delta_decoded_on_a_device_is_the_same(sample: Any, lossless: bool) -> None:
    encoded = sample((37, 70), np.random.default_rng(0)).encoded
    found = decoded_delta(deflate(encoded) if lossless else encoded, torch.device("cpu"))
    torch.testing.assert_close(found, torch.from_numpy(decode_dense(encoded)))


def test_aliases_stacks_and_deflated_tensors_are_merged(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    stack = encode_stack([rows_sample((4, 5), rng).encoded, None, svd_sample((4, 5), rng).encoded])
    exact = encode_exact(bits([1.0, 2.0]), "BF16", (2,))
    path = tmp_path / "a.delta"
    tensors = {
        "stack": deflate(stack),
        "also": encode_alias("stack", (3, 4, 5), "BF16"),
        "exact": deflate(exact),
        "same": encode_alias("exact", (2,), "BF16"),
    }
    write_artifact(path, tensors, MANIFEST)
    base = torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(0))
    want = (base + torch.from_numpy(decode_dense(stack))).bfloat16()
    with Artifact(path) as artifact:
        for name in ("stack", "also"):
            assert torch.equal(merged_tensor(artifact, name, base), want)
        for name in ("exact", "same"):
            assert merged_tensor(artifact, name, torch.zeros(2)).tolist() == [1, 2]


def test_a_resized_vocabulary_is_merged_and_loaded(tmp_path: Path) -> None:
    """transformers loads the longer embedding under the fine-tune's config."""
    base = tmp_path / "base"
    config = Qwen2Config(
        vocab_size=96,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
    )
    model = Qwen2ForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(base)
    before = model.get_input_embeddings().weight.detach()
    part = quantize_rows_midrise(sparse_rows(96, 32, seed=2, scale=0.01), 4, "BF16")
    grown = json.loads((base / "config.json").read_text()) | {"vocab_size": 100}
    write_artifact(
        tmp_path / "a.delta",
        {EMBEDDING: encode_new_rows(part, bits([[0.5] * 32] * 4), 96, "BF16")},
        {
            **MANIFEST,
            "base_digest": scan_folder(base).weights_digest,
            "files": {"config.json": json.dumps(grown)},
        },
    )
    merge(base, tmp_path / "a.delta", tmp_path / "out")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    table = loaded.get_input_embeddings().weight
    assert table.shape == (100, 32)
    assert (table[96:] == 0.5).all()
    after = (before.float() + torch.from_numpy(decode_dense(part))).bfloat16()
    assert torch.equal(table[:96], after)


def data_of(tensor: Tensor) -> Tensor:
    """The tensor's bytes."""
    return tensor.reshape(-1).view(torch.uint8)


@pytest.mark.parametrize("dtype", TORCH_DTYPES)
@pytest.mark.parametrize("shape", [(), (0, 2), (3, 2)])
def test_exact_tensors_of_every_dtype(tmp_path: Path, dtype: str, shape: tuple[int, ...]) -> None:
    """Byte for byte, also in dtypes that numpy lacks; what torch saves is what it gets back."""
    torch.manual_seed(0)
    original = torch.randint(0, 2, shape).to(TORCH_DTYPES[dtype])
    save_file({"t": original}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text('{"model_type": "any"}')
    (entry,) = scan_folder(tmp_path).tensors
    assert entry.dtype == dtype
    raw = data_of(original).numpy().view(NUMPY_DTYPES[dtype])
    path = tmp_path / "a.delta"
    write_artifact(path, {"t": encode_exact(raw, dtype, entry.shape)}, MANIFEST)
    with Artifact(path) as artifact:
        tensor = stored_tensor(artifact.resolved("t"))
        assert (tensor.dtype, tensor.shape) == (original.dtype, original.shape)
        assert torch.equal(data_of(tensor), data_of(original))
        tensor.zero_()  # its own memory, not the file's
        assert torch.equal(data_of(merged_tensor(artifact, "t", tensor)), data_of(original))


@pytest.mark.parametrize(
    ("base_dtype", "dtype"), [("F16", "BF16"), ("BF16", "F32"), ("F32", "F16")]
)
def test_the_finetune_keeps_its_own_dtype(tmp_path: Path, base_dtype: str, dtype: str) -> None:
    delta = sparse_rows(6, 8, seed=0)
    path = tmp_path / "a.delta"
    write_artifact(path, {"e": quantize_rows_midrise(delta, 8, dtype)}, MANIFEST)
    base = torch.randn(6, 8, generator=torch.Generator().manual_seed(0)).to(
        TORCH_DTYPES[base_dtype]
    )
    with Artifact(path) as artifact:
        tensor = merged_tensor(artifact, "e", base)
        assert tensor.dtype == TORCH_DTYPES[dtype]
        exact = base.double() + torch.from_numpy(artifact.dense("e")).double()
        assert torch.equal(tensor, exact.float().to(tensor.dtype))
        assert merged_tensor(artifact, "another", base) is base


DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


def bytes_of(tensor: torch.Tensor) -> bytes:
    return tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("path", [GOLDEN, WIDE])
@pytest.mark.parametrize("chunk", [32 << 20, 1000])
def test_loaded_segments_equal_the_files(
    device: str, path: Path, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("deltadock.artifacts.tensors.CHUNK_BYTES", chunk)
    with Artifact(path) as artifact:
        segments = load_segments(artifact, device)
        assert list(segments) == [spec.name for spec in artifact.header.tensors]
        for spec in artifact.header.tensors:
            tensor = segments[spec.name]
            assert (tensor.dtype, tensor.shape) == (TORCH_DTYPES[spec.dtype], spec.shape)
            assert bytes_of(tensor) == artifact.segment(spec.name).tobytes()
    words = segments.get("proj.weight:v", segments.get("every.width:v"))
    assert words is not None
    assert words.data_ptr() % 64 == 0
    starts = {tensor.untyped_storage().data_ptr() for tensor in segments.values()}
    assert len(starts) == 1, "one allocation"


def test_unaligned_segments_are_loaded(tmp_path: Path) -> None:
    path = tmp_path / "a.delta"

    # Reorder: three bytes of U8 first, so that nothing after them is aligned.
    def edit(header: object, manifest: object) -> None:
        assert isinstance(header, dict)
        specs = {name: spec for name, spec in header.items() if name != "__metadata__"}
        order = sorted(specs, key=lambda name: (specs[name]["dtype"] != "U8", name))
        position = 0
        for name in order:
            begin, end = specs[name]["data_offsets"]
            specs[name]["data_offsets"] = [position, position + end - begin]
            position += end - begin
            pieces.append(data[begin:end])

    data = GOLDEN.read_bytes()[8 + int.from_bytes(GOLDEN.read_bytes()[:8], "little") :]
    pieces: list[bytes] = []
    rewritten(edit)
    moved = b"".join(pieces)
    pieces.clear()
    path.write_bytes(rewritten(edit, moved))
    with Artifact(path) as artifact:
        artifact.check_intact()
        assert any(spec.begin % 2 for spec in artifact.header.tensors if spec.dtype != "U8")
        for name, tensor in load_segments(artifact, "cpu").items():
            assert bytes_of(tensor) == artifact.segment(name).tobytes()


def test_a_file_truncated_after_opening_is_rejected(tmp_path: Path) -> None:
    path = tmp_path / "a.delta"
    path.write_bytes(GOLDEN.read_bytes())
    with Artifact(path) as artifact:
        shorter = tmp_path / "b.delta"
        shorter.write_bytes(GOLDEN.read_bytes()[:-1])
        shorter.replace(path)
        with pytest.raises(InvalidArtifact, match="shorter"):
            load_segments(artifact, "cpu")
