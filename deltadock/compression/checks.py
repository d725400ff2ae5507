"""What can be refused by configurations alone: before an upload, before a job.

Plain Python, for the api and the client.
"""

from collections.abc import Mapping
from typing import Any, Final

from deltadock.artifacts.checkpoint import ADAPTER_CONFIG, ADAPTER_TYPE
from deltadock.artifacts.compatibility import check_not_quantized
from deltadock.compression.families import check_family
from deltadock.compression.options import Goal, MethodInfo, check_kind
from deltadock.errors import InvalidAdapter

MERGE: Final = (
    "Merge it into its base with PEFT's merge_and_unload and compress the merged checkpoint."
)
"""What to do with an adapter that cannot be imported."""

UNSUPPORTED: Final = (
    "use_dora", "use_qalora", "lora_bias", "layer_replication",
    "alora_invocation_tokens", "megatron_config", "arrow_config", "use_bdlora", "velora_config",
    "monteclora_config", "kasa_config",
)  # fmt: skip
"""Features whose result is not the base's weight plus one product."""

CHANGED_BASES: Final = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Initializations that change the base's weights, so that the adapter does not fit the base."""


def check_adapter(config: Mapping[str, Any]) -> None:
    """Check that an adapter with this parsed adapter_config.json can be imported.

    Raises:
        InvalidAdapter: it is no LoRA adapter, or uses an unsupported feature.
    """
    if (kind := config.get("peft_type")) != "LORA":
        raise InvalidAdapter(
            f"{ADAPTER_CONFIG} is not that of a LoRA adapter (LORA): its peft_type is "
            f"{kind!r:.40}. If it changes weights, merge it into its base with PEFT's "
            "merge_and_unload and compress the merged checkpoint."
        )
    if used := [name for name in UNSUPPORTED if config.get(name)]:
        raise InvalidAdapter(f"The adapter uses {used[0]}, which cannot be imported. {MERGE}")
    start = str(config.get("init_lora_weights")).lower()
    if start.startswith(CHANGED_BASES):
        raise InvalidAdapter(
            f"The adapter was initialised with {start!r}, which changes the base's weights. Save "
            "it with path_initial_model_for_weight_conversion, or merge it into its base."
        )


def check_compressible(
    base: Mapping[str, Any],
    finetuned: Mapping[str, Any],
    method: MethodInfo,
    goal: Goal | None,
    *,
    has_text: bool,
) -> None:
    """Check that a method can compress a fine-tune or adapter, as far as configurations tell.

    Args:
        base, finetuned: the `config` of their manifests.
        method, goal: as of `goal_for`.
        has_text: whether a calibration text is given, which is run through the model.

    Raises:
        Conflict: as `check_kind`.
        InvalidAdapter: as `check_adapter`.
        UnsupportedModel: the model must be run and cannot be, or its weights are quantized.
    """
    check_kind(method, is_adapter=finetuned["model_type"] == ADAPTER_TYPE)
    if method.imports_adapter:
        check_adapter(finetuned)
    elif not method.is_lossless:
        check_not_quantized(base)
    if method.needs_calibration or has_text or (goal is not None and goal.is_bound):
        check_family(base)
