"""Imported adapters as PEFT adapters again: PEFT loads them, with the same logits."""

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file

from deltadock.artifacts.export import merge
from deltadock.artifacts.folder import scan_folder
from deltadock.artifacts.reader import Artifact
from deltadock.compression.adapters.exporting import export_adapter
from deltadock.compression.model.families import auto_class
from deltadock.compression.options import CompressOptions, Goal
from deltadock.compression.pipeline import compress
from deltadock.errors import InvalidAdapter
from tests.compatibility.cases import ADAPTER, CASES, PADDED, WEIGHTS, Case, Made, configured, moved
from tests.compatibility.test_cases import AMOUNT, TOKENIZED, logits_of, names, run
from tests.compression.family_cases import CASES as FAMILIES
from tests.compression.family_cases import save

IMPORTED = [
    case
    for case in CASES
    if case.error is None and ("PEFT" in case.trainer or "an adapter" in case.note)
]
LOW_RANK = CompressOptions("low-rank", Goal("bits", 4.0), calibration=AMOUNT)


def with_adapter(base: Path, adapter: Path) -> Any:
    """The base with an adapter, as PEFT loads both."""
    auto = auto_class(scan_folder(base).config["model_type"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = auto.from_pretrained(base, dtype=torch.float32)
        return PeftModel.from_pretrained(model, adapter).eval()


@pytest.mark.parametrize("case", IMPORTED, ids=names)
def test_an_imported_adapter_is_the_same_model_again(case: Case, tmp_path: Path) -> None:
    made, out = case.make(tmp_path), tmp_path / "a.delta"
    run(made, out)
    with Artifact(out) as artifact:
        records = artifact.records
    rows = {entry.name: entry.shape[0] for entry in scan_folder(made.base).tensors}
    longer = any(one["shape"][0] > rows.get(name, PADDED) for name, one in records.items())
    assert longer <= ("added tokens" in case.given)
    if longer:
        with pytest.raises(InvalidAdapter, match=r"added rows.*deltadock merge"):
            export_adapter(made.base, out, tmp_path / "again")
        assert not (tmp_path / "again").exists()
        return
    export_adapter(made.base, out, tmp_path / "again")
    expected = logits_of(made.model)[:, :TOKENIZED]
    again = logits_of(with_adapter(made.base, tmp_path / "again"))[:, :TOKENIZED]
    torch.testing.assert_close(again, expected, rtol=1e-4, atol=1e-5)
    # A delta once more, it is the same model still.
    merge(made.base, out, tmp_path / "first")
    run(Made(made.base, tmp_path / "again", method="lora"), tmp_path / "b.delta")
    merge(made.base, tmp_path / "b.delta", tmp_path / "second")
    first, second = (load_file(tmp_path / one / WEIGHTS) for one in ("first", "second"))
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        torch.testing.assert_close(second[name], tensor, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "family",
    ["gemma", "gpt2", "glm4", "qwen2-moe", "qwen3-moe", "mixtral", "gpt-oss", "deepseek-v3"],
)
def test_a_low_rank_delta_is_an_adapter(family: str, tmp_path: Path) -> None:
    """Of any family: matrices, norms, biases, tied and untied heads, and a mixture's experts."""
    model = save(FAMILIES[family], tmp_path / "base").float()
    moved(model).save_pretrained(tmp_path / "tuned")
    out = tmp_path / "a.delta"
    compress(tmp_path / "base", tmp_path / "tuned", out, LOW_RANK, calibration=None)
    export_adapter(tmp_path / "base", out, tmp_path / "adapter")
    merge(tmp_path / "base", out, tmp_path / "merged")
    auto = auto_class(model.config.model_type)
    expected = logits_of(auto.from_pretrained(tmp_path / "merged", dtype=torch.float32).eval())
    again = logits_of(with_adapter(tmp_path / "base", tmp_path / "adapter"))
    torch.testing.assert_close(again, expected, rtol=1e-4, atol=1e-5)
    assert (again - logits_of(model)).abs().max() > 1e-2


@pytest.mark.parametrize(
    ("folder", "named"),
    [("tiny-base", "tiny-base"), ("models--org--tiny-base/snapshots/0123abcd", "org/tiny-base")],
)
def test_an_adapter_names_its_base_without_the_folders_path(
    folder: str, named: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, out = tmp_path / folder, tmp_path / "a.delta"
    moved(save(FAMILIES["gpt2"], base).float()).save_pretrained(tmp_path / "tuned")
    compress(base, tmp_path / "tuned", out, LOW_RANK, calibration=None)
    monkeypatch.chdir(base)
    export_adapter(Path(), out, tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == named


def test_experts_whose_projections_have_factors_of_their_own(tmp_path: Path) -> None:
    """Adapters of transformers 4, where each expert's projections were layers."""
    model = save(FAMILIES["mixtral"], tmp_path / "base").float()
    stem, adapter = "base_model.model.model.layers.1.block_sparse_moe.experts", tmp_path / "tuned"
    tensors = {}
    for expert, piece in ((0, "w1"), (0, "w3"), (1, "w3"), (3, "w1"), (2, "w2")):
        h_out, h_in = (32, 48) if piece == "w2" else (48, 32)
        tensors[f"{stem}.{expert}.{piece}.lora_A.weight"] = 0.2 * torch.randn(3, h_in)
        tensors[f"{stem}.{expert}.{piece}.lora_B.weight"] = 0.2 * torch.randn(h_out, 3)
    adapter.mkdir()
    save_file(tensors, adapter / ADAPTER)
    settings = {"peft_type": "LORA", "r": 3, "lora_alpha": 6, "target_modules": ["w1", "w2", "w3"]}
    (adapter / "adapter_config.json").write_text(json.dumps(settings))
    run(Made(tmp_path / "base", adapter, method="lora"), tmp_path / "a.delta")
    merge(tmp_path / "base", tmp_path / "a.delta", tmp_path / "merged")
    export_adapter(tmp_path / "base", tmp_path / "a.delta", tmp_path / "again")
    merged = auto_class("mixtral").from_pretrained(tmp_path / "merged", dtype=torch.float32)
    again = logits_of(with_adapter(tmp_path / "base", tmp_path / "again"))
    torch.testing.assert_close(again, logits_of(merged.eval()), rtol=1e-4, atol=1e-5)
    assert (again - logits_of(model)).abs().max() > 1e-2


def test_what_no_adapter_can_hold_is_refused(tmp_path: Path) -> None:
    made, out = configured(rope_theta=50.0)(tmp_path), tmp_path / "a.delta"
    options = {
        "rope_parameters": LOW_RANK,
        "'rows'|'svd'": CompressOptions("adamix", Goal("bits", 2.0), calibration=AMOUNT),
    }
    for words, chosen in options.items():
        compress(made.base, made.tuned, out, chosen, calibration=None)
        with pytest.raises(InvalidAdapter, match=rf"({words}).*deltadock merge"):
            export_adapter(made.base, out, tmp_path / "adapter")
        made.tuned.joinpath("config.json").write_bytes(
            made.base.joinpath("config.json").read_bytes()
        )
    run(Made(made.base, made.tuned), out)
    with pytest.raises(InvalidAdapter, match="no low-rank products"):
        export_adapter(made.base, out, tmp_path / "adapter")
