"""The block-by-block forward pass and its moments against plain `transformers`."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    FalconConfig,
    GPTNeoXConfig,
    LlamaConfig,
    OPTConfig,
    Phi3Config,
    PreTrainedConfig,
    Qwen2Config,
    StableLmConfig,
)

from deltadock.compression.checkpoints import CheckpointReader, tensor_names
from deltadock.compression.model.families import read_config
from deltadock.compression.model.forward import BlockwiseModel
from deltadock.compression.model.skeleton import Skeleton
from deltadock.compression.statistics import MomentCollector
from tests.compression.family_cases import CASES, Case

SIZES: dict[str, Any] = {
    "vocab_size": 200, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
}  # fmt: skip


WHOLE_HEADS = {key: value for key, value in SIZES.items() if key != "num_key_value_heads"}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
LLAMA3 = {
    "rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}  # fmt: skip
LONG = {
    "rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0, 3.0, 4.0, 5.0],
    "original_max_position_embeddings": 16,
}  # fmt: skip


@pytest.mark.parametrize("length", [12, 40])
@pytest.mark.parametrize(
    "config",
    [
        LlamaConfig(**SIZES, rope_parameters={**LLAMA3, "rope_theta": 1e4}),
        Qwen2Config(**SIZES, rope_parameters={**YARN, "rope_theta": 1e4}),
        Phi3Config(
            **SIZES, rope_parameters={**LONG, "rope_theta": 1e4}, pad_token_id=0,
            original_max_position_embeddings=16,
        ),
        Qwen2Config(**SIZES, use_sliding_window=True, sliding_window=8, max_window_layers=1),
        GPTNeoXConfig(**WHOLE_HEADS, use_parallel_residual=False, attention_bias=False),
        FalconConfig(**WHOLE_HEADS, multi_query=True, bias=True),
        FalconConfig(**WHOLE_HEADS, multi_query=False, parallel_attn=False, alibi=True),
        StableLmConfig(**SIZES),
        OPTConfig(**WHOLE_HEADS, ffn_dim=48, do_layer_norm_before=True),
    ],
    ids=[
        "llama3", "yarn", "longrope", "windows", "neox-sequential", "falcon-multi-query",
        "falcon-alibi", "stablelm-sequential", "opt-norms-before",
    ],
)  # fmt: skip
def test_blocks_equal_the_whole_model(
    config: PreTrainedConfig, length: int, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    whole = AutoModelForCausalLM.from_config(config).float().eval()
    with torch.no_grad():
        for parameter in whole.parameters():
            parameter.mul_(3)
    whole.save_pretrained(tmp_path)
    # Loaded again: a model may keep the rotary frequencies of its last input length.
    whole = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    tokens = torch.randint(0, 200, (3, length))
    with torch.inference_mode():
        expected = whole(tokens).logits.flatten(0, 1)
    model, source = BlockwiseModel(tmp_path), CheckpointReader(tmp_path)
    hidden = model.embed(tokens, source)
    for index in range(len(model.blocks)):
        hidden = model.run_block(index, hidden, source)
    final = model.final_hidden(hidden, source).flatten(0, 1)
    logits = torch.cat(list(model.logits(final, source)))
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_buffers_equal_plain_transformers(case: Case, dtype: torch.dtype, tmp_path: Path) -> None:
    """Rotary frequencies stay in float32 when the model computes in bfloat16."""
    case.auto.from_config(case.make()).save_pretrained(tmp_path)
    plain = case.auto.from_pretrained(tmp_path, dtype=dtype).get_decoder()
    skeleton = Skeleton(read_config(tmp_path), tensor_names(tmp_path), torch.device("cpu"), dtype)
    stored = plain.state_dict().keys()
    expected, found = (
        {name: buffer for name, buffer in body.named_buffers() if name not in stored}
        for body in (plain, skeleton.module(skeleton.body))
    )
    assert found.keys() == expected.keys()
    for name, buffer in found.items():
        assert buffer.dtype == expected[name].dtype, name
        assert torch.equal(buffer, expected[name]), name


def test_layers_with_equal_inputs_share_a_moment(tmp_path: Path) -> None:
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(LlamaConfig(**SIZES)).save_pretrained(tmp_path)
    model, source, moments = BlockwiseModel(tmp_path), CheckpointReader(tmp_path), MomentCollector()
    hidden = model.embed(torch.randint(0, 200, (2, 10)), source)
    model.run_block(0, hidden, source, moments)
    attention, mlp = "model.layers.0.self_attn", "model.layers.0.mlp"
    shared = moments.moment(f"{attention}.q_proj.weight")
    assert moments.moment(f"{attention}.v_proj.weight") is shared
    assert moments.moment(f"{mlp}.gate_proj.weight") is moments.moment(f"{mlp}.up_proj.weight")
    assert moments.moment(f"{attention}.o_proj.weight") is not shared


def test_weights_are_released_after_a_block(tmp_path: Path) -> None:
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(LlamaConfig(**SIZES)).save_pretrained(tmp_path)
    model, source = BlockwiseModel(tmp_path), CheckpointReader(tmp_path)
    hidden = model.embed(torch.randint(0, 200, (2, 10)), source)
    model.run_block(1, hidden, source)
    assert all(parameter.is_meta for parameter in model._skeleton._model.parameters())
