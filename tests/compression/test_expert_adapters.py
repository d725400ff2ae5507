"""PEFT adapters of parameters (`target_parameters`): the merged weights are PEFT's."""

import copy
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import GptOssConfig

from deltadock.artifacts.tensors import apply_delta
from deltadock.compression.adapters.encoding import encode_adapter
from deltadock.compression.checkpoints import CheckpointReader
from deltadock.errors import ArchitectureMismatch, InvalidAdapter, UnsupportedModel
from tests.compression.family_cases import CASES, LAYERS, SIZES, Case, save

GATE_UP, DOWN, BIAS = "experts.gate_up_proj", "experts.down_proj", "experts.gate_up_proj_bias"

SQUARE = Case(
    lambda: GptOssConfig(
        **{**SIZES, "intermediate_size": 32}, **LAYERS, head_dim=8, num_local_experts=4,
        num_experts_per_tok=2,
    )
)  # fmt: skip
"""As gpt-oss is published: the experts' down projections are square, so that no shape tells."""


def adapt(
    model: Any, folder: Path, parameters: list[str], *, name: str = "default", **settings: Any
) -> Any:
    """Save an adapter with random factors on `parameters`; the model with it."""
    settings = {"r": 3, "lora_alpha": 5, "target_modules": [], **settings}
    config = LoraConfig(task_type="CAUSAL_LM", target_parameters=parameters, **settings)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if isinstance(model, PeftModel):
            model.add_adapter(name, config)
        else:
            model = get_peft_model(model, config, adapter_name=name)
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                if f".{name}." in key:
                    parameter.copy_(0.1 * torch.randn_like(parameter))
        model.save_pretrained(folder, selected_adapters=[name])
    return model


def merged(model: Any, folder: Path, name: str = "default") -> dict[str, torch.Tensor]:
    """The checkpoint of the model with its adapter merged by PEFT."""
    plain = copy.deepcopy(model).merge_and_unload(adapter_names=[name])
    plain.save_pretrained(folder)
    return load_file(folder / "model.safetensors")


def check(base: Path, adapter: Path, expected: dict[str, torch.Tensor]) -> set[str]:
    """The base with the adapter has the expected tensors; the names of those that it changes."""
    reader = CheckpointReader(base)
    encoded = encode_adapter(reader, adapter)
    for name, tensor in expected.items():
        found = reader.tensor(name)
        if name in encoded:
            assert not torch.equal(found, tensor), name
            found = apply_delta(encoded[name], found)
        torch.testing.assert_close(found, tensor, rtol=1e-5, atol=1e-6)
    return {name.rpartition("mlp.")[2] for name in encoded}


@pytest.mark.parametrize("parameters", [[DOWN, GATE_UP], [DOWN], [GATE_UP]], ids="-".join)
@pytest.mark.parametrize("family", ["qwen3-moe", "mixtral", "deepseek-v3", "gpt-oss"])
def test_the_merged_experts_are_those_of_peft(
    family: str, parameters: list[str], tmp_path: Path
) -> None:
    model = save(CASES[family], tmp_path / "base").float()
    settings = {"rank_pattern": {DOWN: 2}, "alpha_pattern": {GATE_UP: 7}, "use_rslora": True}
    model = adapt(model, tmp_path / "adapter", parameters, **settings)
    check(tmp_path / "base", tmp_path / "adapter", merged(model, tmp_path / "merged"))


def test_square_experts_and_their_biases(tmp_path: Path) -> None:
    model = save(SQUARE, tmp_path / "base").float()
    model = adapt(model, tmp_path / "adapter", [DOWN, BIAS, GATE_UP, "router.weight"])
    names = check(tmp_path / "base", tmp_path / "adapter", merged(model, tmp_path / "merged"))
    assert names == {GATE_UP, DOWN, BIAS, "router.weight"}


def test_a_base_that_stores_stacked_experts(tmp_path: Path) -> None:
    model = save(CASES["qwen3-moe"], tmp_path / "base", save_original_format=False).float()
    assert "model.layers.1.mlp.experts.down_proj" in CheckpointReader(tmp_path / "base").entries
    model = adapt(model, tmp_path / "adapter", [GATE_UP, DOWN])
    plain = copy.deepcopy(model).merge_and_unload()
    check(tmp_path / "base", tmp_path / "adapter", dict(plain.state_dict()))


