"""Importing PEFT adapters: equal to PEFT's formula, or rejected with the reason."""

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from deltadock.artifacts.encodings import Encoded, decode_dense, decode_floats
from deltadock.artifacts.export import merge
from deltadock.artifacts.folder import read_headers
from deltadock.artifacts.reader import Artifact
from deltadock.artifacts.tensors import apply_delta
from deltadock.artifacts.writer import write_artifact
from deltadock.compression.adapters.encoding import adapter_digest, encode_adapter
from deltadock.compression.adapters.importing import evaluate_adapter, import_adapter
from deltadock.compression.calibration.sampling import TextSampler
from deltadock.compression.calibration.sources import load_tokenizer
from deltadock.compression.checkpoints import CheckpointReader
from deltadock.compression.options import CalibrationOptions, CompressOptions, Source
from deltadock.compression.preview import preview_size
from deltadock.compression.progress import ProgressReporter
from deltadock.compression.quality import evaluate
from deltadock.compression.shapes import shapes_of
from deltadock.errors import (
    ArchitectureMismatch,
    DeltadockError,
    InvalidAdapter,
    MalformedSafetensors,
    NonFiniteWeights,
    UnsafeFile,
)
from deltadock.inference.prompts.chat import chat_format

LAYER = "model.layers.0.self_attn.q_proj"
HEAD = "lm_head"
EMBEDDING = "model.embed_tokens"
PREFIX = "base_model.model."

Tensors = dict[str, Tensor]
MakeAdapter = Callable[..., Path]


@pytest.fixture
def base(make_pair: Callable[..., tuple[Path, Path]]) -> Path:
    return make_pair(tied=False)[0]


@pytest.fixture
def make_adapter(tmp_path: Path) -> MakeAdapter:
    """Writes an adapter as PEFT's `save_pretrained` does."""

    def make(tensors: Tensors, **config: Any) -> Path:
        folder = tmp_path / "adapter"
        folder.mkdir(exist_ok=True)
        settings = {"peft_type": "LORA", "r": 4, "lora_alpha": 12, "bias": "none", **config}
        (folder / "adapter_config.json").write_text(json.dumps(settings))
        save_file(
            {PREFIX + name: tensor.contiguous() for name, tensor in tensors.items()},
            folder / "adapter_model.safetensors",
        )
        return folder

    return make


def factors(h_out: int, h_in: int, rank: int = 4, dtype: torch.dtype = torch.float32) -> Tensors:
    generator = torch.Generator().manual_seed(h_out + 3 * h_in)
    return {
        f"{LAYER}.lora_A.weight": torch.randn(rank, h_in, generator=generator).to(dtype),
        f"{LAYER}.lora_B.weight": torch.randn(h_out, rank, generator=generator).to(dtype),
    }


def delta_of(encoded: Encoded) -> Tensor:
    return torch.from_numpy(decode_dense(encoded)).double()


def product(tensors: Tensors, scaling: float) -> Tensor:
    a, b = (tensors[f"{LAYER}.lora_{side}.weight"].double() for side in "AB")
    return scaling * b @ a


