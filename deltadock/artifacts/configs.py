"""What `transformers` makes of a config.json: how two of them use the same weights."""

import copy
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

from transformers import CONFIG_MAPPING

from deltadock.errors import ArchitectureMismatch, UnsupportedModel

UNUSED_KEYS: Final = frozenset(
    {
        "_name_or_path", "_sliding_window_pattern", "architectures", "auto_map", "bos_token_id",
        "chunk_size_feed_forward", "dtype", "eos_token_id", "head_dim", "id2label",
        "initializer_range", "is_encoder_decoder", "label2id", "max_position_embeddings",
        "max_window_layers", "n_positions", "output_attentions", "output_hidden_states",
        "output_router_logits", "pad_token_id", "pretraining_tp", "problem_type",
        "original_max_position_embeddings", "quantization_config", "return_dict",
        "rope_parameters", "router_aux_loss_coef", "router_jitter_noise", "sliding_window",
        "tie_word_embeddings", "torch_dtype", "transformers_version", "use_cache",
        "use_sliding_window", "vocab_size",
    }
)  # fmt: skip
"""Keys that change no forward pass, and those that `_settings` or `match_tensors` compares."""

TRAINING_KEYS: Final = ("dropout", "layerdrop", "_pdrop", "summary_")
"""Parts of the names of keys that are read in training only."""

EPSILONS: Final = (
    "rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "norm_epsilon", "norm_eps",
)  # fmt: skip

ROPE: Final = "rope_parameters"
ROTATED: Final = "partial_rotary_factor"

LENGTH_DEPENDENT: Final = ("dynamic", "longrope")
"""Types of rotary embeddings whose frequencies depend on the sequence's length."""

MAX_LAYERS: Final = 4096
LAYER_COUNT: Final = re.compile(r"layers?$|^depth$")
"""Keys that may be a number of layers."""


@dataclass(frozen=True, slots=True)
class Difference:
    """A setting of the forward pass that differs between a base and a fine-tune."""

    key: str
    base: Any
    finetuned: Any

    @property
    def per_delta(self) -> bool:
        """Whether a delta may have a value of its own: rotary embeddings and norms' epsilons.

        Of a vision model, only its language model's.
        """
        owner, _, name = self.key.rpartition(".")
        return owner in {"", "text_config"} and name in {ROPE, *EPSILONS}


def expand(config: Mapping[str, Any]) -> Any:
    """The `transformers` configuration of a parsed config.json, defaults filled in.

    Raises:
        UnsupportedModel: it is of an unknown type, or cannot be read.
    """
    kind = config.get("model_type")
    if kind not in CONFIG_MAPPING:
        raise UnsupportedModel(f"transformers knows no model of the type {kind!r:.80}.")
    for part in (config, *(value for value in config.values() if isinstance(value, dict))):
        counts = [value for key, value in part.items() if LAYER_COUNT.search(str(key))]
        if any(isinstance(count, int) and count > MAX_LAYERS for count in counts):
            raise UnsupportedModel(f"config.json names more than {MAX_LAYERS} layers.")
    try:
        return CONFIG_MAPPING[kind].from_dict(copy.deepcopy(dict(config)))
    except Exception as error:  # any error of the configuration's code is caused by the file
        raise UnsupportedModel(f"transformers cannot read this config.json: {error}") from error


def differences(base: Mapping[str, Any], finetuned: Mapping[str, Any]) -> list[Difference]:
    """The settings by which two parsed config.json files use the same weights differently.

    Defaults are filled in and old spellings translated, as `transformers` does. Sizes of the
    vocabulary and tied heads are not compared; tensors tell them. Types that `transformers` does
    not know are compared as they are spelled.

    Raises:
        UnsupportedModel: one of them cannot be read.
    """
    if base == finetuned:
        return []
    if base.get("model_type") not in CONFIG_MAPPING:
        before, after = dict(_plain(base)), dict(_plain(finetuned))
    else:
        before, after = dict(_settings(expand(base))), dict(_settings(expand(finetuned)))
    return [
        Difference(key, before.get(key), after.get(key))
        for key in sorted(before.keys() | after.keys())
        if (before.get(key) or None) != (after.get(key) or None)
    ]


