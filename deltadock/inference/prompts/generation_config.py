"""What a checkpoint's generation_config.json says where a request is silent."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

GENERATION_CONFIG: Final = "generation_config.json"


@dataclass(frozen=True, slots=True)
class SamplingDefaults:
    """Settings of a request that names none; the values here are OpenAI's."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0


def eos_ids(files: Mapping[str, str]) -> frozenset[int]:
    """The end-of-sequence ids: generation_config.json's, else config.json's, as in transformers."""
    for name in (GENERATION_CONFIG, "config.json"):
        eos = _read(files, name).get("eos_token_id")
        if eos is not None:
            return frozenset(eos if isinstance(eos, list) else [eos])
    return frozenset()


def sampling_defaults(files: Mapping[str, str]) -> SamplingDefaults:
    """The sampling that the model was published with; greedy if it says `do_sample: false`.

    A value out of its range counts as none. The repetition penalty applies to greedy answers too.
    """
    config = _read(files, GENERATION_CONFIG)
    repetition = _number(config, "repetition_penalty", 0.1, 10.0, 1.0)
    if config.get("do_sample") is False:
        return SamplingDefaults(temperature=0.0, repetition_penalty=repetition)
    return SamplingDefaults(
        temperature=_number(config, "temperature", 0.0, 2.0, 1.0),
        top_p=_number(config, "top_p", 1e-6, 1.0, 1.0),
        top_k=int(_number(config, "top_k", 0, 2**31, 0)),
        min_p=_number(config, "min_p", 0.0, 1.0, 0.0),
        repetition_penalty=repetition,
    )


def _read(files: Mapping[str, str], name: str) -> dict[str, Any]:
    parsed: dict[str, Any] = json.loads(files.get(name, "{}"))
    return parsed


def _number(config: Mapping[str, Any], name: str, least: float, most: float, other: float) -> float:
    value = config.get(name)
    if not isinstance(value, int | float) or isinstance(value, bool):
        return other
    return value if least <= value <= most else other