@pytest.mark.parametrize("stabilised", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_outputs_equal_the_adapters(
    base: Path, make_adapter: MakeAdapter, dtype: torch.dtype, stabilised: bool
) -> None:
    tensors = factors(64, 64, dtype=dtype)
    encoded = encode_adapter(CheckpointReader(base), make_adapter(tensors, use_rslora=stabilised))
    assert encoded.keys() == {f"{LAYER}.weight"}
    inputs = torch.randn(7, 64, dtype=torch.float64)
    a, b = (tensors[f"{LAYER}.lora_{side}.weight"].double() for side in "AB")
    scaling = 12 / math.sqrt(4) if stabilised else 12 / 4
    expected = (inputs @ a.T @ b.T) * scaling
    actual = inputs @ delta_of(encoded[f"{LAYER}.weight"]).T
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_factors_are_stored_unchanged(
    base: Path, make_adapter: MakeAdapter, dtype: torch.dtype
) -> None:
    tensors = factors(64, 64, dtype=dtype)
    encoded = encode_adapter(CheckpointReader(base), make_adapter(tensors))[f"{LAYER}.weight"]
    record = encoded.record
    assert (record["kind"], record["rank"], record["scaling"]) == ("low-rank", 4, 3.0)
    for side, key in (("u", "B"), ("v", "A")):
        stored = torch.from_numpy(decode_floats(encoded.segments[side], record["factor_dtype"]))
        assert torch.equal(stored, tensors[f"{LAYER}.lora_{key}.weight"].float())
        assert encoded.segments[side].nbytes == 256 * dtype.itemsize


@pytest.mark.parametrize("pattern", [LAYER, "q_proj", r".*\.self_attn\.q_proj", r"^model\..*proj"])
def test_rank_and_alpha_patterns(base: Path, make_adapter: MakeAdapter, pattern: str) -> None:
    tensors = factors(64, 64, rank=2)
    adapter = make_adapter(
        tensors,
        rank_pattern={"other": 9, pattern: 2},
        alpha_pattern={pattern: 5, r"self_attn\.q_proj": 7},
    )
    actual = delta_of(encode_adapter(CheckpointReader(base), adapter)[f"{LAYER}.weight"])
    torch.testing.assert_close(actual, product(tensors, 5 / 2), rtol=1e-5, atol=1e-5)


def test_adapters_of_head_and_embedding(base: Path, make_adapter: MakeAdapter) -> None:
    a, b = torch.randn(4, 64), torch.randn(256, 4)
    tensors = {
        f"{HEAD}.lora_A.weight": a,
        f"{HEAD}.lora_B.weight": b,
        f"{EMBEDDING}.lora_embedding_A": b.T,
        f"{EMBEDDING}.lora_embedding_B": a.T,
    }
    encoded = encode_adapter(CheckpointReader(base), make_adapter(tensors))
    expected = 3 * b.double() @ a.double()
    for name in (HEAD, EMBEDDING):
        actual = delta_of(encoded[f"{name}.weight"])
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


def test_full_tensors_are_stored_unless_they_equal_the_base(
    base: Path, make_adapter: MakeAdapter
) -> None:
    checkpoint = CheckpointReader(base)
    bias, norm = f"{LAYER}.bias", "model.norm.weight"
    tensors = {
        f"{LAYER}.base_layer.bias": checkpoint.tensor(bias) + 1,
        norm: checkpoint.tensor(norm).float() + 0.125,
        "lm_head.weight": checkpoint.tensor("lm_head.weight"),
    }
    encoded = encode_adapter(CheckpointReader(base), make_adapter(tensors, bias="lora_only"))
    assert {name: e.record["dtype"] for name, e in encoded.items()} == {bias: "BF16", norm: "F32"}
    assert encoded[norm].segments["data"].tolist() == tensors[norm].tolist()


def test_a_resized_vocabulary(base: Path, make_adapter: MakeAdapter) -> None:
    name, head = "model.embed_tokens.weight", "lm_head.weight"
    longer = {
        one: torch.cat([CheckpointReader(base).tensor(one), torch.ones(3, 64).bfloat16()])
        for one in (name, head)
    }
    encoded = encode_adapter(CheckpointReader(base), make_adapter(longer))[name]
    assert encoded.record["kind"] == "new-rows"
    assert encoded.nbytes == 3 * 64 * 2
    longer[name][0] += 1
    trained = encode_adapter(CheckpointReader(base), make_adapter(longer))[name]
    assert (trained.record["kind"], trained.record["shape"]) == ("exact", [259, 64])
    with pytest.raises(InvalidAdapter, match="259 tokens in the embedding, but 256 in the head"):
        encode_adapter(CheckpointReader(base), make_adapter({name: longer[name]}))


def test_tokens_that_are_trained_alone_are_small(base: Path, make_adapter: MakeAdapter) -> None:
    table, name = CheckpointReader(base).tensor(f"{EMBEDDING}.weight"), f"{EMBEDDING}.weight"
    rows = torch.randn(2, 64)
    tokens = {f"{EMBEDDING}.token_adapter.trainable_tokens_delta": rows}

    def encode(numbers: Any, tensors: Tensors = tokens) -> Encoded:
        adapter = make_adapter(tensors, trainable_token_indices=numbers)
        return encode_adapter(CheckpointReader(base), adapter)[name]

    for numbers in ([7, 200], {"embed_tokens": [7, 200]}):
        encoded = encode(numbers)
        assert encoded.nbytes < 1024 < table.nbytes
        expected = table.index_copy(0, torch.tensor([7, 200]), rows.to(table.dtype))
        assert torch.equal(apply_delta(encoded, table), expected)
    for numbers, words in (
        ([7], "names 1 token of it"),
        ({"lm_head": [7, 200]}, "names 0 tokens of it"),
        ([7, 256], "the token 256.*256 rows in the base"),
        ([7, 7], "another setting wrong"),
        ([7, -1], "another setting wrong"),
        ("7", "another setting wrong"),
    ):
        with pytest.raises(InvalidAdapter, match=words):
            encode(numbers)
    with_factors = {
        f"{EMBEDDING}.lora_embedding_A": torch.randn(4, 256),
        f"{EMBEDDING}.lora_embedding_B": torch.randn(64, 4),
    }
    with pytest.raises(InvalidAdapter, match=r"factors too.*merge_and_unload"):
        encode([7, 200], tokens | with_factors)


def test_adapters_that_add_tokens_are_sampled_from(
    make_pair: Callable[..., tuple[Path, Path]], make_adapter: MakeAdapter, tmp_path: Path
) -> None:
    base, _ = make_pair(tied=True)
    table = CheckpointReader(base).tensor(f"{EMBEDDING}.weight")
    longer = {f"{EMBEDDING}.weight": torch.cat([table, torch.ones_like(table[:3])])}
    adapter = make_adapter(factors(64, 64) | longer, ensure_weight_tying=True)
    amount = CalibrationOptions(tokens=256, length=32)
    report = import_adapter(
        base, adapter, tmp_path / "a.delta",
        CompressOptions("lora", calibration=amount), calibration=[], progress=ProgressReporter(),
    )  # fmt: skip
    assert report.quality is not None
    assert report.quality.kl == 0 < report.quality.kl_base


@pytest.mark.parametrize("square", [False, True])
def test_conv1d_weights_are_the_transpose(
    make_adapter: MakeAdapter, tmp_path: Path, square: bool
) -> None:
    h_in, h_out = (24, 24) if square else (24, 72)
    base = tmp_path / "gpt2"
    base.mkdir()
    (base / "config.json").write_text('{"model_type": "gpt2"}')
    save_file({f"{LAYER}.weight": torch.randn(h_in, h_out)}, base / "model.safetensors")
    tensors = factors(h_out, h_in)
    actual = encode_adapter(CheckpointReader(base), make_adapter(tensors, fan_in_fan_out=True))[
        f"{LAYER}.weight"
    ]
    assert actual.record["kind"] == "transposed"
    torch.testing.assert_close(delta_of(actual), product(tensors, 3).T, rtol=1e-5, atol=1e-5)
    if square:
        adapter = make_adapter(tensors)  # as PEFT writes it if its last layer is the head
        same = encode_adapter(CheckpointReader(base), adapter)[f"{LAYER}.weight"]
        assert torch.equal(delta_of(same), delta_of(actual))
        (base / "config.json").write_text('{"model_type": "llama"}')
        plain = encode_adapter(CheckpointReader(base), adapter)[f"{LAYER}.weight"]
        torch.testing.assert_close(delta_of(plain), product(tensors, 3), rtol=1e-5, atol=1e-5)


def test_the_merged_checkpoint_equals_the_merged_adapter(
    base: Path, make_adapter: MakeAdapter, tmp_path: Path
) -> None:
    tensors = factors(64, 64)
    encoded = encode_adapter(CheckpointReader(base), make_adapter(tensors))
    checkpoint = CheckpointReader(base)
    manifest = {
        "base_digest": checkpoint.manifest.weights_digest, "method": "lora", "files": {},
        "nominal_bits": None, "checkpoint_bytes": checkpoint.bf16_bytes,
        "parameters": checkpoint.parameters,
    }  # fmt: skip
    path = tmp_path / "a.delta"
    write_artifact(path, encoded, manifest)
    with Artifact(path) as artifact:
        artifact.check_intact()
    merge(base, path, tmp_path / "merged")
    after = load_file(tmp_path / "merged" / "model.safetensors")
    before = checkpoint.tensor(f"{LAYER}.weight")
    expected = (before.float() + product(tensors, 3).float()).to(before.dtype)
    torch.testing.assert_close(after[f"{LAYER}.weight"], expected)
    assert torch.equal(after["model.norm.weight"], checkpoint.tensor("model.norm.weight"))


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"use_dora": True}, "use_dora"),
        ({"lora_bias": True}, "lora_bias"),
        ({"layer_replication": [[0, 1]]}, "layer_replication"),
        ({"target_parameters": "experts"}, "another setting wrong"),
        ({"init_lora_weights": "pissa_niter_4"}, "pissa"),
        ({"peft_type": "IA3"}, "LORA"),
        ({"r": 8}, "8"),
        ({"r": 0}, "r or lora_alpha"),
        ({"r": True}, "r or lora_alpha"),
        ({"lora_alpha": None}, "r or lora_alpha"),
        ({"lora_alpha": "inf"}, "r or lora_alpha"),
        ({"rank_pattern": {"q" * 1001: 4}}, "intricate"),
        ({"alpha_pattern": {"(": 4}}, "invalid"),
        ({"alpha_pattern": ["q_proj"]}, "r or lora_alpha"),
    ],
)
def test_unsupported_configurations_are_rejected(
    base: Path, make_adapter: MakeAdapter, config: dict[str, Any], words: str
) -> None:
    with pytest.raises(InvalidAdapter, match=words):
        encode_adapter(CheckpointReader(base), make_adapter(factors(64, 64), **config))


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({f"{LAYER}.lora_A.weight": None}, InvalidAdapter, "both factors"),
        ({f"{LAYER}.weight": torch.zeros(64, 64)}, InvalidAdapter, "both factors"),
        ({f"{LAYER}.lora_magnitude_vector": torch.ones(64)}, InvalidAdapter, "DoRA"),
        ({f"{LAYER}.lora_B.bias": torch.ones(64)}, InvalidAdapter, "cannot be imported"),
        ({f"{LAYER}.lora_A.weight": torch.ones(5, 64)}, InvalidAdapter, "no product"),
        ({f"{LAYER}.lora_A.weight": torch.ones(4, 63)}, ArchitectureMismatch, "one of shape"),
        ({"model.layers.9.mlp.weight": torch.ones(2, 2)}, ArchitectureMismatch, "none"),
        ({f"{LAYER}.lora_A.weight": torch.full((4, 64), torch.nan)}, NonFiniteWeights, "NaN"),
        ({f"{LAYER}.lora_A.weight": torch.ones(4, 64).double()}, InvalidAdapter, "float64"),
    ],
)
def test_unsupported_tensors_are_rejected(
    base: Path,
    make_adapter: MakeAdapter,
    change: dict[str, Tensor | None],
    error: type[DeltadockError],
    words: str,
) -> None:
    tensors = {**factors(64, 64), **change}
    adapter = make_adapter({name: t for name, t in tensors.items() if t is not None})
    with pytest.raises(error, match=words):
        encode_adapter(CheckpointReader(base), adapter)


