"""Checkpoints in other layouts than `save_pretrained` writes today, and unsupported ones."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, BloomModel, GPT2Model, MptConfig, OPTConfig

from deltadock.artifacts.export import merge
from deltadock.artifacts.reader import Artifact
from deltadock.compression.checkpoints import SMALLER_VOCABULARY, CheckpointReader
from deltadock.compression.model.forward import BlockwiseModel
from deltadock.compression.options import CalibrationOptions, CompressOptions, Goal, Source
from deltadock.compression.pipeline import compress
from deltadock.compression.quality import evaluate
from deltadock.compression.report import Report
from deltadock.errors import InvalidCheckpoint, UnsupportedModel
from tests.compression.conftest import save_tokenizer
from tests.compression.family_cases import CASES, TOKENS, VOCABULARY, save

Pair = tuple[Path, Path]
WEIGHTS = "model.safetensors"


def rewrite(folder: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
    weights = change(load_file(folder / WEIGHTS))
    kept = {name: tensor.contiguous() for name, tensor in weights.items()}
    save_file(kept, folder / WEIGHTS, metadata={"format": "pt"})


def family_pair(family: str, tmp_path: Path) -> Pair:
    base, tuned = tmp_path / "base", tmp_path / "tuned"
    save(CASES[family], base)
    save(CASES[family], tuned, scale=0.02)
    return base, tuned


def run(pair: Pair, text: Path, tmp_path: Path) -> tuple[Report, dict[str, str]]:
    """Compress and merge into `merged`; returns the report and each tensor's kind."""
    out = tmp_path / "a.delta"
    report = compress(*pair, out, CompressOptions(method="adamix"), calibration=[Source(text)])
    merge(pair[0], out, tmp_path / "merged")
    with Artifact(out) as artifact:
        return report, {name: record["kind"] for name, record in artifact.records.items()}


@pytest.mark.parametrize("tied", [False, True])
def test_a_smaller_vocabulary_is_completed_by_the_bases(
    make_pair: Callable[..., Pair], text: Path, tmp_path: Path, tied: bool
) -> None:
    """The head, which the fine-tune has not changed, takes no room."""
    base, tuned = make_pair(tied=tied)
    tables = ["model.embed_tokens.weight", *([] if tied else ["lm_head.weight"])]

    def longer(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        more = {name: torch.cat([tensors[name], tensors[name][:4]]) for name in tables}
        return {**tensors, **more}

    rewrite(tuned, lambda tensors: {**tensors, **{n: load_file(base / WEIGHTS)[n] for n in tables}})
    rewrite(base, longer)
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "vocab_size": 260}))
    report, kinds = run((base, tuned), text, tmp_path)
    assert SMALLER_VOCABULARY in report.notes
    assert not kinds.keys() & set(tables)
    assert report.quality is not None
    assert 0 < report.quality.kl < 0.5 * report.quality.kl_base
    assert evaluate(base, tuned, tmp_path / "a.delta", text).kl < 0.5 * report.quality.kl_base
    merged = load_file(tmp_path / "merged" / WEIGHTS)
    assert all(torch.equal(merged[n], load_file(base / WEIGHTS)[n]) for n in tables)
    assert json.loads((tmp_path / "merged/config.json").read_text())["vocab_size"] == 260


def blockwise_logits(folder: Path) -> Tensor:
    model, source = BlockwiseModel(folder), CheckpointReader(folder)
    model.check({name: entry.shape for name, entry in source.entries.items()})
    hidden = model.embed(TOKENS, source)
    for index in range(len(model.blocks)):
        hidden = model.run_block(index, hidden, source)
    final = model.final_hidden(hidden, source).flatten(0, 1)
    return torch.cat(list(model.logits(final, source)))


def test_experts_stored_in_one_tensor(text: Path, tmp_path: Path) -> None:
    pair = family_pair("mixtral", tmp_path)
    expected = blockwise_logits(pair[1])
    for folder in pair:
        whole = AutoModelForCausalLM.from_pretrained(folder)
        save_file(dict(whole.state_dict()), folder / WEIGHTS, metadata={"format": "pt"})
    torch.testing.assert_close(blockwise_logits(pair[1]), expected)
    # One expert is unchanged.
    name = "model.layers.0.mlp.experts.down_proj"
    unchanged = load_file(pair[0] / WEIGHTS)[name][2]

    def restore(weights: dict[str, Tensor]) -> dict[str, Tensor]:
        weights[name][2] = unchanged
        return weights

    rewrite(pair[1], restore)
    report, kinds = run(pair, text, tmp_path)
    assert kinds[name] == kinds["model.layers.1.mlp.experts.gate_up_proj"] == "stack"
    parts = [matrix.name for matrix in report.matrices if matrix.name.startswith(name)]
    assert parts == [f"{name}[{expert}]" for expert in (0, 1, 3)]
    merged = load_file(tmp_path / "merged" / WEIGHTS)
    assert torch.equal(merged[name][2], unchanged)
    assert report.quality is not None
    assert 0 < report.quality.kl < 0.7 * report.quality.kl_base


