"""Encode the products of LoRA factors, without loss.

Source: Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models" (2021). A delta is
`scaling * B @ A`, `scaling = alpha / r` (rank-stabilized: `alpha / sqrt(r)`).
"""

from collections.abc import Mapping, Sequence
from typing import Final, NamedTuple

import torch
from torch import Tensor

from deltadock.artifacts.checkpoint import ADAPTER_CONFIG, TensorEntry
from deltadock.artifacts.encodings import (
    Encoded,
    encode_low_rank,
    encode_stack,
    encode_transposed,
)
from deltadock.artifacts.names import find_name, is_head
from deltadock.compression.adapters.config import LoraConfig
from deltadock.compression.checkpoints import to_numpy
from deltadock.compression.checks import MERGE
from deltadock.compression.families import CALIBRATED, Family
from deltadock.errors import ArchitectureMismatch, InvalidAdapter
from deltadock.words import counted

CONV1D: Final = frozenset({"gpt2", "imagegpt", "openai-gpt"})
"""Families whose linear layers are Conv1D modules, except for the head."""

TRANSPOSED_EXPERTS: Final = frozenset({"aria", "gpt_oss", "openai_privacy_filter"})
"""Families whose stacked experts are (experts, h_in, h_out) also in PEFT's eyes."""

ORDER: Final = ("gate_up_proj", "gate_up_proj_bias", "up_proj", "down_proj", "down_proj_bias")
"""The order in which the families' modules of experts define their parameters."""

BASE_LAYER: Final = ".base_layer"

DTYPES: Final = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32"}


class Factors(NamedTuple):
    """The factors of a layer or parameter: A (r, h_in) and B (h_out, r), of one dtype."""

    a: Tensor
    b: Tensor

    @property
    def dtype(self) -> str:
        """Safetensors' name of the factors' dtype."""
        return DTYPES[self.a.dtype]

    @property
    def shape(self) -> tuple[int, int]:
        """Of the product: (h_out, h_in)."""
        return len(self.b), self.a.shape[1]

    def encode(self, scaling: float, dtype: str) -> Encoded:
        """The product, of a tensor whose fine-tuned dtype is `dtype`."""
        b, a = to_numpy(self.b, self.dtype), to_numpy(self.a, self.dtype)
        return encode_low_rank(b, a, scaling, dtype, {}, self.dtype)


def make_factors(module: str, pair: Mapping[str, Tensor]) -> Factors:
    """The factors `a` and `b` of `pair`.

    Raises:
        InvalidAdapter: they have no product.
    """
    a, b = pair["a"], pair["b"]
    if a.ndim != 2 or b.ndim != 2 or a.shape[0] != b.shape[1]:
        raise InvalidAdapter(f"The adapter's factors of {module!r} have no product.")
    return Factors(a, b) if a.dtype == b.dtype else Factors(a.float(), b.float())


def base_entry(
    entries: Mapping[str, TensorEntry], name: str, shape: tuple[int, ...]
) -> TensorEntry:
    """The base's tensor of this name and shape.

    Raises:
        ArchitectureMismatch: there is none, or it has another shape.
    """
    entry = entries.get(name)
    if entry is None or entry.shape != shape:
        found = "none" if entry is None else f"one of shape {list(entry.shape)}"
        raise ArchitectureMismatch(
            f"The adapter changes a tensor {name!r} of shape {list(shape)}, but the base has "
            f"{found}. Is it the base that the adapter was trained on?"
        )
    return entry


def encode_layer(
    config: LoraConfig,
    entries: Mapping[str, TensorEntry],
    module: str,
    name: str,
    table: Tensor | None,
    *,
    embedding: bool,
    conv1d: bool,
    factors: Factors,
) -> Encoded:
    """Encode the delta `scaling * B @ A`, transposed for embeddings and Conv1D layers.

    Args:
        config: the adapter's.
        entries: the base's tensors.
        module: the layer, as the adapter names it; patterns match this name.
        name: the base's tensor.
        table: the layer's weight as saved in the adapter, whose shape counts; None: the base's.
        embedding: whether the layer is an embedding.
        conv1d: whether the layers of the model are Conv1D, whose weights are transposed.
        factors: the layer's.
    """
    scaling, shape = config.scaling(module, len(factors.a)), factors.shape
    found = entries[name].shape if name in entries else None
    if table is not None and name in entries:
        found = tuple(table.shape)
        saved = TensorEntry(name, DTYPES[table.dtype], found, "", "")
        entries = {**entries, name: saved}
    if embedding:
        entry = base_entry(entries, name, shape[::-1])
        return Factors(factors.b.t(), factors.a.t()).encode(scaling, entry.dtype)
    # PEFT writes fan_in_fan_out for the last layer only; a head is never transposed.
    square = found == shape == shape[::-1]
    transposed = found == shape[::-1] and (
        not square or (not is_head(name) and (conv1d or config.fan_in_fan_out))
    )
    entry = base_entry(entries, name, shape[::-1] if transposed else shape)
    encoded = factors.encode(scaling, entry.dtype)
    return encode_transposed(encoded) if transposed else encoded


