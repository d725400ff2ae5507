"""The model families that are known to work, and how each is built.

A family is here because tests hold it, block by block, against plain `transformers`. Every other
is refused by name: its modelling code may carry state from block to block, or hold weights that
nothing here would look at.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

from deltadock.compression.model.experts import IMPLEMENTATION
from deltadock.errors import UnsupportedModel

MAX_BLOCKS: Final = 1024


@dataclass(frozen=True, slots=True)
class Family:
    """What sets a family apart.

    Attributes:
        renamed: pieces of the modules' parameter names, and what checkpoints call them instead.
        experts: what checkpoints call an expert's gate, up and down projections.
        vision: the language model is a part of one that sees; only that part is run here, and
            the vision tower and projector are kept exactly.
    """

    renamed: tuple[tuple[str, str], ...] = ()
    experts: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")
    vision: bool = False


_INNER_LANGUAGE_MODEL: Final = (
    ("model.language_model.", "language_model.model."),
    ("lm_head.", "language_model.lm_head."),
)

FAMILIES: Final[Mapping[str, Family]] = MappingProxyType(
    {
        "llama": Family(),
        "mistral": Family(),
        "qwen2": Family(),
        "qwen3": Family(),
        "gemma": Family(),
        "gemma2": Family(),
        "gemma3_text": Family(),
        "phi": Family(),
        "phi3": Family(),
        "gpt2": Family(),
        "mixtral": Family(renamed=((".mlp.", ".block_sparse_moe."),), experts=("w1", "w3", "w2")),
        "qwen2_moe": Family(),
        "qwen3_moe": Family(),
        "qwen2_5_vl": Family(renamed=(("model.language_model.", "model."),), vision=True),
        "llava": Family(renamed=_INNER_LANGUAGE_MODEL, vision=True),
        "gemma3": Family(renamed=_INNER_LANGUAGE_MODEL, vision=True),
    }
)


def read_config(folder: Path) -> Any:
    """The configuration of a checkpoint of a known family.

    Raises:
        UnsupportedModel: it cannot be read, is of another family, or its weights are quantized.
    """
    try:
        config = AutoConfig.from_pretrained(folder)
    except Exception as error:
        raise UnsupportedModel(
            f"transformers cannot read this config.json (is its model_type known?): {error}"
        ) from error
    if config.model_type not in FAMILIES:
        raise UnsupportedModel(
            f"Models of type {config.model_type!r} cannot be calibrated yet; known are "
            f"{', '.join(FAMILIES)}. The method 'exact' without a calibration text stores any "
            "model without loss."
        )
    check_not_quantized(config.to_dict())
    text = config.get_text_config(decoder=True)
    if FAMILIES[config.model_type].vision and text.model_type not in _TEXT_MODELS:
        raise UnsupportedModel(
            f"A {config.model_type!r} model around a {text.model_type!r} model cannot be "
            f"calibrated yet; known are {', '.join(_TEXT_MODELS)}."
        )
    blocks = getattr(text, "num_hidden_layers", None)
    if not isinstance(blocks, int) or not 0 < blocks <= MAX_BLOCKS:
        raise UnsupportedModel(f"config.json names no number of decoder blocks up to {MAX_BLOCKS}.")
    return config


_TEXT_MODELS: Final = ("llama", "mistral", "qwen2", "qwen2_5_vl_text", "gemma3_text")
"""Language models that are known to work within one that sees."""


def check_not_quantized(config: Mapping[str, Any]) -> None:
    """Refuse a checkpoint whose weights are stored as codes of some quantization.

    Args:
        config: the parsed config.json.

    Raises:
        UnsupportedModel: naming the quantization.
    """
    for part in (config, config.get("text_config")):
        if isinstance(part, Mapping) and (found := part.get("quantization_config")):
            method = found.get("quant_method") if isinstance(found, Mapping) else None
            raise UnsupportedModel(
                f"The weights are quantized ({method or 'of an unnamed kind'}), so that a "
                "difference of them means nothing. Take the original checkpoint, or load this one "
                "with transformers, call model.dequantize() and save it; base and fine-tune alike."
            )


def auto_class(model_type: str) -> Any:
    """The `transformers` class that builds and loads models of a type with their heads."""
    vision = model_type in FAMILIES and FAMILIES[model_type].vision
    return AutoModelForImageTextToText if vision else AutoModelForCausalLM


def build(config: Any, dtype: torch.dtype) -> Any:
    """The model on the meta device; buffers that no checkpoint holds are without values.

    Raises:
        UnsupportedModel: `transformers` cannot build it.
    """
    try:
        with torch.device("meta"):
            return auto_class(config.model_type).from_config(
                config, dtype=dtype, experts_implementation=IMPLEMENTATION
            )
    except Exception as error:
        # Whatever modelling code stumbles over in a config, the config is at fault.
        raise UnsupportedModel(
            f"transformers cannot build a language model from this config.json: {error}"
        ) from error


def restore_buffers(body: Any, device: torch.device) -> None:
    """Compute the buffers of `body` that no checkpoint holds, such as rotary frequencies.

    Raises:
        UnsupportedModel: one was not computed by the model's own initialisation.
    """
    for name, module in body.named_modules():
        own = dict(module.named_buffers(recurse=False))
        for key, buffer in own.items():
            fill = torch.nan if buffer.is_floating_point() else 0
            module.register_buffer(
                key,
                torch.full(buffer.shape, fill, dtype=buffer.dtype, device=device),
                persistent=False,
            )
        if own:
            body._init_weights(module)
        for key in own:
            value = getattr(module, key)
            if not value.is_floating_point() or value.isnan().any():
                raise UnsupportedModel(
                    f"The buffer {f'{name}.{key}'!r} of a {body.config.model_type!r} model cannot "
                    "be restored."
                )
