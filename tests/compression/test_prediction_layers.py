"""Layers past the model's, which predict further tokens and which transformers does not load."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from deltadock.artifacts.export import merge
from deltadock.artifacts.names import is_embedding, is_head, predicts_further
from deltadock.client.loading import load_delta
from deltadock.compression.checkpoints import DROPPED_LAYERS, KEPT_LAYERS
from deltadock.compression.options import CompressOptions, Source
from deltadock.compression.pipeline import compress
from tests.compatibility.cases import edited, rewrite, with_mtp, with_prediction_layer
from tests.compression.family_cases import CASES, TOKENS, save


@pytest.mark.parametrize("stored", [True, False])
@pytest.mark.parametrize("family", ["deepseek-v3", "glm4-moe"])
def test_the_rest_is_calibrated_and_the_layers_are_carried(
    family: str, stored: bool, text: Path, tmp_path: Path
) -> None:
    base, tuned, out = tmp_path / "base", tmp_path / "tuned", tmp_path / "a.delta"
    for folder, scale in ((base, 0.0), (tuned, 0.02)):
        save(CASES[family], folder, scale=scale)
        if folder == base or stored:
            rewrite(folder, with_prediction_layer)
    report = compress(base, tuned, out, CompressOptions("adamix"), calibration=[Source(text)])
    assert (KEPT_LAYERS in report.notes) == (not stored)
    assert not any("layers.2." in matrix.name for matrix in report.matrices)
    assert report.quality is not None
    assert 0 < report.quality.kl < 0.7 * report.quality.kl_base

    merge(base, out, tmp_path / "merged")
    carried = load_file((tuned if stored else base) / "model.safetensors")
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    if stored:  # copies of the embedding and head are compressed once
        for copy, name in (("embed_tokens", "model.embed_tokens"), ("shared_head.head", "lm_head")):
            carried[f"model.layers.2.{copy}.weight"] = merged[f"{name}.weight"]
    past = {name for name in carried if "layers.2." in name}
    assert past
    assert [name for name in past if not torch.equal(merged[name], carried[name])] == []
    bare, whole = (
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        for folder in (base, tmp_path / "merged")
    )
    with torch.inference_mode(), load_delta(bare, out, base=base):
        torch.testing.assert_close(bare(TOKENS).logits, whole(TOKENS).logits, rtol=0, atol=0)


@pytest.mark.parametrize(("which", "note"), [("base", KEPT_LAYERS), ("tuned", DROPPED_LAYERS)])
def test_layers_that_only_one_has_are_noted(which: str, note: str, tmp_path: Path) -> None:
    made = edited((which, with_mtp))(tmp_path)
    out, options = tmp_path / "a.delta", CompressOptions("exact")
    report = compress(made.base, made.tuned, out, options, calibration=None)
    assert note in report.notes
    merge(made.base, out, tmp_path / "merged")
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    assert merged.keys() == load_file(made.base / "model.safetensors").keys()


def test_their_copies_of_the_embedding_and_head_are_neither() -> None:
    for name, is_one in (("embed_tokens", is_embedding), ("lm_head", is_head)):
        assert is_one(f"model.{name}.weight")
        assert not is_one(f"model.layers.2.{name}.weight")
    for kind in ({"num_hidden_layers": 2}, {"num_hidden_layers": 3}, {}):
        past = kind.get("num_hidden_layers") == 2
        assert predicts_further("model.layers.2.eh_proj.weight", kind) == past
        assert not predicts_further("model.visual.layers.2.weight", kind)
        assert predicts_further("mtp.layers.0.mlp.up_proj.weight", kind)