def test_gpt2_without_prefix_and_with_old_masks(text: Path, tmp_path: Path) -> None:
    pair = family_pair("gpt2", tmp_path)
    expected = blockwise_logits(pair[1])
    mask = torch.ones(1, 1, 128, 128).tril().bool()
    for folder in pair:
        GPT2Model.from_pretrained(folder).save_pretrained(folder)
        rewrite(folder, lambda weights: {**weights, "h.0.attn.bias": mask})
    assert "h.1.mlp.c_fc.weight" in load_file(pair[1] / WEIGHTS)
    torch.testing.assert_close(blockwise_logits(pair[1]), expected)
    _, kinds = run(pair, text, tmp_path)
    assert kinds["h.1.mlp.c_fc.weight"] == "transposed"
    assert kinds["wte.weight"] == "rows"
    assert kinds["wpe.weight"] == kinds["ln_f.bias"] == "exact"
    assert "h.0.attn.bias" not in kinds
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    with torch.inference_mode():
        logits = merged(TOKENS).logits.flatten(0, 1)
    torch.testing.assert_close(blockwise_logits(tmp_path / "merged"), logits, rtol=1e-4, atol=1e-5)


def test_gpt_neox_with_old_masks_and_frequencies(text: Path, tmp_path: Path) -> None:
    pair = family_pair("gpt-neox", tmp_path)
    expected = blockwise_logits(pair[1])
    attention = "gpt_neox.layers.0.attention"
    old = {
        f"{attention}.bias": torch.ones(1, 1, 128, 128).tril().bool(),
        f"{attention}.masked_bias": torch.tensor(-1e9),
        f"{attention}.rotary_emb.inv_freq": torch.ones(2),
    }
    rewrite(pair[1], lambda weights: {**weights, **old})
    torch.testing.assert_close(blockwise_logits(pair[1]), expected)
    _, kinds = run(pair, text, tmp_path)
    assert kinds["embed_out.weight"] == "svd"
    assert not kinds.keys() & old.keys()


def test_bloom_without_prefix(text: Path, tmp_path: Path) -> None:
    pair = family_pair("bloom", tmp_path)
    expected = blockwise_logits(pair[0])
    BloomModel.from_pretrained(pair[0]).save_pretrained(pair[0])
    assert "h.1.mlp.dense_h_to_4h.weight" in load_file(pair[0] / WEIGHTS)
    torch.testing.assert_close(blockwise_logits(pair[0]), expected)
    _, kinds = run(pair, text, tmp_path)
    assert kinds["h.1.mlp.dense_h_to_4h.weight"] == "svd"


@pytest.mark.parametrize("family", ["qwen2.5-vl", "llava", "gemma3-sight", "qwen2-moe"])
def test_tensors_may_have_module_names(family: str, tmp_path: Path) -> None:
    whole = save(CASES[family], tmp_path)
    expected = blockwise_logits(tmp_path)
    whole.save_pretrained(tmp_path, save_original_format=False)
    named = load_file(tmp_path / WEIGHTS).keys()
    assert named <= whole.state_dict().keys()
    torch.testing.assert_close(blockwise_logits(tmp_path), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64])
