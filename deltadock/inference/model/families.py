"""The families that nodes serve: transformers' classes, and what their modules do not tell.

Most of what distinguishes a layer is read from its modules, by `decoder` and `rotary`: which norms
there are and where, whether heads are rotated, windows, activations and multipliers.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Final

from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GemmaConfig,
    GemmaForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MinistralConfig,
    MinistralForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Olmo2Config,
    Olmo2ForCausalLM,
    Olmo3Config,
    Olmo3ForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    SmolLM3Config,
    SmolLM3ForCausalLM,
)


@dataclass(frozen=True, slots=True)
class Family:
    """A family of causal language models.

    Attributes:
        config_class, model_class: transformers'.
        norm_offset: added to the weights of norms.
        float32_norms: norms multiply by their weights in float32; otherwise in the model's dtype,
            after rounding to it.
        float32_rotation: cosines and sines are float32.
        one_window: all layers have the configuration's `sliding_window`; otherwise each attention
            module has its own, or none.
        capped_scores: attention scores are capped by `attn_logit_softcapping`.
        capped_logits: logits are capped by `final_logit_softcapping`.
        scaled_logits: logits are divided by `logits_scaling`.
    """

    config_class: Any
    model_class: Any
    norm_offset: float = 0.0
    float32_norms: bool = False
    float32_rotation: bool = False
    one_window: bool = False
    capped_scores: bool = False
    capped_logits: bool = False
    scaled_logits: bool = False


FAMILIES: Final[Mapping[str, Family]] = MappingProxyType(
    {
        "llama": Family(LlamaConfig, LlamaForCausalLM),
        "mistral": Family(MistralConfig, MistralForCausalLM, one_window=True),
        "qwen2": Family(Qwen2Config, Qwen2ForCausalLM),
        "qwen3": Family(Qwen3Config, Qwen3ForCausalLM),
        "gemma": Family(GemmaConfig, GemmaForCausalLM, norm_offset=1.0, float32_norms=True),
        "gemma2": Family(
            Gemma2Config,
            Gemma2ForCausalLM,
            norm_offset=1.0,
            float32_norms=True,
            capped_scores=True,
            capped_logits=True,
        ),
        "gemma3_text": Family(
            Gemma3TextConfig,
            Gemma3ForCausalLM,
            norm_offset=1.0,
            float32_norms=True,
            capped_logits=True,
        ),
        "phi3": Family(Phi3Config, Phi3ForCausalLM, one_window=True),
        "smollm3": Family(SmolLM3Config, SmolLM3ForCausalLM),
        "granite": Family(GraniteConfig, GraniteForCausalLM, scaled_logits=True),
        "olmo2": Family(Olmo2Config, Olmo2ForCausalLM, float32_norms=True, float32_rotation=True),
        "olmo3": Family(Olmo3Config, Olmo3ForCausalLM, float32_norms=True, float32_rotation=True),
        "ministral": Family(MinistralConfig, MinistralForCausalLM),
    }
)
"""By `model_type`, as in `SERVED`."""