def test_missing_and_damaged_files_are_rejected(base: Path, make_adapter: MakeAdapter) -> None:
    adapter = make_adapter(factors(64, 64))
    weights, config = adapter / "adapter_model.safetensors", adapter / "adapter_config.json"
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(MalformedSafetensors):
        encode_adapter(CheckpointReader(base), adapter)
    weights.rename(adapter / "adapter_model.bin")
    with pytest.raises(UnsafeFile, match=r"PeftModel\.from_pretrained"):
        encode_adapter(CheckpointReader(base), adapter)
    (adapter / "adapter_model.bin").unlink()
    with pytest.raises(InvalidAdapter, match="no adapter_model"):
        encode_adapter(CheckpointReader(base), adapter)
    config.write_text("{")
    with pytest.raises(InvalidAdapter, match="JSON"):
        encode_adapter(CheckpointReader(base), adapter)
    config.unlink()
    with pytest.raises(InvalidAdapter, match="no adapter_config"):
        encode_adapter(CheckpointReader(base), adapter)


def test_the_previewed_size_is_the_deltas(
    base: Path, make_adapter: MakeAdapter, tmp_path: Path
) -> None:
    adapter, out = make_adapter(factors(64, 64)), tmp_path / "a.delta"
    shapes = shapes_of(read_headers(adapter), read_headers(base))
    size = preview_size(shapes, "lora", None)
    report = import_adapter(
        base, adapter, out, CompressOptions(method="lora"), calibration=[],
        progress=ProgressReporter(),
    )  # fmt: skip
    assert size.parameters == report.parameters
    # Of so small an adapter, the manifest is most.
    assert size.artifact_bytes == pytest.approx(report.artifact_bytes, rel=0.3)