def test_other_float_dtypes(pair: Pair, text: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    for folder in pair:
        rewrite(folder, lambda weights: {name: w.to(dtype) for name, w in weights.items()})
    report, kinds = run(pair, text, tmp_path)
    assert kinds["model.layers.0.mlp.up_proj.weight"] == "svd"
    assert all(w.dtype == dtype for w in load_file(tmp_path / "merged" / WEIGHTS).values())
    assert report.quality is not None
    assert report.quality.kl < 0.5 * report.quality.kl_base


@pytest.mark.parametrize(
    ("stored", "saved"),
    [
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.bfloat16),
        (torch.bfloat16, torch.float16),
    ],
)
@pytest.mark.parametrize("method", ["adamix", "optimix", "exact"])
def test_what_only_its_dtype_changed_takes_no_room(
    make_pair: Callable[..., Pair],
    text: Path,
    tmp_path: Path,
    method: str,
    stored: torch.dtype,
    saved: torch.dtype,
) -> None:
    """As in a LoRA adapter that was merged and saved in another dtype than the base's."""
    base, tuned = make_pair(tied=False)
    changed = {"model.layers.0.mlp.up_proj.weight", "model.layers.1.self_attn.v_proj.weight"}
    negative = "model.layers.1.mlp.down_proj.weight"
    noise = torch.Generator().manual_seed(0)

    def refine(weights: dict[str, Tensor]) -> dict[str, Tensor]:
        weights[negative][0, 0] = -0.0
        if stored == torch.float32:  # which bfloat16 rounds
            return {k: w.float() * (1 + 1e-4 * torch.rand(w.shape, generator=noise))
                    for k, w in weights.items()}  # fmt: skip
        return {k: w.to(stored) for k, w in weights.items()}

    rewrite(base, refine)
    before, trained = load_file(base / WEIGHTS), load_file(tuned / WEIGHTS)
    after = {k: (trained[k] if k in changed else w).to(saved) for k, w in before.items()}
    rewrite(tuned, lambda _: after)
    out = tmp_path / "a.delta"
    options = CompressOptions(
        method=method, calibration=CalibrationOptions(tokens=512, length=32),
        goal=None if method == "exact" else Goal("bits", 1.0),
    )  # fmt: skip
    compress(base, tuned, out, options, calibration=[Source(text)])
    merge(base, out, tmp_path / "merged")
    merged = load_file(tmp_path / "merged" / WEIGHTS)
    with Artifact(out) as artifact:
        for name, weight in after.items():
            assert merged[name].dtype == saved
            if weight.ndim == 2 and name not in changed and (method, name) != ("exact", negative):
                assert artifact.tensor_bytes(name) == 0
            if name not in changed or method == "exact":
                assert torch.equal(merged[name], weight)
            if method == "exact":
                assert torch.equal(merged[name].signbit(), weight.signbit())


def test_experts_of_another_dtype_take_no_room(text: Path, tmp_path: Path) -> None:
    pair = family_pair("mixtral", tmp_path)
    whole = AutoModelForCausalLM.from_pretrained(pair[0])
    name = "model.layers.0.mlp.experts.down_proj"
    for folder, dtype in zip(pair, (torch.bfloat16, torch.float32), strict=True):
        weights = {k: w.bfloat16().to(dtype) for k, w in whole.state_dict().items()}
        if folder == pair[1]:
            weights["model.layers.1.self_attn.q_proj.weight"] *= 2
        save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})
    _, kinds = run(pair, text, tmp_path)
    assert kinds[name] == "stack"
    with Artifact(tmp_path / "a.delta") as artifact:
        assert artifact.tensor_bytes(name) == 0
    merged, weights = (load_file(folder / WEIGHTS) for folder in (tmp_path / "merged", pair[1]))
    assert torch.equal(merged[name], weights[name])


@pytest.mark.parametrize("method", ["bitdelta-distilled", "low-rank", "delta-zip"])
def test_weights_at_the_end_of_float16_stay_finite(
    pair: Pair, text: Path, tmp_path: Path, method: str
) -> None:
    """The base's -65504 plus 131008 and an error of codes would be infinite: stored exactly."""
    name, embedding = "model.layers.0.self_attn.q_proj.weight", "model.embed_tokens.weight"
    for folder, value in zip(pair, (-65504.0, 65504.0), strict=True):

        def change(weights: dict[str, Tensor], value: float = value) -> dict[str, Tensor]:
            weights = {key: tensor.half() for key, tensor in weights.items()}
            weights[name][0, 0] = weights[embedding][3, 5] = value
            return weights

        rewrite(folder, change)
    amount = CalibrationOptions(tokens=512, length=32)
    options = CompressOptions(method=method, calibration=amount)
    compress(*pair, tmp_path / "a.delta", options, calibration=[Source(text)])
    merge(pair[0], tmp_path / "a.delta", tmp_path / "merged")
    merged = load_file(tmp_path / "merged" / WEIGHTS)
    assert all(tensor.isfinite().all() for tensor in merged.values())
    if method == "low-rank":
        assert torch.equal(merged[name], load_file(pair[1] / WEIGHTS)[name])


def test_float8_is_kept_exactly(pair: Pair, text: Path, tmp_path: Path) -> None:
    name = "model.layers.0.mlp.up_proj.weight"
    for folder in pair:
        rewrite(folder, lambda w: {**w, name: w[name].to(torch.float8_e4m3fn)})
    report, kinds = run(pair, text, tmp_path)
    assert kinds[name] == "exact"
    assert name in {tensor.name for tensor in report.other_tensors}
    merged, tuned = (load_file(folder / WEIGHTS)[name] for folder in (tmp_path / "merged", pair[1]))
    assert torch.equal(merged.view(torch.uint8), tuned.view(torch.uint8))