def check_same_forward(base: Mapping[str, Any], finetuned: Mapping[str, Any]) -> list[Difference]:
    """The settings that a delta has for itself: rotary embeddings and norms' epsilons.

    Args:
        base, finetuned: the parsed config.json files.

    Raises:
        ArchitectureMismatch: another setting differs; the message names it.
        UnsupportedModel: one of the files cannot be read.
    """
    found = differences(base, finetuned)
    for one in found:
        if not one.per_delta:
            raise ArchitectureMismatch(
                f"config.json means {one.key} = {one.finetuned!r:.100} for the fine-tune, "
                f"but {one.base!r:.100} for the base. A delta can change weights, rotary "
                "embeddings and norms' epsilons only. Train and save the fine-tune with the "
                "base's value."
            )
    return found


def _is_unused(key: str) -> bool:
    return key in UNUSED_KEYS or any(part in key for part in TRAINING_KEYS)


def _plain(config: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Settings of a configuration of an unknown type."""
    for key, value in config.items():
        if not _is_unused(key) and not (key == "rope_scaling" and _is_default_rope(value)):
            yield key, value


def _is_default_rope(value: Any) -> bool:
    return isinstance(value, dict) and "default" in (value.get("rope_type"), value.get("type"))


def _settings(config: Any, within: str = "") -> Iterator[tuple[str, Any]]:
    """Everything about a forward pass that is not a weight, by key.

    Keys that the configuration's class does not know are read by no modelling code.
    """
    known, whole = _known_keys(config), config.to_dict()
    for key in sorted(known):
        if key in config.sub_configs:
            part = getattr(config, key)
            if part is not None:
                yield from _settings(part, f"{within}{key}.")
        elif not _is_unused(key):
            yield within + key, whole.get(key)
    heads, width = whole.get("num_attention_heads"), whole.get("hidden_size")
    shared = width // heads if isinstance(width, int) and isinstance(heads, int) and heads else None
    yield f"{within}head_dim", whole.get("head_dim") or shared
    kinds = whole.get("layer_types")
    if "sliding_window" in known and (kinds is None or "sliding_attention" in kinds):
        window, limit = whole.get("sliding_window"), whole.get("max_position_embeddings")
        # A window as long as the context hides nothing.
        unlimited = window is None or (limit is not None and window >= limit)
        yield f"{within}sliding_window", None if unlimited else window
    if whole.get(ROPE):
        parameters = config.rope_parameters
        nested = {key: value for key, value in parameters.items() if isinstance(value, dict)}
        parts = nested or {"": parameters}
        rope = {key: _rope_of(config, part) for key, part in parts.items()}
        yield f"{within}{ROPE}", rope if nested else rope[""]
        yield (
            f"{within}{ROTATED}",
            {
                key: part.get(ROTATED)
                for key, part in parts.items()
                if ROTATED not in rope[key] and part.get(ROTATED) not in (None, 1)
            },
        )


def _known_keys(config: Any) -> Collection[str]:
    """The keys that the configuration's class knows; all of them if it cannot be made without."""
    try:
        defaults = type(config)()
    except Exception:  # noqa: BLE001 (some classes need a part)
        defaults = config
    keys: Collection[str] = defaults.to_dict().keys()
    return keys


def _rope_of(config: Any, parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Rotary parameters without those that do nothing, and without the fraction of the head that
    they rotate, which a model's layers are built for."""
    kind = parameters.get("rope_type", "default")
    found = {key: value for key, value in parameters.items() if value is not None and key != "type"}
    if kind == "default":
        kept = ("rope_type", "rope_theta", "mrope_section")
        found = {key: found[key] for key in kept if key in found}
    elif kind in LENGTH_DEPENDENT or "factor" not in found:  # it follows from the length
        found["max_position_embeddings"] = getattr(config, "max_position_embeddings", None)
    if kind != "proportional":  # which pads the frequencies
        found.pop(ROTATED, None)
    return found
