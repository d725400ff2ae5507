"""The configuration of a PEFT adapter: what it asks for, and what cannot be imported."""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from deltadock.errors import InvalidAdapter

CONFIG: Final = "adapter_config.json"

UNSUPPORTED: Final = (
    "use_dora", "use_qalora", "lora_bias", "layer_replication", "target_parameters",
    "trainable_token_indices", "alora_invocation_tokens", "megatron_config", "arrow_config",
)  # fmt: skip
"""Features whose result is no sum of the base's weight and one product."""

CHANGED_BASES: Final = ("pissa", "olora", "corda", "loftq")
"""Initialisations that change the base's weights: the adapter is none of the base as it was."""

MAX_PATTERN: Final = 200
MAX_QUANTIFIERS: Final = 3


@dataclass(frozen=True, slots=True)
class LoraConfig:
    """What of adapter_config.json decides a layer's scaling."""

    rank: int
    alpha: float
    rank_stabilised: bool
    fan_in_fan_out: bool
    ranks: Mapping[str, float]
    alphas: Mapping[str, float]

    def scaling(self, module: str, rank: int) -> float:
        """Factor of the product `B @ A` of a layer whose factors have `rank` ranks.

        Raises:
            InvalidAdapter: the configuration says another rank.
        """
        expected = _of_pattern(self.ranks, module, self.rank)
        if rank != expected:
            raise InvalidAdapter(
                f"The adapter's factors of {module!r} have {rank} ranks, but {CONFIG} says "
                f"{expected}. Save the adapter again."
            )
        alpha = _of_pattern(self.alphas, module, self.alpha)
        return alpha / (math.sqrt(rank) if self.rank_stabilised else rank)


def read_config(folder: Path) -> LoraConfig:
    """Read adapter_config.json.

    Raises:
        InvalidAdapter: it is missing, not a LoRA adapter's, or asks for what cannot be imported.
    """
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InvalidAdapter(f"{folder.name} has no {CONFIG}; is it a PEFT adapter?") from error
    except (ValueError, RecursionError) as error:
        raise InvalidAdapter(f"{CONFIG} is not valid JSON.") from error
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        raise InvalidAdapter(f"{CONFIG} is not that of a LoRA adapter (peft_type LORA).")
    if used := [name for name in UNSUPPORTED if config.get(name)]:
        raise InvalidAdapter(
            f"The adapter uses {used[0]}, which cannot be imported. Merge it into its base with "
            "PEFT's merge_and_unload and compress the merged checkpoint."
        )
    start = str(config.get("init_lora_weights")).lower()
    if start.startswith(CHANGED_BASES):
        raise InvalidAdapter(
            f"The adapter was initialised with {start!r}, which changes the base's weights. Save "
            "it with path_initial_model_for_weight_conversion, or merge it into its base."
        )
    try:
        return LoraConfig(
            rank=_count(config["r"]),
            alpha=_finite(config["lora_alpha"]),
            rank_stabilised=bool(config.get("use_rslora")),
            fan_in_fan_out=bool(config.get("fan_in_fan_out")),
            ranks={k: _count(v) for k, v in (config.get("rank_pattern") or {}).items()},
            alphas={k: _finite(v) for k, v in (config.get("alpha_pattern") or {}).items()},
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InvalidAdapter(f"{CONFIG} lacks r or lora_alpha, or has them wrong.") from error


def _count(value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError("not a positive whole number")
    return value


def _finite(value: str | float) -> float:
    number = float(value)
    if not math.isfinite(number):
        raise ValueError("not a finite number")
    return number


def _of_pattern(patterns: Mapping[str, float], module: str, default: float) -> float:
    """The value of the first pattern that matches the end of a module's name, as PEFT has it.

    Raises:
        InvalidAdapter: a pattern is not a regular expression, or one that could take for ever.
    """
    for pattern, value in patterns.items():
        quantifiers = len(re.findall(r"[*+?{]", pattern))
        if (
            len(pattern) > MAX_PATTERN
            or quantifiers > MAX_QUANTIFIERS
            or re.search(r"\)[*+?{]", pattern)
        ):
            raise InvalidAdapter(f"The pattern {pattern!r:.80} in {CONFIG} is too intricate.")
        try:
            if re.match(rf"(?:.*\.)?(?:{pattern})$", module):
                return value
        except re.error as error:
            raise InvalidAdapter(f"The pattern {pattern!r} in {CONFIG} is invalid.") from error
    return default
