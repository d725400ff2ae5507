"""A small random model of every supported family, with its checkpoint."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import (
    ApertusConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    BloomConfig,
    CLIPVisionConfig,
    Cohere2Config,
    CohereConfig,
    DeepseekV3Config,
    Exaone4Config,
    FalconConfig,
    Gemma2Config,
    Gemma3Config,
    Gemma3TextConfig,
    GemmaConfig,
    Glm4Config,
    Glm4MoeConfig,
    GlmConfig,
    GPT2Config,
    GPTNeoXConfig,
    GptOssConfig,
    GraniteConfig,
    LlamaConfig,
    LlavaConfig,
    MinistralConfig,
    MistralConfig,
    MixtralConfig,
    NemotronConfig,
    Olmo2Config,
    Olmo3Config,
    OlmoConfig,
    OlmoeConfig,
    OPTConfig,
    Phi3Config,
    PhiConfig,
    PreTrainedConfig,
    Qwen2_5_VLConfig,
    Qwen2Config,
    Qwen2MoeConfig,
    Qwen3Config,
    Qwen3MoeConfig,
    SiglipVisionConfig,
    SmolLM3Config,
    StableLmConfig,
    Starcoder2Config,
)

from tests.compression.conftest import save_tokenizer

VOCABULARY = 256
ENDS: dict[str, Any] = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128, **ENDS,
}  # fmt: skip
MIXTURE: dict[str, Any] = {
    "moe_intermediate_size": 40, "num_experts": 4, "num_experts_per_tok": 2,
}  # fmt: skip
ROUTED: dict[str, Any] = {
    "moe_intermediate_size": 40, "n_routed_experts": 4, "num_experts_per_tok": 2,
    "n_shared_experts": 1, "first_k_dense_replace": 1, "n_group": 2, "topk_group": 1,
}  # fmt: skip
SIGHT: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "image_size": 28, "patch_size": 14,
}  # fmt: skip
# Sliding and full layers have different rotary bases; the window is shorter than the texts.
LAYERS: dict[str, Any] = {
    "sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"],
}  # fmt: skip


class Case(NamedTuple):
    """A family's configuration, and checkpoint names that differ from module names."""

    make: Callable[[], PreTrainedConfig]
    renamed: tuple[tuple[str, str], ...] = ()
    auto: Any = AutoModelForCausalLM


def _without(*keys: str) -> dict[str, Any]:
    """`SIZES` without those that a family spells otherwise."""
    return {key: value for key, value in SIZES.items() if key not in keys}


def _qwen2_5_vl() -> PreTrainedConfig:
    return Qwen2_5_VLConfig(
        text_config={
            **SIZES,
            "rope_parameters": {
                "rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]
            },
        },
        vision_config={
            "depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 4,
            "out_hidden_size": 32, "fullatt_block_indexes": [1],
        },
        image_token_id=1, video_token_id=2, vision_start_token_id=3, vision_end_token_id=4,
        tie_word_embeddings=True,
    )  # fmt: skip


