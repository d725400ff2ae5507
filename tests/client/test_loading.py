"""Loading a delta into a transformers model equals merging; unloading restores the base."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer as FastTokenizer
from tokenizers.normalizers import Lowercase
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    LlamaConfig,
    MixtralConfig,
    Qwen2Config,
)

import deltadock
from deltadock.artifacts.checkpoint import TensorEntry
from deltadock.artifacts.encodings import (
    Encoded,
    encode_alias,
    encode_exact,
    encode_floats,
    encode_new_rows,
    encode_rows,
    encode_stack,
    encode_svd,
    encode_transposed,
)
from deltadock.artifacts.export import merge
from deltadock.artifacts.folder import scan_folder
from deltadock.artifacts.writer import write_artifact
from deltadock.errors import BaseMismatch, InvalidArtifact, UnsupportedModel
from tests.artifacts.make_golden import MANIFEST
from tests.artifacts.samples import svd_matrix
from tests.cli.support import save_tokenizer

WEIGHTS = "model.safetensors"
VOCABULARY = 96
ENDS: dict[str, Any] = {"bos_token_id": 0, "eos_token_id": 0}
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, **ENDS,
}  # fmt: skip
CONFIGS: dict[str, Callable[[], Any]] = {
    "llama": lambda: LlamaConfig(**SIZES),
    "qwen2": lambda: Qwen2Config(**SIZES, tie_word_embeddings=True),
    "gpt2": lambda: GPT2Config(
        vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=64, **ENDS
    ),
    "mixtral": lambda: MixtralConfig(**SIZES, num_local_experts=4, num_experts_per_tok=2),
}
TOKENS = torch.randint(1, VOCABULARY, (2, 12), generator=torch.Generator().manual_seed(1))
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def make_base(family: str, folder: Path, dtype: torch.dtype = torch.bfloat16) -> Path:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[family]()).to(dtype)
    model.save_pretrained(folder)
    return folder


def encoded_matrix(shape: tuple[int, ...], seed: int, dtype: str) -> Encoded:
    """A small weight delta of a matrix."""
    rng = np.random.default_rng(seed)
    matrix = svd_matrix(4, *shape, seed, midrise=True)
    small = type(matrix)(matrix.u, matrix.s * np.float32(1e-6), matrix.v)
    return encode_svd(small, dtype, {}, rng.uniform(0.5, 1, shape[0]))


def encoded_delta(entry: TensorEntry, seed: int) -> Encoded:
    """An encoding as methods produce it, chosen by the tensor's dimensions and name."""
    shape, dtype = entry.shape, entry.dtype
    if len(shape) == 1:
        values = np.random.default_rng(seed).uniform(0.9, 1.1, shape).astype(np.float32)
        return encode_exact(encode_floats(values, dtype), dtype, shape)
    if len(shape) == 3:
        parts = [encoded_matrix(shape[1:], seed + k, dtype) for k in range(1, shape[0])]
        return encode_stack([None, *parts])
    if ".c_" in entry.name:
        return encode_transposed(encoded_matrix(shape[::-1], seed, dtype))
    return encoded_matrix(shape, seed, dtype)


def write(base: Path, path: Path, tensors: dict[str, Encoded], **manifest: Any) -> Path:
    known = {"base_digest": scan_folder(base).weights_digest, "files": {}}
    write_artifact(path, tensors, {**MANIFEST, **known, **manifest})
    return path


def make_delta(base: Path, path: Path) -> Path:
    """Write a delta that changes every tensor."""
    entries = scan_folder(base).tensors
    return write(base, path, {e.name: encoded_delta(e, seed) for seed, e in enumerate(entries)})


def load(folder: Path, **options: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, **options).eval()


@torch.no_grad()
def logits(model: Any) -> Tensor:
    values: Tensor = model(TOKENS).logits
    return values


def state(model: Any) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype, name
        assert torch.equal(ours[name], tensor), name


@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_loading_equals_merging_and_unloading_restores_the_base(
    family: str, dtype: str, tmp_path: Path
) -> None:
    """Also in float32, with the values of the bfloat16 checkpoint."""
    base = make_base(family, tmp_path / "base")
    delta = make_delta(base, tmp_path / "a.delta")
    merge(base, delta, tmp_path / "merged")
    model, merged = load(base, dtype=dtype), load(tmp_path / "merged", dtype=dtype)
    before, base_logits = state(model), logits(model)
    assert not torch.equal(base_logits, logits(merged))
    with deltadock.load_delta(model, delta) as handle:
        assert_same(state(model), state(merged))
        assert torch.equal(logits(model), logits(merged))
    assert_same(state(model), before)
    assert torch.equal(logits(model), base_logits)
    handle.unload()
    assert_same(state(model), before)
    again = deltadock.load_delta(model, delta)
    assert torch.equal(logits(model), logits(merged))
    again.unload()


