"""A base from its checkpoint."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any, Final

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from transformers.utils import logging as transformers_logging

from deltadock.artifacts.checkpoint import CheckpointManifest
from deltadock.errors import InvalidCheckpoint, UnsupportedModel
from deltadock.inference.model.added_tokens import EMBEDDING
from deltadock.inference.model.attention import ATTENTION
from deltadock.inference.model.model import BaseModel
from deltadock.inference.model.routing import DEFAULT_LIMITS, DeltaLimits

FAMILIES: Final[dict[str, tuple[Any, Any]]] = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "mistral": (MistralConfig, MistralForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
}
"""What can be served: model_type to its config and model class."""


def _read_tensors(folder: Path, files: Iterable[str]) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for file in files:
        with safe_open(folder / file, framework="pt") as opened:
            tensors.update({name: opened.get_tensor(name) for name in opened.keys()})  # noqa: SIM118 (safe_open is no mapping)
    return tensors


def load_base(
    folder: Path,
    manifest: CheckpointManifest,
    device: torch.device,
    limits: DeltaLimits = DEFAULT_LIMITS,
) -> BaseModel:
    """Load a checkpoint folder's weights: float32 on the CPU, the checkpoint's dtype on a GPU.

    Nothing in the folder but the manifest's safetensors is opened, and no code that it names.

    Raises:
        UnsupportedModel: a family that is not served, or quantised weights.
        InvalidCheckpoint: tensors are missing, too many or misshapen.
    """
    settings = dict(manifest.config)
    family = settings.get("model_type")
    if family not in FAMILIES or "quantization_config" in settings:
        raise UnsupportedModel(
            f"A {family!r} checkpoint of this kind cannot be served; "
            f"unquantised {', '.join(FAMILIES)} can."
        )
    config_class, model_class = FAMILIES[family]
    tensors = _read_tensors(folder, sorted({tensor.file for tensor in manifest.tensors}))
    dtype = torch.float32 if device.type == "cpu" else tensors[EMBEDDING].dtype
    transformers_logging.disable_progress_bar()
    model, report = model_class.from_pretrained(
        None,
        config=config_class.from_dict(settings),
        state_dict=tensors,
        dtype=dtype,
        attn_implementation=ATTENTION,
        output_loading_info=True,
        ignore_mismatched_sizes=True,
    )
    faults = {kind: sorted(map(str, report[f"{kind}_keys"])) for kind in ("missing", "mismatched")}
    for kind, names in faults.items():
        if names:
            raise InvalidCheckpoint(f"The checkpoint has {kind} tensors: {', '.join(names[:3])}.")
    return BaseModel(model.to(device), limits)