def test_each_of_several_adapters_of_one_module(tmp_path: Path) -> None:
    model = save(CASES["gpt-oss"], tmp_path / "base").float()
    for name, rank in (("one", 2), ("two", 3)):
        model = adapt(model, tmp_path, [GATE_UP, DOWN], name=name, r=rank)
    for name in ("one", "two"):
        expected = merged(model, tmp_path / f"merged-{name}", name)
        check(tmp_path / "base", tmp_path / name, expected)


def test_a_linear_layers_weight_as_a_parameter(tmp_path: Path) -> None:
    model = save(CASES["llama"], tmp_path / "base").float()
    model = adapt(model, tmp_path / "adapter", ["q_proj.weight"], rank_pattern={"q_proj.weight": 2})
    check(tmp_path / "base", tmp_path / "adapter", merged(model, tmp_path / "merged"))


def test_the_other_orientation_of_older_versions(tmp_path: Path) -> None:
    """They take stacked experts for (experts, h_in, h_out): A is as wide as these are high."""
    save(CASES["qwen3-moe"], tmp_path / "base", save_original_format=False)
    reader = CheckpointReader(tmp_path / "base")
    name = "model.layers.1.mlp.experts.down_proj"
    experts, h_out, h_in = reader.entries[name].shape
    a, b = torch.randn(2 * experts, h_out), torch.randn(h_in, 2 * experts)
    write(tmp_path / "adapter", {"": (a, b)}, target_parameters=[DOWN])
    made = encode_adapter(reader, tmp_path / "adapter")[name]
    ranks = torch.einsum(
        "ore,eri->eio", b.reshape(h_in, 2, experts).double(), a.reshape(experts, 2, h_out).double()
    )
    zero = torch.zeros(experts, h_out, h_in)
    torch.testing.assert_close(apply_delta(made, zero), ranks.float(), rtol=1e-5, atol=1e-6)


def write(folder: Path, pairs: dict[str, tuple[torch.Tensor, torch.Tensor]], **config: Any) -> None:
    """An adapter of the experts of layer 1, by the wrappers' suffixes."""
    folder.mkdir()
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, **config}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    prefix = "base_model.model.model.layers.1.mlp.experts"
    tensors = {
        f"{prefix}{wrapper}.lora_{side}.weight": factor.contiguous()
        for wrapper, pair in pairs.items()
        for side, factor in zip("AB", pair, strict=True)
    }
    save_file(tensors, folder / "adapter_model.safetensors")


@pytest.mark.parametrize(
    ("targets", "wrappers", "ranks", "words"),
    [
        ([GATE_UP, DOWN], [""], 8, "1 pair of factors.*: down_proj, gate_up_proj"),
        ([DOWN], ["", ".base_layer"], 8, "2 pairs of factors.*: down_proj"),
        ([], ["", ".base_layer"], 8, "2 pairs of factors.*: none"),
        ([DOWN], [""], 7, "7 ranks.*4 experts"),
        ([DOWN], [""], 12, "have 3 ranks.*says 2"),
    ],
)
def test_factors_that_do_not_fit_the_parameters(
    targets: list[str], wrappers: list[str], ranks: int, words: str, tmp_path: Path
) -> None:
    save(CASES["gpt-oss"], tmp_path / "base")
    pairs = {wrapper: (torch.ones(ranks, 48), torch.ones(32, ranks)) for wrapper in wrappers}
    write(tmp_path / "adapter", pairs, target_parameters=targets)
    with pytest.raises(InvalidAdapter, match=words):
        encode_adapter(CheckpointReader(tmp_path / "base"), tmp_path / "adapter")


@pytest.mark.parametrize("quantized", [False, True])
def test_experts_that_the_base_lacks(quantized: bool, tmp_path: Path) -> None:
    save(CASES["gpt-oss"], tmp_path / "base")
    if quantized:
        change: Callable[[str], str] = lambda name: name.replace("proj", "proj_scales")  # noqa: E731
        path = tmp_path / "base" / "model.safetensors"
        tensors = load_file(path)
        save_file(
            {change(n) if n.endswith("down_proj") else n: t for n, t in tensors.items()}, path
        )
    pair = torch.ones(8, 24), torch.ones(32, 8)
    write(tmp_path / "adapter", {"": pair}, target_parameters=[DOWN])
    error = UnsupportedModel if quantized else ArchitectureMismatch
    with pytest.raises(error, match="quantized.*Mxfp4Config" if quantized else "one of shape"):
        encode_adapter(CheckpointReader(tmp_path / "base"), tmp_path / "adapter")