CASES = {
    "llama": Case(lambda: LlamaConfig(**SIZES)),
    "llama-tied-biased": Case(
        lambda: LlamaConfig(
            **SIZES, tie_word_embeddings=True, attention_bias=True, mlp_bias=True
        )
    ),
    "mistral": Case(lambda: MistralConfig(**SIZES, sliding_window=8)),
    "qwen2": Case(lambda: Qwen2Config(**SIZES, tie_word_embeddings=True)),
    "qwen3": Case(lambda: Qwen3Config(**SIZES, head_dim=8)),
    "gemma": Case(lambda: GemmaConfig(**SIZES, head_dim=8)),
    "gemma2": Case(
        lambda: Gemma2Config(
            **SIZES, **LAYERS, head_dim=8, final_logit_softcapping=0.5, query_pre_attn_scalar=8
        )
    ),
    "gemma3": Case(lambda: Gemma3TextConfig(**SIZES, **LAYERS, head_dim=8)),
    "phi": Case(
        lambda: PhiConfig(
            **{**SIZES, "num_key_value_heads": 4}, partial_rotary_factor=0.5, qk_layernorm=True
        )
    ),
    "phi3": Case(lambda: Phi3Config(**SIZES)),
    "gpt2": Case(
        lambda: GPT2Config(
            vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=128,
            **ENDS,
        )
    ),
    "mixtral": Case(
        lambda: MixtralConfig(**SIZES, num_local_experts=4, num_experts_per_tok=2),
        ((".mlp.", ".block_sparse_moe."),),
    ),
    "qwen2-moe": Case(
        lambda: Qwen2MoeConfig(**SIZES, **MIXTURE, shared_expert_intermediate_size=48)
    ),
    "qwen3-moe": Case(
        lambda: Qwen3MoeConfig(**SIZES, **MIXTURE, head_dim=8, mlp_only_layers=[0])
    ),
    "smollm3": Case(
        lambda: SmolLM3Config(
            **SIZES, use_sliding_window=True, sliding_window=8, no_rope_layers=[1, 0],
        )
    ),
    "granite": Case(
        lambda: GraniteConfig(
            **SIZES, embedding_multiplier=3.0, residual_multiplier=0.5, attention_multiplier=0.3,
            logits_scaling=0.5, tie_word_embeddings=True,
        )
    ),
    "olmo2": Case(lambda: Olmo2Config(**SIZES)),
    "olmo3": Case(lambda: Olmo3Config(**SIZES, **LAYERS)),
    "gpt-neox": Case(
        lambda: GPTNeoXConfig(**_without("num_key_value_heads"), rotary_pct=0.5),
        (("lm_head.", "embed_out."),),
    ),
    "stablelm": Case(
        lambda: StableLmConfig(
            **SIZES, partial_rotary_factor=0.5, qk_layernorm=True, use_qkv_bias=True,
            use_parallel_residual=True,
        )
    ),
    "starcoder2": Case(lambda: Starcoder2Config(**SIZES, sliding_window=8)),
    "cohere": Case(lambda: CohereConfig(**SIZES, use_qk_norm=True, logit_scale=0.5)),
    "cohere2": Case(lambda: Cohere2Config(**SIZES, **LAYERS, logit_scale=0.5)),
    "glm": Case(lambda: GlmConfig(**SIZES, head_dim=8)),
    "glm4": Case(lambda: Glm4Config(**SIZES, head_dim=8)),
    "falcon": Case(
        lambda: FalconConfig(
            **_without("num_key_value_heads", "intermediate_size"), ffn_hidden_size=48,
            new_decoder_architecture=True, num_kv_heads=2,
        )
    ),
    "olmoe": Case(
        lambda: OlmoeConfig(**SIZES, num_experts=4, num_experts_per_tok=2, clip_qkv=0.5)
    ),
    "gpt-oss": Case(
        lambda: GptOssConfig(
            **SIZES, **LAYERS, head_dim=8, num_local_experts=4, num_experts_per_tok=2,
        )
    ),
    "glm4-moe": Case(
        lambda: Glm4MoeConfig(
            **SIZES, **ROUTED, head_dim=8, use_qk_norm=True, attention_bias=True,
        )
    ),
    "deepseek-v3": Case(
        lambda: DeepseekV3Config(
            **{**SIZES, "num_key_value_heads": 4}, **ROUTED, q_lora_rank=16, kv_lora_rank=16,
            qk_rope_head_dim=4, qk_nope_head_dim=8, v_head_dim=8,
        )
    ),
    "ministral": Case(lambda: MinistralConfig(**SIZES, **LAYERS, head_dim=8)),
    "opt": Case(
        lambda: OPTConfig(
            **_without("num_key_value_heads", "intermediate_size"), ffn_dim=48,
            do_layer_norm_before=False,
        )
    ),
    "bloom": Case(
        lambda: BloomConfig(
            vocab_size=VOCABULARY, hidden_size=32, n_layer=2, n_head=4, **ENDS,
            apply_residual_connection_post_layernorm=True,
        )
    ),
    "nemotron": Case(lambda: NemotronConfig(**SIZES, attention_bias=True, mlp_bias=True)),
    "exaone4": Case(lambda: Exaone4Config(**SIZES, **LAYERS)),
    "olmo": Case(lambda: OlmoConfig(**SIZES, clip_qkv=0.5)),
    "apertus": Case(lambda: ApertusConfig(**SIZES, attention_bias=True)),
    "qwen2.5-vl": Case(
        _qwen2_5_vl, (("model.language_model.", "model."),), AutoModelForImageTextToText
    ),
    "llava": Case(
        lambda: LlavaConfig(
            vision_config=CLIPVisionConfig(**SIGHT), text_config=LlamaConfig(**SIZES),
            image_token_index=5,
        ),
        (("model.language_model.", "language_model.model."),),
        AutoModelForImageTextToText,
    ),
    "gemma3-sight": Case(
        lambda: Gemma3Config(
            vision_config=SiglipVisionConfig(**SIGHT),
            text_config=Gemma3TextConfig(**SIZES, **LAYERS, head_dim=8),
            mm_tokens_per_image=1, image_token_index=5, boi_token_index=6, eoi_token_index=7,
        ),
        (("model.language_model.", "language_model.model."),),
        AutoModelForImageTextToText,
    ),
}  # fmt: skip

TOKENS = torch.randint(8, VOCABULARY, (5, 24), generator=torch.Generator().manual_seed(1))


def save(case: Case, folder: Path, *, scale: float = 0.0, **kwargs: Any) -> Any:
    """Save a random model plus noise of `scale`."""
    torch.manual_seed(0)
    model = case.auto.from_config(case.make()).float().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # Norms and biases start as ones and zeros, which would hide swapped tensors.
            if parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
            elif "lm_head" in name or "embed" in name:
                parameter.mul_(5)
        torch.manual_seed(1)
        for parameter in model.parameters():
            parameter.add_(scale * torch.randn_like(parameter))
    model.save_pretrained(folder, **kwargs)
    save_tokenizer(folder)
    return case.auto.from_pretrained(folder, dtype=torch.float32).eval()