def test_experts_stacked_in_the_checkpoint(tmp_path: Path) -> None:
    base = make_base("mixtral", tmp_path / "base")
    whole = load(base).state_dict()
    save_file(dict(whole), base / WEIGHTS, metadata={"format": "pt"})
    delta = make_delta(base, tmp_path / "a.delta")
    merge(base, delta, tmp_path / "merged")
    model = load(base)
    # The model's tensor names do not show that the checkpoint is stacked; the folder does.
    with deltadock.load_delta(model, delta, base):
        assert torch.equal(logits(model), logits(load(tmp_path / "merged")))


def test_a_rounded_model_needs_its_folder(tmp_path: Path) -> None:
    base = make_base("qwen2", tmp_path / "base", torch.float32)
    delta = make_delta(base, tmp_path / "a.delta")
    merge(base, delta, tmp_path / "merged")
    model, merged = (load(f, dtype="bfloat16") for f in (base, tmp_path / "merged"))
    before = state(model)
    with pytest.raises(BaseMismatch, match="base=folder"):
        deltadock.load_delta(model, delta)
    with deltadock.load_delta(model, delta, base=base):
        assert_same(state(model), state(merged))
        with pytest.raises(BaseMismatch, match="unload any other delta"):
            deltadock.load_delta(model, delta, base=base)
    assert_same(state(model), before)


def resized(base: Path, tmp_path: Path, **tensors: Encoded) -> Path:
    config = json.loads((base / "config.json").read_text()) | {"vocab_size": VOCABULARY + 4}
    return write(base, tmp_path / "a.delta", tensors, files={"config.json": json.dumps(config)})


LONGER = (VOCABULARY + 4, 32)
ADDED = encode_new_rows(
    encoded_matrix((VOCABULARY, 32), 1, "BF16"),
    encode_floats(np.full((4, 32), 0.5, np.float32), "BF16"),
    VOCABULARY,
    "BF16",
)
WHOLE = encode_exact(encode_floats(np.full(LONGER, 0.5, np.float32), "BF16"), "BF16", LONGER)


@pytest.mark.parametrize(
    ("family", "grown"),
    [
        ("qwen2", {EMBEDDING: ADDED}),
        ("qwen2", {EMBEDDING: WHOLE}),
        ("llama", {EMBEDDING: ADDED, HEAD: ADDED}),
        ("llama", {EMBEDDING: ADDED, HEAD: encode_alias(EMBEDDING, LONGER, "BF16")}),
        ("llama", {EMBEDDING: WHOLE, HEAD: ADDED}),
    ],
)
def test_a_larger_vocabulary(family: str, grown: dict[str, Encoded], tmp_path: Path) -> None:
    """Tied weights are one tensor that is resized once; otherwise both are resized."""
    base = make_base(family, tmp_path / "base")
    delta = resized(base, tmp_path, **grown)
    merge(base, delta, tmp_path / "merged")
    model, merged = load(base), load(tmp_path / "merged")
    before = logits(model)
    last = torch.tensor([[VOCABULARY + 3, 1]])
    with deltadock.load_delta(model, delta), torch.no_grad():
        assert torch.equal(model(last, labels=last).loss, merged(last, labels=last).loss)
        assert logits(model).shape[-1] == model.config.vocab_size == VOCABULARY + 4
        assert model.get_input_embeddings().num_embeddings == VOCABULARY + 4
        assert model.get_output_embeddings().out_features == VOCABULARY + 4
    assert torch.equal(logits(model), before)
    assert model.config.vocab_size == model.vocab_size == VOCABULARY
    assert model.get_input_embeddings().num_embeddings == VOCABULARY
    assert model.get_output_embeddings().out_features == VOCABULARY


def test_an_alias_and_a_tied_head_in_the_checkpoint(tmp_path: Path) -> None:
    base = make_base("qwen2", tmp_path / "base")
    weights = load_file(base / WEIGHTS)
    save_file({**weights, HEAD: weights[EMBEDDING].clone()}, base / WEIGHTS, {"format": "pt"})
    tensors = {
        EMBEDDING: encoded_matrix((VOCABULARY, 32), 1, "BF16"),
        HEAD: encode_alias(EMBEDDING, (VOCABULARY, 32), "BF16"),
    }
    delta = write(base, tmp_path / "a.delta", tensors)
    merge(base, delta, tmp_path / "merged")
    model = load(base)
    with deltadock.load_delta(model, delta):
        assert torch.equal(logits(model), logits(load(tmp_path / "merged")))
        assert model.lm_head.weight is model.model.embed_tokens.weight


def test_the_generation_config_is_the_finetunes(tmp_path: Path) -> None:
    base = make_base("llama", tmp_path / "base")
    files = {"generation_config.json": '{"eos_token_id": 7}', "tokenizer.json": None}
    delta = write(base, tmp_path / "a.delta", {}, files=files, binary_files={"a.model": "AAH/"})
    model = load(base)
    with deltadock.load_delta(model, delta) as handle:
        assert model.generation_config.eos_token_id == 7
        assert handle.files == {**files, "a.model": b"\0\1\xff"}
    assert model.generation_config.eos_token_id == 0


