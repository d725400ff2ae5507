"""What refusals of quantized weights say to do gives a base that is taken."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    FineGrainedFP8Config,
    GptOssConfig,
    LlamaConfig,
    Mxfp4Config,
)

from deltadock.errors import UnsupportedModel
from tests.compatibility.cases import Made, Tensors, moved, quantize_experts, rewrite
from tests.compatibility.test_families import check
from tests.compression.family_cases import LAYERS, SIZES, Case, save

ROUND: dict[str, Any] = {"hidden_size": 128, "intermediate_size": 128}
"""Whole blocks of FP8 and MXFP4."""


def mxfp4(folder: Path) -> Any:
    case = Case(
        lambda: GptOssConfig(
            **{**SIZES, **ROUND}, **LAYERS, num_local_experts=4, num_experts_per_tok=2
        )
    )
    save(case, folder)
    quantize_experts(folder)
    return Mxfp4Config(dequantize=True)


def fp8(folder: Path) -> Any:
    save(Case(lambda: LlamaConfig(**{**SIZES, **ROUND, "num_key_value_heads": 4})), folder)

    def change(tensors: Tensors) -> Tensors:
        made = dict(tensors)
        for name in [name for name in tensors if "proj" in name]:
            made[name] = (100 * tensors[name]).to(torch.float8_e4m3fn)
            made[f"{name}_scale_inv"] = torch.full((1, 1), 0.01)
        return made

    rewrite(folder, change)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    (folder / "config.json").write_text(json.dumps(config))
    return FineGrainedFP8Config(dequantize=True)


@pytest.mark.parametrize("quantize", [mxfp4, fp8])
def test_a_dequantized_base_is_taken(quantize: Any, tmp_path: Path) -> None:
    settings = quantize(tmp_path / "published")
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path / "published", quantization_config=settings, dtype=torch.float32
    ).eval()
    tuned = moved(model)
    for name, one in (("base", model), ("tuned", tuned)):
        one.save_pretrained(tmp_path / name, save_original_format=False)
    with pytest.raises(UnsupportedModel, match=r"dequantize=True.*save_original_format=False"):
        check(Made(tmp_path / "published", tmp_path / "tuned", tuned), tmp_path)
    check(Made(tmp_path / "base", tmp_path / "tuned", tuned), tmp_path)
