"""The block-by-block forward pass and its moments against plain `transformers`."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

from compression.calibration import MomentCollector
from compression.forward import BlockwiseModel
from compression.weights import Checkpoint

SIZES: dict[str, Any] = {
    "vocab_size": 200, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
}  # fmt: skip


@pytest.mark.parametrize(
    "config",
    [
        LlamaConfig(**SIZES),
        MistralConfig(**SIZES, sliding_window=8),
        Qwen2Config(**SIZES, tie_word_embeddings=True),
        Qwen3Config(**SIZES, head_dim=8),
    ],
    ids=lambda config: str(config.model_type),
)
def test_blocks_equal_the_whole_model(config: PreTrainedConfig, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).float().eval()
    model.save_pretrained(tmp_path)
    tokens = torch.randint(0, 200, (5, 20))
    gram: dict[str, Tensor] = {}

    def hook(name: str) -> Any:
        def add(_module: Any, args: tuple[Tensor, ...]) -> None:
            rows = args[0].reshape(-1, args[0].shape[-1]).double()
            gram[name] = gram.get(name, torch.zeros(())) + rows.T @ rows

        return add

    for name, module in model.model.named_modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(hook(f"model.{name}.weight"))
    with torch.inference_mode():
        expected = model(tokens).logits

    blockwise, source = BlockwiseModel(tmp_path), Checkpoint(tmp_path)
    hidden, moments = blockwise.embed(tokens, source), MomentCollector()
    for index in range(len(blockwise.blocks)):
        hidden = blockwise.run_block(index, hidden, source, moments)
    logits = torch.cat(list(blockwise.logits(blockwise.final_hidden(hidden, source), source)))
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)

    names = [name for block in blockwise.blocks for name in blockwise.linears[block]]
    assert set(names) == gram.keys()
    for name in names:
        torch.testing.assert_close(moments.moment(name), gram[name], rtol=1e-4, atol=1e-4)


def test_layers_with_one_input_share_a_moment(tmp_path: Path) -> None:
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(LlamaConfig(**SIZES)).save_pretrained(tmp_path)
    model, source, moments = BlockwiseModel(tmp_path), Checkpoint(tmp_path), MomentCollector()
    hidden = model.embed(torch.randint(0, 200, (2, 10)), source)
    model.run_block(0, hidden, source, moments)
    attention, mlp = "model.layers.0.self_attn", "model.layers.0.mlp"
    shared = moments.moment(f"{attention}.q_proj.weight")
    assert moments.moment(f"{attention}.v_proj.weight") is shared
    assert moments.moment(f"{mlp}.gate_proj.weight") is moments.moment(f"{mlp}.up_proj.weight")
    assert moments.moment(f"{attention}.o_proj.weight") is not shared


def test_weights_do_not_stay(tmp_path: Path) -> None:
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(LlamaConfig(**SIZES)).save_pretrained(tmp_path)
    model, source = BlockwiseModel(tmp_path), Checkpoint(tmp_path)
    hidden = model.embed(torch.randint(0, 200, (2, 10)), source)
    model.run_block(1, hidden, source)
    assert all(parameter.is_meta for parameter in model._model.parameters())
