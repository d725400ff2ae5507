"""The model families that can be run block by block, as calibration and measurement do.

Tests compare every family, block by block, with plain `transformers`. All others are refused by
name: their modelling code may carry state from block to block, or have weights that are not
observed. Plain Python, so that the api and the client refuse them before an upload.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Final

from deltadock.compression.options import METHODS
from deltadock.errors import UnsupportedModel


@dataclass(frozen=True, slots=True)
class Family:
    """What distinguishes a family.

    Attributes:
        experts: names of an expert's gate, up and down projections in checkpoints.
        vision: the language model is part of a vision-language model; only that part is run here,
            and the vision tower and projector are stored exactly.
        tuples: a block returns a tuple, of which the model takes the first entry.
    """

    experts: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")
    vision: bool = False
    tuples: bool = False


CALIBRATED: Final[Mapping[str, Family]] = MappingProxyType(
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
        "mixtral": Family(experts=("w1", "w3", "w2")),
        "qwen2_moe": Family(),
        "qwen3_moe": Family(),
        "smollm3": Family(),
        "granite": Family(),
        "olmo2": Family(),
        "olmo3": Family(),
        "gpt_neox": Family(),
        "stablelm": Family(),
        "starcoder2": Family(),
        "cohere": Family(),
        "cohere2": Family(),
        "glm": Family(),
        "glm4": Family(),
        "falcon": Family(tuples=True),
        "olmoe": Family(),
        "gpt_oss": Family(),
        "glm4_moe": Family(),
        "deepseek_v3": Family(),
        "ministral": Family(),
        "opt": Family(),
        "bloom": Family(tuples=True),
        "nemotron": Family(),
        "exaone4": Family(),
        "olmo": Family(),
        "apertus": Family(),
        "qwen2_5_vl": Family(vision=True),
        "llava": Family(vision=True),
        "gemma3": Family(vision=True),
    }
)
"""Families whose models can be run here, and so calibrated."""

TEXT_MODELS: Final = ("llama", "mistral", "qwen2", "qwen2_5_vl_text", "gemma3_text")
"""Language models supported within a vision-language model."""


def check_family(config: Mapping[str, Any]) -> None:
    """Check that the model of a parsed config.json can be run.

    Raises:
        UnsupportedModel: it is of another family, a vision model around another language model, or
            projects its embedding to another width.
    """
    kind = config["model_type"]
    if kind not in CALIBRATED:
        blind = [
            method.name
            for method in METHODS.values()
            if not (method.needs_calibration or method.imports_adapter or method.is_lossless)
        ]
        raise UnsupportedModel(
            f"Models of type {kind!r} cannot be calibrated yet, nor measured; "
            "docs/compatibility.md lists those that can. Without a calibration text "
            f"{' and '.join(map(repr, blind))} compress any model, and 'exact' stores what changed "
            "as it is: where all weights changed, that saves nothing."
        )
    text = config.get("text_config")
    inner = text.get("model_type") if isinstance(text, Mapping) else None
    if CALIBRATED[kind].vision and inner is not None and inner not in TEXT_MODELS:
        raise UnsupportedModel(
            f"A {kind!r} model around a {inner!r} model cannot be calibrated yet; known are "
            f"{', '.join(TEXT_MODELS)}."
        )
    width, hidden = config.get("word_embed_proj_dim"), config.get("hidden_size")
    if None not in (width, hidden) and width != hidden:
        raise UnsupportedModel(
            f"A {kind!r} model whose embedding is projected to its hidden size ({width} to "
            f"{hidden}) cannot be calibrated yet."
        )
