"""How models of the calibrated families are built, and how checkpoints store their parameters."""

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from deltadock.artifacts.compatibility import check_not_quantized
from deltadock.artifacts.names import RENAMED
from deltadock.compression.checkpoints import TensorSource
from deltadock.compression.families import CALIBRATED, Family, check_family
from deltadock.errors import UnsupportedModel

MAX_BLOCKS: Final = 1024

IMPLEMENTATION: Final = "deltadock"
"""Name of `run_experts` in `transformers`' registry of expert implementations."""


def read_config(folder: Path) -> Any:
    """Load the configuration of a checkpoint of a supported family.

    Raises:
        UnsupportedModel: it cannot be read, is of another family, or its weights are quantized.
    """
    try:
        config = AutoConfig.from_pretrained(folder)
    except Exception as error:
        raise UnsupportedModel(
            f"transformers cannot read this config.json (is its model_type known?): {error}"
        ) from error
    settings = config.to_dict()
    check_family(settings)
    check_not_quantized(settings)
    text = config.get_text_config(decoder=True)
    blocks = getattr(text, "num_hidden_layers", None)
    if not isinstance(blocks, int) or not 0 < blocks <= MAX_BLOCKS:
        raise UnsupportedModel(f"config.json names no number of decoder blocks up to {MAX_BLOCKS}.")
    return config


def auto_class(model_type: str) -> Any:
    """The `transformers` class that builds and loads models of a type, head included."""
    vision = model_type in CALIBRATED and CALIBRATED[model_type].vision
    return AutoModelForImageTextToText if vision else AutoModelForCausalLM


def build(config: Any, dtype: torch.dtype) -> Any:
    """Build the model on the meta device; non-persistent buffers have no values yet.

    Raises:
        UnsupportedModel: `transformers` cannot build it.
    """
    try:
        with torch.device("meta"):
            return auto_class(config.model_type).from_config(
                config, dtype=dtype, experts_implementation=IMPLEMENTATION
            )
    except Exception as error:
        # Any error of the modelling code here is caused by the config.
        raise UnsupportedModel(
            f"transformers cannot build a language model from this config.json: {error}"
        ) from error


def restore_buffers(body: Any, device: torch.device) -> None:
    """Compute the non-persistent buffers of `body`, such as rotary frequencies.

    Persistent ones are in checkpoints, and are loaded with the weights.

    Raises:
        UnsupportedModel: the model's own initialization does not compute one of them.
    """
    stored = body.state_dict().keys()
    for name, module in body.named_modules():
        own = {
            key: buffer
            for key, buffer in module.named_buffers(recurse=False)
            if f"{name}.{key}".removeprefix(".") not in stored
        }
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


@dataclass(frozen=True, slots=True)
class StoredParameter:
    """How a checkpoint stores a parameter.

    Attributes:
        names: for each expert, the tensors to concatenate along rows; for any other parameter its
            one tensor.
        stacked: the parameter stacks the experts' matrices along a new first dimension.
    """

    names: tuple[tuple[str, ...], ...]
    stacked: bool = False

    def tensor(self, source: TensorSource) -> Tensor:
        """Load the parameter."""
        if not self.stacked:
            return source.tensor(self.names[0][0])
        return torch.stack(
            [torch.cat([source.tensor(name) for name in rows]) for rows in self.names]
        )

    def all_names(self) -> Iterator[str]:
        """Names of all tensors of the parameter."""
        for rows in self.names:
            yield from rows


def locate(
    parameter: str, experts: int, model_type: str, prefix: str, names: Collection[str]
) -> StoredParameter:
    """Find how a checkpoint with the tensors `names` stores a parameter.

    Args:
        parameter: its name in the model.
        experts: number of experts' matrices that it stacks, or 0.
        model_type: of the model.
        prefix: name of the body in the model, which checkpoints of the body alone lack.
        names: the checkpoint's tensors.
    """
    renamed = parameter
    for module, checkpoint in RENAMED.get(model_type, ()):
        renamed = renamed.replace(module, checkpoint)
    spellings = (renamed, parameter, parameter.removeprefix(f"{prefix}."))
    for spelling in spellings:
        if spelling in names:
            return StoredParameter(((spelling,),))
        if experts:
            stored = _by_expert(spelling, experts, CALIBRATED[model_type])
            if stored.names[0][0] in names:
                return stored
    return StoredParameter(((renamed,),))


def _by_expert(parameter: str, experts: int, family: Family) -> StoredParameter:
    folder, _, held = parameter.rpartition(".")
    gate, up, down = family.experts
    pieces = (gate, up) if held == "gate_up_proj" else (down,)
    return StoredParameter(
        tuple(
            tuple(f"{folder}.{expert}.{piece}.weight" for piece in pieces)
            for expert in range(experts)
        ),
        stacked=True,
    )


ExpertObserver = Callable[[str, int, Tensor, Tensor], None]
"""Called with a parameter's name, the expert, its inputs (tokens, h_in) and outputs (tokens,
h_out)."""


def run_experts(experts: Any, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """The weighted sum of the chosen experts' outputs, (tokens, hidden).

    `transformers` stacks the experts of a layer in two tensors, `gate_up_proj` (experts, 2 *
    intermediate, hidden) and `down_proj` (experts, hidden, intermediate), or their transposes, some
    with biases, and runs them by an exchangeable implementation; this one lets an observer see each
    expert's maps.

    Args:
        experts: the module; its attribute `observer`, if any, is called for every map.
        hidden: (tokens, hidden).
        top_k_index: (tokens, k), the experts of each token, all different.
        top_k_weights: (tokens, k).
    """
    total = torch.zeros_like(hidden)
    for expert in top_k_index.unique().tolist():
        token, choice = torch.where(top_k_index == expert)
        gated = experts._apply_gate(_apply(experts, "gate_up_proj", expert, hidden[token]))
        output = _apply(experts, "down_proj", expert, gated)
        weighted = output * top_k_weights[token, choice, None]
        # An expert gets a token at most once, so the order of additions is fixed.
        total = total.index_add(0, token, weighted.to(total.dtype))
    return total


def _apply(experts: Any, parameter: str, expert: int, inputs: Tensor) -> Tensor:
    weight = getattr(experts, parameter)[expert]
    bias = getattr(experts, f"{parameter}_bias")[expert] if experts.has_bias else None
    outputs = F.linear(inputs, weight.t() if experts.is_transposed else weight, bias)
    observer: ExpertObserver | None = getattr(experts, "observer", None)
    if observer is not None:
        observer(parameter, expert, inputs, outputs)
    return outputs


ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, run_experts)


def is_experts(module: nn.Module) -> bool:
    """Whether the module is run by `run_experts`."""
    return all(hasattr(module, name) for name in ("gate_up_proj", "down_proj", "_apply_gate"))
