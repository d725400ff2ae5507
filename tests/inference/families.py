"""Configurations of every family that nodes serve, with what is special of it."""

from collections.abc import Mapping
from typing import Any, Final

TWO_KINDS: Final = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 5}
CASES: Final[Mapping[str, tuple[str, dict[str, Any]]]] = {
    "llama": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "mistral": ("mistral", {"sliding_window": 5}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {"tie_word_embeddings": True}),
    "gemma": ("gemma", {"num_key_value_heads": 1, "head_dim": 16}),
    "gemma with biases": ("gemma", {"attention_bias": True, "hidden_act": "gelu"}),
    "gemma2": ("gemma2", {**TWO_KINDS, "query_pre_attn_scalar": 20}),
    "gemma2, caps that matter": (
        "gemma2",
        {**TWO_KINDS, "attn_logit_softcapping": 0.5, "final_logit_softcapping": 2.0},
    ),
    "gemma3_text": ("gemma3_text", {**TWO_KINDS, "query_pre_attn_scalar": 20}),
    "gemma3_text, capped and untied": (
        "gemma3_text",
        {
            **TWO_KINDS,
            "tie_word_embeddings": False,
            "final_logit_softcapping": 2.0,
            "attn_logit_softcapping": 0.5,  # which transformers ignores
            "rope_parameters": {
                "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
                "full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4},
            },
        },
    ),
    "phi3": ("phi3", {"sliding_window": 5, "partial_rotary_factor": 0.75}),
    "phi3, longrope": (
        "phi3",
        {
            "original_max_position_embeddings": 64,
            "partial_rotary_factor": 0.5,
            "rope_scaling": {
                "type": "longrope", "short_factor": [1.0, 1.5], "long_factor": [4.0, 8.0],
            },
        },
    ),
    "smollm3": (
        "smollm3",
        {
            "no_rope_layers": [1, 0],
            "use_sliding_window": True,
            "sliding_window": 5,
            "attention_bias": True,
        },
    ),
    "granite": (
        "granite",
        {
            "attention_multiplier": 0.2,
            "embedding_multiplier": 3.0,
            "residual_multiplier": 0.5,
            "logits_scaling": 4.0,
        },
    ),
    "olmo2": ("olmo2", {"rms_norm_eps": 1e-2}),
    "olmo3": (
        "olmo3",
        {
            **TWO_KINDS,
            "rope_parameters": {
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
                "full_attention": {
                    "rope_type": "yarn", "factor": 8.0, "rope_theta": 1e4,
                    "original_max_position_embeddings": 16,
                },
            },
        },
    ),
    "ministral": ("ministral", TWO_KINDS),
}  # fmt: skip
"""By what is special: `model_type`, and what its configuration has besides a tiny model's sizes."""