def test_float8_with_scales_is_rejected(pair: Pair, text: Path, tmp_path: Path) -> None:
    name = "model.layers.0.mlp.up_proj.weight"
    for folder in pair:
        scales = {f"{name}_scale_inv": torch.ones(1, 1)}
        rewrite(folder, lambda w, s=scales: {**w, **s, name: w[name].to(torch.float8_e4m3fn)})
    with pytest.raises(UnsupportedModel, match=r"fp8.*dequantize=True"):
        run(pair, text, tmp_path)


@pytest.mark.parametrize("which", [0, 1], ids=["base", "fine-tune"])
def test_a_quantized_checkpoint_is_rejected(
    pair: Pair, text: Path, tmp_path: Path, which: int
) -> None:
    config = json.loads((pair[which] / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (pair[which] / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnsupportedModel, match=r"gptq.*dequantize"):
        run(pair, text, tmp_path)


def test_an_unknown_family_is_rejected_by_name_but_can_be_stored_exactly(
    text: Path, tmp_path: Path
) -> None:
    pair = tmp_path / "base", tmp_path / "tuned"
    for seed, folder in enumerate(pair):
        torch.manual_seed(seed)
        config = MptConfig(vocab_size=VOCABULARY, d_model=32, n_layers=2, n_heads=4)
        AutoModelForCausalLM.from_config(config).save_pretrained(folder)
        save_tokenizer(folder)
    with pytest.raises(UnsupportedModel, match=r"'mpt'.*'exact'"):
        run(pair, text, tmp_path)
    exact = CompressOptions(method="exact")
    compress(*pair, tmp_path / "a.delta", exact, calibration=None)
    merge(pair[0], tmp_path / "a.delta", tmp_path / "merged")
    merged, tuned = (load_file(folder / WEIGHTS) for folder in (tmp_path / "merged", pair[1]))
    assert all(torch.equal(merged[name], tensor) for name, tensor in tuned.items())


def test_a_projected_embedding_is_rejected(tmp_path: Path) -> None:
    config = OPTConfig(
        vocab_size=VOCABULARY, hidden_size=32, word_embed_proj_dim=24, num_hidden_layers=2,
        num_attention_heads=4, ffn_dim=48,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModel, match=r"'opt'.*\(24 to 32\)"):
        BlockwiseModel(tmp_path)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_a_larger_vocabulary(
    make_pair: Callable[..., Pair], text: Path, tmp_path: Path, tied: bool
) -> None:
    base, tuned = make_pair(tied=tied)
    model = AutoModelForCausalLM.from_pretrained(tuned)
    model.resize_token_embeddings(VOCABULARY + 5)
    model.save_pretrained(tuned)
    report, kinds = run((base, tuned), text, tmp_path)
    assert kinds["model.embed_tokens.weight"] == "new-rows"
    assert kinds.get("lm_head.weight") == (None if tied else "new-rows")
    assert report.quality is not None
    assert report.quality.kl < 0.5 * report.quality.kl_base
    weights, merged = (load_file(folder / WEIGHTS) for folder in (tuned, tmp_path / "merged"))
    name = "model.embed_tokens.weight"
    assert torch.equal(merged[name][VOCABULARY:], weights[name][VOCABULARY:])
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "merged").config.vocab_size == 261
    quality = evaluate(base, tuned, tmp_path / "a.delta", text)
    assert quality.kl < 0.5 * quality.kl_base
    exact = CompressOptions(method="exact")
    compress(base, tuned, tmp_path / "exact.delta", exact, calibration=[Source(text)])
    merge(base, tmp_path / "exact.delta", tmp_path / "same")
    same = load_file(tmp_path / "same" / WEIGHTS)
    assert same.keys() == weights.keys()
    assert all(torch.equal(same[name], tensor) for name, tensor in weights.items())


def test_a_separate_head_under_a_tied_configuration(pair: Pair, tmp_path: Path) -> None:
    """`transformers` uses the stored head."""
    rewrite(pair[1], lambda w: {**w, "lm_head.weight": 2 * w["model.embed_tokens.weight"]})
    whole = AutoModelForCausalLM.from_pretrained(pair[1], dtype=torch.float32).eval()
    with torch.inference_mode():
        expected = whole(TOKENS).logits.flatten(0, 1)
    torch.testing.assert_close(blockwise_logits(pair[1]), expected, rtol=1e-4, atol=1e-5)


def test_the_error_names_a_missing_tensor_as_in_the_checkpoint(tmp_path: Path) -> None:
    save(CASES["llava"], tmp_path)
    name = "language_model.model.layers.1.mlp.up_proj.weight"
    rewrite(tmp_path, lambda w: {key: tensor for key, tensor in w.items() if key != name})
    source = CheckpointReader(tmp_path)
    with pytest.raises(InvalidCheckpoint, match=name):
        BlockwiseModel(tmp_path).check({n: entry.shape for n, entry in source.entries.items()})
