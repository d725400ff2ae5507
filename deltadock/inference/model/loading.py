"""Load a base model from its checkpoint folder."""

import logging
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor
from transformers.utils import logging as transformers_logging

from deltadock.artifacts.checkpoint import CheckpointManifest
from deltadock.artifacts.names import find_name
from deltadock.errors import InvalidCheckpoint, UnsupportedModel
from deltadock.inference.model.added_tokens import EMBEDDING
from deltadock.inference.model.families import FAMILIES
from deltadock.inference.model.model import DeltaModel
from deltadock.inference.model.routing import DEFAULT_LIMITS, DeltaLimits
from deltadock.model_target import not_served

log = logging.getLogger(__name__)


def _read_tensors(folder: Path, files: Iterable[str]) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for file in files:
        with safe_open(folder / file, framework="pt") as opened:
            tensors.update({name: opened.get_tensor(name) for name in opened.keys()})  # noqa: SIM118 (safe_open is no mapping)
    return tensors


def serving_dtype(stored: torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype in which a checkpoint of dtype `stored` is served: float32 on the CPU, its own on a
    GPU, where the kernels take 16-bit floats: others are rounded to bfloat16."""
    if device.type == "cpu":
        return torch.float32
    return stored if stored in {torch.float16, torch.bfloat16} else torch.bfloat16


def check_servable(manifest: CheckpointManifest) -> None:
    """Check what the configuration tells before any weight is read.

    Raises:
        UnsupportedModel: the family cannot be served, the weights are quantized, tokens are
            attended to before they are generated, or windows are both set and switched off.
    """
    kind = manifest.config["model_type"]
    if (refusal := not_served(kind)) is not None:
        raise UnsupportedModel(refusal)
    if "quantization_config" in manifest.config:
        raise UnsupportedModel(
            "The weights are quantized, and nodes serve none such. Register the checkpoint before "
            "its quantization as the base."
        )
    if manifest.config.get("use_bidirectional_attention"):
        raise UnsupportedModel(
            "The model attends to later tokens too (`use_bidirectional_attention`), as those that "
            "embed texts do. Nodes serve models that generate."
        )
    kinds = manifest.config.get("layer_types")
    default = getattr(FAMILIES[kind].config_class, "use_sliding_window", None)
    switched_off = default is not None and not manifest.config.get("use_sliding_window", default)
    # Some of transformers' attention kernels follow the one, and some the other.
    if switched_off and isinstance(kinds, list) and "sliding_attention" in kinds:
        raise UnsupportedModel(
            "The configuration contradicts itself: `layer_types` has `sliding_attention`, and "
            "`use_sliding_window` is not true. Make it true, or all layers `full_attention`, as "
            "the model was trained."
        )


def load_base(
    folder: Path,
    manifest: CheckpointManifest,
    device: torch.device,
    limits: DeltaLimits = DEFAULT_LIMITS,
) -> DeltaModel:
    """Load a checkpoint folder's weights, in the dtype of `serving_dtype`.

    Only the safetensors files of the manifest are opened; no code of the checkpoint is run.

    Raises:
        UnsupportedModel: the family cannot be served, or the weights are quantized.
        InvalidCheckpoint: tensors are missing or have other shapes.
    """
    check_servable(manifest)
    settings = dict(manifest.config)
    family = FAMILIES[settings["model_type"]]
    tensors = _read_tensors(folder, sorted({tensor.file for tensor in manifest.tensors}))
    embedding = find_name(EMBEDDING, tensors, settings["model_type"])
    if embedding is None:
        raise InvalidCheckpoint(f"The checkpoint has no tensor {EMBEDDING!r}.")
    stored = tensors[embedding].dtype
    dtype = serving_dtype(stored, device)
    if dtype.itemsize < stored.itemsize:
        log.warning("The base's weights are %s and served as %s on a GPU", stored, dtype)
    transformers_logging.disable_progress_bar()
    model, report = family.model_class.from_pretrained(
        None,
        config=family.config_class.from_dict(settings),
        state_dict=tensors,
        dtype=dtype,
        output_loading_info=True,
        ignore_mismatched_sizes=True,
    )
    for problem in ("missing", "mismatched"):
        if names := sorted(map(str, report[f"{problem}_keys"])):
            raise InvalidCheckpoint(
                f"The checkpoint has {problem} tensors: {', '.join(names[:3])}."
            )
    return DeltaModel(model.to(device), limits)
