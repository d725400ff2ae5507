"""The settings of a PEFT adapter that decide what its factors mean."""

import json
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import regex

from deltadock.artifacts.checkpoint import ADAPTER_CONFIG
from deltadock.compression.checks import check_adapter
from deltadock.errors import InvalidAdapter

MAX_PATTERN: Final = 1000
PATTERN_SECONDS: Final = 2.0
"""Time for matching all patterns of an adapter: a hostile one could backtrack without end."""


class _Patterns:
    """The value of the first pattern that matches the end of a module's name, as in PEFT."""

    def __init__(self, patterns: Mapping[str, float]) -> None:
        self._patterns = patterns
        self._seconds = PATTERN_SECONDS

    def value(self, module: str, default: float) -> float:
        """The value for `module`.

        Raises:
            InvalidAdapter: a pattern is no regular expression, or takes too long.
        """
        for pattern, value in self._patterns.items():
            if self._matches(pattern, module):
                return value
        return default

    def _matches(self, pattern: str, module: str) -> bool:
        started = time.monotonic()
        try:
            if len(pattern) > MAX_PATTERN:
                raise TimeoutError
            expression = rf"(?:.*\.)?(?:{pattern})$"
            return bool(regex.match(expression, module, timeout=max(self._seconds, 1e-3)))
        except TimeoutError as error:
            raise InvalidAdapter(
                f"The pattern {pattern!r:.80} in {ADAPTER_CONFIG} is too intricate. Write the "
                "modules' names instead."
            ) from error
        except regex.error as error:
            raise InvalidAdapter(
                f"The pattern {pattern!r:.80} in {ADAPTER_CONFIG} is invalid."
            ) from error
        finally:
            self._seconds -= time.monotonic() - started


@dataclass(frozen=True, slots=True)
class LoraConfig:
    """The settings of adapter_config.json that decide what the factors change, and their scaling.

    Attributes:
        target_parameters: ends of the names of parameters that have factors of their own.
        tokens: rows that are trained on their own (`trainable_token_indices`), by ends of the
            names of their embeddings and heads.
        base: what the base was loaded from, a folder or a name on the Hub; "": not said.
    """

    rank: int
    alpha: float
    rank_stabilized: bool
    fan_in_fan_out: bool
    ranks: _Patterns
    alphas: _Patterns
    target_parameters: tuple[str, ...]
    tokens: Mapping[str, tuple[int, ...]]
    base: str

    def targets(self, parameter: str) -> bool:
        """Whether a parameter, by its full name, is one of `target_parameters`."""
        return any(f".{parameter}".endswith(f".{end}") for end in self.target_parameters)

    def tokens_of(self, module: str) -> tuple[int, ...]:
        """The rows of an embedding or head that are trained on their own."""
        return next((rows for end, rows in self.tokens.items() if module.endswith(end)), ())

    def scaling(self, module: str, rank: int) -> float:
        """Scaling of the product `B @ A` of a layer or parameter whose factors have `rank` ranks.

        Raises:
            InvalidAdapter: the configuration names another rank.
        """
        expected = self.ranks.value(module, self.rank)
        if rank != expected:
            raise InvalidAdapter(
                f"The adapter's factors of {module!r} have {rank} ranks, but {ADAPTER_CONFIG} says "
                f"{expected}. Save the adapter again."
            )
        alpha = self.alphas.value(module, self.alpha)
        return alpha / (math.sqrt(rank) if self.rank_stabilized else rank)


def read_config(folder: Path) -> LoraConfig:
    """Read adapter_config.json.

    Raises:
        InvalidAdapter: it is missing, not a LoRA adapter's, or uses an unsupported feature.
    """
    try:
        config = json.loads((folder / ADAPTER_CONFIG).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InvalidAdapter(
            f"{folder.name} has no {ADAPTER_CONFIG}; is it a PEFT adapter?"
        ) from error
    except (ValueError, RecursionError) as error:
        raise InvalidAdapter(f"{ADAPTER_CONFIG} is not valid JSON.") from error
    if not isinstance(config, dict):
        raise InvalidAdapter(f"{ADAPTER_CONFIG} is not a JSON object.")
    check_adapter(config)
    try:
        return LoraConfig(
            rank=_count(config["r"]),
            alpha=_finite(config["lora_alpha"]),
            rank_stabilized=bool(config.get("use_rslora")),
            fan_in_fan_out=bool(config.get("fan_in_fan_out")),
            ranks=_Patterns({k: _count(v) for k, v in (config.get("rank_pattern") or {}).items()}),
            alphas=_Patterns(
                {k: _finite(v) for k, v in (config.get("alpha_pattern") or {}).items()}
            ),
            target_parameters=_names(config.get("target_parameters") or []),
            tokens=_tokens(config.get("trainable_token_indices") or {}),
            base=str(config.get("base_model_name_or_path") or ""),
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InvalidAdapter(
            f"{ADAPTER_CONFIG} lacks r or lora_alpha, or has them or another setting wrong."
        ) from error


def _count(value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError("not a positive whole number")
    return value


def _names(value: object) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(one, str) for one in value):
        raise TypeError("not a list of names")
    return tuple(value)


def _tokens(value: object) -> dict[str, tuple[int, ...]]:
    """Token ids by the ends of modules' names; a list is of the one embedding."""
    found: dict[Any, Any] = value if isinstance(value, dict) else {"": value}
    for rows in found.values():
        if not isinstance(rows, list) or len(set(rows)) < len(rows):
            raise TypeError("not a list of distinct ids")
        if not all(type(row) is int and row >= 0 for row in rows):
            raise ValueError("not an id")
    return {str(end): tuple(rows) for end, rows in found.items()}


def _finite(value: str | float) -> float:
    number = float(value)
    if not math.isfinite(number):
        raise ValueError("not a finite number")
    return number


def model_name(folder: Path) -> str:
    """The name of a checkpoint's folder; of one in the Hub's cache, the model's, with its owner."""
    folder = folder.resolve()
    if folder.parent.name == "snapshots":
        return folder.parents[1].name.removeprefix("models--").replace("--", "/", 1)
    return folder.name
