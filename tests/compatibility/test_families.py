"""Settings of the forward pass and tied heads, in every family: merged and loaded as it should."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig

from deltadock.artifacts.export import merge
from deltadock.artifacts.folder import scan_folder
from deltadock.client.loading import load_delta
from deltadock.compression.families import CALIBRATED
from deltadock.compression.model.families import auto_class
from tests.compatibility.cases import Made, moved, save_adapter
from tests.compatibility.test_cases import logits_of, run
from tests.compression.family_cases import CASES, save


def check(made: Made, home: Path, text: Path | None = None) -> None:
    """`merge` and `load_delta` give the model of transformers or PEFT."""
    expected, out = logits_of(made.model), home / "a.delta"
    run(made, out, text)
    auto = auto_class(scan_folder(made.base).config["model_type"])
    base = auto.from_pretrained(made.base, dtype=torch.float32).eval()
    before = logits_of(base)
    assert (expected - before).abs().max() > 1e-3
    with load_delta(base, out):
        torch.testing.assert_close(logits_of(base), expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(logits_of(base), before)
    merge(made.base, out, home / "merged")
    merged = auto.from_pretrained(home / "merged", dtype=torch.float32).eval()
    torch.testing.assert_close(logits_of(merged), expected, rtol=1e-4, atol=1e-5)


def other_settings(config: dict[str, Any]) -> dict[str, Any]:
    """A parsed config.json with other rotary embeddings and epsilons of norms."""
    part = config.get("text_config", config)
    for key in part:
        if key.endswith(("eps", "epsilon")):
            part[key] = 0.05
    rope = part.get("rope_parameters") or {}
    for one in rope.values() if any(isinstance(v, dict) for v in rope.values()) else [rope]:
        if one:
            one["rope_theta"] = 37.0
    return config


@pytest.mark.parametrize("family", CASES)
def test_a_fine_tunes_rotary_embedding_and_epsilon(family: str, tmp_path: Path) -> None:
    model = save(CASES[family], tmp_path / "base").float()
    moved(model).save_pretrained(tmp_path / "tuned")
    path = tmp_path / "tuned" / "config.json"
    path.write_text(json.dumps(other_settings(json.loads(path.read_text()))))
    auto = auto_class(model.config.model_type)
    tuned = auto.from_pretrained(tmp_path / "tuned", dtype=torch.float32).eval()
    check(Made(tmp_path / "base", tmp_path / "tuned", tuned), tmp_path)
    merged, given = (scan_folder(tmp_path / name) for name in ("merged", "tuned"))
    assert merged.weights_digest == given.weights_digest


@pytest.mark.parametrize("on", ["lora", "modules_to_save"])
@pytest.mark.parametrize("family", CASES)
def test_an_adapter_on_the_embedding(family: str, on: str, tmp_path: Path) -> None:
    model = save(CASES[family], tmp_path / "base").float()
    table = model.get_input_embeddings()
    path = next(name for name, module in model.named_modules() if module is table)
    embedding = path.rpartition(".")[2]
    others = ".*(q_proj|q_a_proj|c_attn|qkv_proj|query_key_value)"
    settings: dict[str, Any] = {"r": 4, "target_modules": others}
    if CALIBRATED[model.config.model_type].vision:
        settings["target_modules"] = f".*language_model{others}"
    if on == "lora":
        settings["target_modules"] += f"|.*{embedding}"
    else:
        settings["modules_to_save"] = [embedding]
    text = tmp_path / "text.txt"
    text.write_text("".join(f"{n} squared is {n * n}.\n" for n in range(60)))
    check(save_adapter(tmp_path, model, None, False, LoraConfig, settings), tmp_path, text)


def test_the_scale_of_scores_that_yarn_has_in_deepseek(tmp_path: Path) -> None:
    model = save(CASES["deepseek-v3"], tmp_path / "base").float()
    moved(model).save_pretrained(tmp_path / "tuned")
    path = tmp_path / "tuned" / "config.json"
    config = json.loads(path.read_text())
    config["rope_parameters"] = {
        "rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "mscale": 1.0, "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 32,
    }  # fmt: skip
    path.write_text(json.dumps(config))
    tuned = auto_class("deepseek_v3").from_pretrained(tmp_path / "tuned", dtype=torch.float32)
    check(Made(tmp_path / "base", tmp_path / "tuned", tuned.eval()), tmp_path)