def parameters_of(
    config: LoraConfig, entries: Mapping[str, TensorEntry], model_type: str, modules: Sequence[str]
) -> dict[str, str]:
    """The full names of the parameters that have factors, by their modules' names in files.

    PEFT wraps a module once for each of its parameters, in the order in which the model defines
    them: the factors of the last have the module's name, those before it one `.base_layer` more
    each.

    Args:
        config: the adapter's; `target_parameters` are ends of the parameters' names.
        entries: the base's tensors.
        model_type: the base's.
        modules: all modules with factors, as the files name them.

    Raises:
        InvalidAdapter: the files do not hold factors for each targeted parameter.
        ArchitectureMismatch: the base lacks the parameters.
    """
    wrappers: dict[str, list[str]] = {}
    for module in modules:
        wrappers.setdefault(module.replace(BASE_LAYER, ""), []).append(module)
    ends = sorted({target.rpartition(".")[2] for target in config.target_parameters})
    found: dict[str, str] = {}
    for module, names in wrappers.items():
        targeted = [end for end in ends if config.targets(f"{module}.{end}")]
        if not targeted and names == [module]:
            continue
        held = [end for end in targeted if _stored(f"{module}.{end}", entries, model_type)]
        if targeted and not held:
            raise ArchitectureMismatch(
                f"The adapter changes a parameter {f'{module}.{targeted[0]}'!r}, but the base has "
                "none. Is it the base that the adapter was trained on?"
            )
        if len(held) != len(names) or (len(held) > 1 and not set(held) <= set(ORDER)):
            raise InvalidAdapter(
                f"The adapter has {counted(len(names), 'pair')} of factors for {module!r}, which "
                f"are not told apart by the target_parameters of {ADAPTER_CONFIG}: "
                f"{', '.join(held) or 'none'}. {MERGE}"
            )
        ordered = sorted(held, key=ORDER.index) if len(held) > 1 else held
        for name, end in zip(sorted(names, key=len, reverse=True), ordered, strict=True):
            found[name] = f"{module}.{end}"
    return found


def encode_parameter(
    config: LoraConfig,
    entries: Mapping[str, TensorEntry],
    parameter: str,
    model_type: str,
    factors: Factors,
) -> dict[str, Encoded]:
    """Encode the deltas of a parameter that is no layer's, by the names of the base's tensors.

    Of stacked experts, A holds the experts' ranks one expert after the other, and B rank by rank.
    The base stores them in one tensor, or each expert's projections in their own.

    Args:
        config: the adapter's.
        entries: the base's tensors.
        parameter: full name, as `parameters_of` gives it; patterns match it.
        model_type: the base's.
        factors: of all experts.
    """
    stored = _stored(parameter, entries, model_type)
    if stored is None:
        raise InvalidAdapter(f"The base has no parameter {parameter!r}.")
    if isinstance(stored, str):
        return {stored: _encode_stored(config, entries, parameter, stored, model_type, factors)}
    rank, each = _by_expert(parameter, factors, len(stored))
    scaling = config.scaling(parameter, rank)
    found: dict[str, Encoded] = {}
    for names, (a, b) in zip(stored, each, strict=True):
        pieces = b.tensor_split(len(names))
        for name, rows in zip(names, pieces, strict=True):
            one = Factors(a, rows)
            found[name] = one.encode(scaling, base_entry(entries, name, one.shape).dtype)
    return found


def _encode_stored(
    config: LoraConfig,
    entries: Mapping[str, TensorEntry],
    parameter: str,
    name: str,
    model_type: str,
    factors: Factors,
) -> Encoded:
    """Encode the delta of a parameter that the base stores in the tensor `name`."""
    shape = entries[name].shape
    if len(shape) == 2:
        dtype = base_entry(entries, name, factors.shape).dtype
        return factors.encode(config.scaling(parameter, len(factors.a)), dtype)
    rank, each = _by_expert(parameter, factors, shape[0])
    scaling = config.scaling(parameter, rank)
    # Versions of PEFT before 0.19 took all experts for (h_in, h_out): the shape tells.
    square = factors.shape == factors.shape[::-1]
    transposed = shape[1:] == factors.shape[::-1] and (
        not square or model_type in TRANSPOSED_EXPERTS
    )
    inner = factors.shape[::-1] if transposed else factors.shape
    dtype = base_entry(entries, name, (len(each), *inner)).dtype
    parts = [one.encode(scaling, dtype) for one in each]
    return encode_stack([encode_transposed(part) if transposed else part for part in parts])


def _by_expert(parameter: str, factors: Factors, experts: int) -> tuple[int, list[Factors]]:
    """The rank of an expert's factors, and the factors of each."""
    rank, rest = divmod(len(factors.a), experts)
    if rest:
        raise InvalidAdapter(
            f"The adapter's factors of {parameter!r} have {len(factors.a)} ranks, which are not "
            f"those of {experts} experts."
        )
    a = factors.a.reshape(experts, rank, -1)
    b = factors.b.reshape(-1, rank, experts).permute(2, 0, 1)
    return rank, [Factors(*one) for one in zip(a, b, strict=True)]


def _stored(
    parameter: str, entries: Mapping[str, TensorEntry], model_type: str
) -> str | list[tuple[str, ...]] | None:
    """The base's tensor of a parameter, or each expert's projections; None: it has neither."""
    if (name := find_name(parameter, entries, model_type)) is not None:
        return name
    module, _, end = parameter.rpartition(".")
    gate, up, down = CALIBRATED.get(model_type, Family()).experts
    projections = {"gate_up_proj": (gate, up), "up_proj": (up,), "down_proj": (down,)}
    stored: list[tuple[str, ...]] = []
    while True:
        names = [
            find_name(f"{module}.{len(stored)}.{one}.weight", entries, model_type)
            for one in projections.get(end, ())
        ]
        found = tuple(name for name in names if name is not None)
        if not found or len(found) < len(names):
            return stored or None
        stored.append(found)