def test_other_models_are_refused_and_unchanged(tmp_path: Path) -> None:
    base = make_base("llama", tmp_path / "base")
    delta = make_delta(base, tmp_path / "a.delta")
    model = load(base)
    with torch.no_grad():
        model.model.norm.weight[0] += 1
    before = state(model)
    with pytest.raises(BaseMismatch, match=scan_folder(base).weights_digest):
        deltadock.load_delta(model, delta)
    with pytest.raises(BaseMismatch, match=r"model\.norm\.weight"):
        deltadock.load_delta(model, delta, base=base)
    other = make_base("qwen2", tmp_path / "other")
    with pytest.raises(BaseMismatch, match="this base has"):
        deltadock.load_delta(load(other), delta, base=other)
    assert_same(state(model), before)


def test_a_delta_that_does_not_fit_is_refused_before_any_change(tmp_path: Path) -> None:
    base = make_base("llama", tmp_path / "base")
    norm = "model.norm.weight"
    short = encode_exact(np.zeros(31, np.uint16), "BF16", (31,))
    good = encode_exact(np.zeros(32, np.uint16), "BF16", (32,))
    model = load(base)
    before = state(model)
    broken: list[tuple[dict[str, Encoded], dict[str, Any], str]] = [
        ({norm: short}, {}, "another shape"),
        ({norm: good, "model.ghost": good}, {}, r"model\.ghost"),
        ({norm: good}, {"files": {"generation_config.json": "[]"}}, "generation_config"),
        ({norm: good}, {"files": {"generation_config.json": "{"}}, "generation_config"),
    ]
    for tensors, manifest, message in broken:
        delta = write(base, tmp_path / "a.delta", tensors, **manifest)
        with pytest.raises(InvalidArtifact, match=message):
            deltadock.load_delta(model, delta)
        assert_same(state(model), before)
    content = bytearray(delta.read_bytes())
    content[-1] ^= 1
    delta.write_bytes(content)
    with pytest.raises(InvalidArtifact, match="damaged"):
        deltadock.load_delta(model, delta)


def test_models_without_weights_in_memory_are_refused(tmp_path: Path) -> None:
    base = make_base("llama", tmp_path / "base")
    with pytest.raises(UnsupportedModel, match="in memory"):
        deltadock.load_delta(load(base).to("meta"), make_delta(base, tmp_path / "a.delta"))


def test_an_expert_cannot_be_lengthened(tmp_path: Path) -> None:
    base = make_base("mixtral", tmp_path / "base")
    (entry, *_) = [e for e in scan_folder(base).tensors if "experts.0" in e.name]
    added = np.zeros((1, entry.shape[1]), np.uint16)
    grown = encode_new_rows(None, added, entry.shape[0], "BF16")
    delta = write(base, tmp_path / "a.delta", {entry.name: grown})
    with pytest.raises(UnsupportedModel, match="lengthened"):
        deltadock.load_delta(load(base), delta)


def test_rows_are_merged_once(tmp_path: Path) -> None:
    """A `rows` encoding of an embedding that is tied to the head."""
    base = make_base("qwen2", tmp_path / "base")
    codes = np.zeros((VOCABULARY, 32), np.uint8)
    rows = encode_rows(codes, np.ones(VOCABULARY), np.full(VOCABULARY, 0.25), "BF16")
    model = load(base)
    before = model.lm_head.weight.clone()
    with deltadock.load_delta(model, write(base, tmp_path / "a.delta", {EMBEDDING: rows})):
        assert torch.equal(model.lm_head.weight, (before.float() - 0.125).bfloat16())


def test_from_pretrained_gives_the_fine_tune_and_its_tokenizer(tmp_path: Path) -> None:
    base = make_base("llama", tmp_path / "base")
    save_tokenizer(base)
    template = "{{ messages[0].content }}"
    path = write(
        base,
        tmp_path / "a.delta",
        {entry.name: encoded_delta(entry, 0) for entry in scan_folder(base).tensors},
        files={"chat_template.jinja": template},
    )
    model, tokenizer = deltadock.from_pretrained(base, path)
    assert model.dtype == torch.bfloat16
    merge(base, path, tmp_path / "merged")
    assert torch.equal(logits(model), logits(load(tmp_path / "merged", dtype=torch.bfloat16)))
    assert tokenizer.chat_template == template
    assert tokenizer.decode(tokenizer("abc").input_ids) == "abc"
    with pytest.raises(BaseMismatch):
        deltadock.from_pretrained(tmp_path / "merged", path)


def test_a_loaded_deltas_tokenizer_splits_text_as_the_node(tmp_path: Path) -> None:
    """transformers gives this class a normalizer of its own, none."""
    base = make_base("llama", tmp_path / "base")
    save_tokenizer(base)
    own = FastTokenizer.from_file(str(base / "tokenizer.json"))
    own.normalizer = Lowercase()
    own.save(str(base / "tokenizer.json"))
    config = base / "tokenizer_config.json"
    config.write_text(
        json.dumps(json.loads(config.read_text()) | {"tokenizer_class": "GPT2Tokenizer"})
    )
    assert AutoTokenizer.from_pretrained(base)("A").input_ids != own.encode("A").ids
    with deltadock.load_delta(load(base), write(base, tmp_path / "a.delta", {})) as loaded:
        assert loaded.tokenizer(base)("A").input_ids == own.encode("A").ids