def test_the_digest_covers_both_files(make_adapter: MakeAdapter) -> None:
    digests = {
        adapter_digest(make_adapter(tensors, lora_alpha=alpha))
        for tensors in (factors(64, 64), factors(64, 32))
        for alpha in (1, 2)
    }
    assert len(digests) == 4


def test_the_adapters_tokenizer_and_added_tokens_are_stored(
    make_pair: Callable[..., tuple[Path, Path]], tmp_path: Path
) -> None:
    base, _ = make_pair(tied=False)
    (base / "merges.txt").write_text("#version: 0.2\n")
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    before = CheckpointReader(base)
    tensors = {
        name: torch.cat([before.tensor(name), torch.ones(3, 64, dtype=torch.bfloat16)])
        for name in ("model.embed_tokens.weight", "lm_head.weight")
    }
    tensors["lm_head.weight"][0] += 1
    count = len(tensors["lm_head.weight"])
    save_file(
        {f"base_model.model.{name}": tensor for name, tensor in tensors.items()},
        adapter / "adapter_model.safetensors",
    )
    settings = {"peft_type": "LORA", "r": 4, "lora_alpha": 12, "bias": "none"}
    written = {
        "adapter_config.json": json.dumps(settings),
        "chat_template.jinja": "{{ messages }}",
        "tokenizer.model": b"\xff\xfe",
        "merges.txt": (base / "merges.txt").read_text(),
        "trainer_state.json": "{}",
        "README.md": "An adapter.",
    }
    for name, content in written.items():
        (adapter / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    out = tmp_path / "a.delta"
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox " * 500)
    report = import_adapter(
        base,
        adapter,
        out,
        CompressOptions(method="lora"),
        calibration=[Source(text)],
        progress=ProgressReporter(),
    )
    assert report.quality.kl == 0.0
    assert report.quality.kl_base > 0
    with Artifact(out) as artifact:
        files, binary = artifact.files, artifact.binary_files
    assert files.keys() == {"chat_template.jinja", "config.json"}
    assert binary == {"tokenizer.model": b"\xff\xfe"}
    assert json.loads(files["config.json"] or "")["vocab_size"] == count
    merge(base, out, tmp_path / "merged")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert torch.equal(model.get_input_embeddings().weight, tensors["model.embed_tokens.weight"])
    assert torch.equal(model.lm_head.weight, tensors["lm_head.weight"])


@pytest.mark.parametrize("own_file", [False, True])
def test_an_adapters_chat_template_overrides_the_bases(
    base: Path, make_adapter: MakeAdapter, tmp_path: Path, own_file: bool
) -> None:
    """Older trainers write it to tokenizer_config.json, while the base has a file for it."""
    with_template = tmp_path / "with-template"
    shutil.copytree(base, with_template)
    (with_template / "chat_template.jinja").write_text("the base's")
    q = CheckpointReader(base).tensor(f"{LAYER}.weight")
    adapter = make_adapter(factors(*q.shape))
    config = {"chat_template": "the adapter's", "tokenizer_class": "PreTrainedTokenizerFast"}
    (adapter / "tokenizer_config.json").write_text(json.dumps(config))
    if own_file:
        (adapter / "chat_template.jinja").write_text("the adapter's file")
    out = tmp_path / "a.delta"
    amount = CalibrationOptions(tokens=1024, length=32)
    report = import_adapter(
        with_template, adapter, out, CompressOptions(method="lora", calibration=amount),
        calibration=[], progress=ProgressReporter(),
    )  # fmt: skip
    assert report.measured_on == [{"kind": "sampled", "sha256": None, "tokens": 128}]
    assert (report.quality.kl, report.quality.agreement) == (0, 1)
    assert report.quality.kl_base > 0
    merge(with_template, out, tmp_path / "merged")
    files = {path.name: path.read_text() for path in (tmp_path / "merged").glob("*.j*")}
    assert chat_format(files).template == ("the adapter's file" if own_file else "the adapter's")


def test_a_delta_is_evaluated_against_an_adapter_as_against_its_merged_model(
    base: Path, make_adapter: MakeAdapter, text: Path, tmp_path: Path
) -> None:
    q = CheckpointReader(base).tensor(f"{LAYER}.weight")
    tensors = factors(*q.shape)
    arguments = {"calibration": [Source(text)], "progress": ProgressReporter()}
    other, exact = tmp_path / "other.delta", tmp_path / "exact.delta"
    doubled = {name: 1.5 * tensor for name, tensor in tensors.items()}
    import_adapter(base, make_adapter(doubled), other, CompressOptions("lora"), **arguments)  # type: ignore[arg-type]
    adapter = make_adapter(tensors)
    import_adapter(base, adapter, exact, CompressOptions("lora"), **arguments)  # type: ignore[arg-type]
    merge(base, exact, tmp_path / "merged")
    figures = evaluate_adapter(base, adapter, other, text, window=32)
    assert figures == evaluate(base, tmp_path / "merged", other, text, window=32)
    assert figures.kl > 0
    assert evaluate_adapter(base, adapter, exact, text, window=32).kl == 0


def test_a_backtracking_pattern_is_rejected_quickly(
    base: Path, make_adapter: MakeAdapter, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("deltadock.compression.adapters.config.PATTERN_SECONDS", 0.05)
    adapter = make_adapter(factors(64, 64), rank_pattern={r"(.|.)*(.|.)*\d": 4})
    with pytest.raises(InvalidAdapter, match="intricate"):
        encode_adapter(CheckpointReader(base), adapter)


def test_a_head_of_its_own_on_a_tied_base_is_sampled_from_and_its_size_is_explained(
    make_pair: Callable[..., tuple[Path, Path]], make_adapter: MakeAdapter, tmp_path: Path
) -> None:
    base, _ = make_pair(tied=True)
    table = CheckpointReader(base).tensor(f"{EMBEDDING}.weight")
    head = 1.5 * table.float()
    amount = CalibrationOptions(tokens=256, length=32)
    report = import_adapter(
        base, make_adapter(factors(64, 64) | {f"{HEAD}.weight": head}), tmp_path / "a.delta",
        CompressOptions("lora", calibration=amount), calibration=[], progress=ProgressReporter(),
    )  # fmt: skip
    assert report.quality is not None
    assert report.quality.kl == 0 < report.quality.kl_base
    (note,) = (note for note in report.notes if "holds whole" in note)
    assert f"({HEAD}.weight" in note
    assert "merge_and_unload" in note

    sampler = TextSampler(
        base, load_tokenizer(base), 0, "cpu", lambda *_: None, {f"{HEAD}.weight": head}
    )
    weights = sampler._model.get_output_embeddings().weight
    assert torch.equal(weights, head)
    assert torch.equal(sampler._model.get_input_embeddings().weight, table.float())


@pytest.mark.parametrize(
    ("named", "given", "told"),
    [
        ("Qwen/Qwen2.5-0.5B", "qwen2.5-0.5b", False),
        ("Qwen/Qwen2.5-0.5B", "qwen2.5-0.5b-instruct", True),
        ("Qwen/Qwen2.5-0.5B", "", True),  # the folder's name counts
        ("gpt2", "llama", True),
        ("/home/me/models/my-base/", "llama", False),
        ("./my-base", "llama", False),
        ("out/models/my-base", "llama", False),
        ("C:\\models\\my-base", "llama", False),
        (None, "other", False),
        ("", "other", False),
    ],
)
def test_a_base_of_another_name_is_asked_about(
    base: Path, make_adapter: MakeAdapter, tmp_path: Path, named: str, given: str, told: bool
) -> None:
    adapter = make_adapter(factors(64, 64), base_model_name_or_path=named)
    amount = CalibrationOptions(tokens=256, length=32)
    report = import_adapter(
        base, adapter, tmp_path / "a.delta", CompressOptions("lora", calibration=amount),
        calibration=[], progress=ProgressReporter(), base_name=given,
    )  # fmt: skip
    assert not any("holds whole" in note for note in report.notes)
    asked = [note for note in report.notes if "the base that the adapter was trained on" in note]
    assert len(asked) == told
    assert not told or (repr(named) in asked[0] and repr(given or base.name) in asked[0])


def test_a_path_of_the_trainers_machine_is_not_kept(
    base: Path, make_adapter: MakeAdapter, tmp_path: Path
) -> None:
    cached = "/home/me/.cache/hub/models--Qwen--Qwen2.5-0.5B/snapshots/060db6499f32"
    adapter = make_adapter(factors(64, 64), base_model_name_or_path=cached)
    amount = CalibrationOptions(tokens=256, length=32)
    for given, told in (("qwen2.5-0.5b", 0), ("llama", 1)):
        report = import_adapter(
            base, adapter, tmp_path / "a.delta", CompressOptions("lora", calibration=amount),
            calibration=[], progress=ProgressReporter(), base_name=given,
        )  # fmt: skip
        assert sum("names 'Qwen/Qwen2.5-0.5B'." in note for note in report.notes) == told
        assert "/home/me" not in str(report.to_dict())
        assert b"/home/me" not in (tmp_path / "a.delta").read_bytes()


def test_the_hubs_cache_has_the_bases_name(
    base: Path, make_adapter: MakeAdapter, tmp_path: Path
) -> None:
    cached = tmp_path / "models--Qwen--Qwen2.5-0.5B" / "snapshots" / "060db6499f32faf8b98477b0a264"
    shutil.copytree(base, cached)
    for named, told in (("Qwen/Qwen2.5-0.5B", 0), ("Qwen/Qwen2.5-1.5B", 1)):
        adapter = make_adapter(factors(64, 64), base_model_name_or_path=named)
        amount = CalibrationOptions(tokens=256, length=32)
        report = import_adapter(
            cached, adapter, tmp_path / "a.delta", CompressOptions("lora", calibration=amount),
            calibration=[], progress=ProgressReporter(),
        )  # fmt: skip
        assert sum("the adapter was trained on" in note for note in report.notes) == told
