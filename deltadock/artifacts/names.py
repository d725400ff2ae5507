"""Tensor names: the spellings that trainers and versions of `transformers` give one tensor."""

import re
from collections.abc import Container, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Final

_INNER_LANGUAGE_MODEL: Final = (
    ("model.language_model.", "language_model.model."),
    ("lm_head.", "language_model.lm_head."),
)

_TEXT_MODEL: Final = (("model.language_model.", "model."),)

RENAMED: Final[Mapping[str, tuple[tuple[str, str], ...]]] = MappingProxyType(
    {
        "gpt_neox": (("lm_head.", "embed_out."),),
        "mixtral": ((".mlp.", ".block_sparse_moe."),),
        "qwen2_5_vl": _TEXT_MODEL,
        "qwen3_5": _TEXT_MODEL,
        "qwen3_5_text": _TEXT_MODEL,
        "qwen3_5_moe": _TEXT_MODEL,
        "qwen3_5_moe_text": _TEXT_MODEL,
        "llava": _INNER_LANGUAGE_MODEL,
        "gemma3": _INNER_LANGUAGE_MODEL,
    }
)
"""Pieces of the modules' parameter names, and their names in checkpoints, by model_type: an adapter
names the modules, of Qwen3.5 those of its text model alone."""

BODY: Final = ("model.", "transformer.")
"""Prefixes of the body, which checkpoints of the body alone lack."""

EMBEDDINGS: Final = frozenset(
    {"embed_tokens", "wte", "word_embeddings", "embed_in", "tok_embeddings", "token_embedding"}
)
HEADS: Final = frozenset({"lm_head", "embed_out", "output"})
"""Modules of input embeddings and output heads."""

_LAYER: Final = re.compile(r"^(?:model\.)?layers\.(\d+)\.")

_PREDICTION: Final = re.compile(r"^(?:model\.)?mtp(?:_layers)?\.")

_BLOCK: Final = re.compile(r"\.(\d+)\.")

_WRAPPERS: Final = re.compile(
    r"(?:^|(?<=\.))(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.|^(?:module\.)+"
)

_BUFFERS: Final = re.compile(
    r"(?:^|\.)(?:rotary_emb\.(?:original_)?inv_freq|attn\.masked_bias|attention\.masked_bias"
    r"|embeddings\.position_ids)$"
)


def unwrapped(name: str) -> str:
    """The name without the prefixes of `torch.compile`, FSDP, activation checkpointing and DDP."""
    return _WRAPPERS.sub("", name)


def is_buffer(name: str, shape: Sequence[int]) -> bool:
    """Whether `transformers` computes this tensor itself and ignores a stored one.

    Such are rotary frequencies, and the masks of old GPT-2 and GPT-NeoX checkpoints.
    """
    mask = name.endswith(("attn.bias", "attention.bias")) and len(shape) == 4
    return mask or bool(_BUFFERS.search(name))


def spellings(name: str, model_type: str) -> Iterator[str]:
    """The names that a tensor may have in another checkpoint of this type, likeliest first."""
    found = [unwrapped(name)]
    for module, checkpoint in RENAMED.get(model_type, ()):
        found += [one.replace(module, checkpoint) for one in found]
        found += [one.replace(checkpoint, module, 1) for one in found]
    for prefix in BODY:
        found += [one.removeprefix(prefix) for one in found]
        found += [prefix + one for one in found]
    return iter(dict.fromkeys([name, *found]))


def find_name(name: str, names: Container[str], model_type: str) -> str | None:
    """The spelling of `name` that is among `names`; None: there is none."""
    if name in names:  # nearly always
        return name
    return next((one for one in spellings(name, model_type) if one in names), None)


def predicts_further(name: str, config: Mapping[str, Any]) -> bool:
    """Whether the tensor is of a layer that predicts further tokens, not the next one.

    Such are layers past those that config.json counts (DeepSeek's and GLM's), and those of a module
    of their own (Qwen3.5's); `transformers` does not load them.
    """
    if _PREDICTION.match(name):
        return True
    layer, count = _LAYER.search(name), config.get("num_hidden_layers")
    return layer is not None and isinstance(count, int) and int(layer[1]) >= count


def is_embedding(name: str) -> bool:
    """Whether the tensor is an input embedding by its name."""
    return _owner(name) in EMBEDDINGS and not is_in_block(name)


def is_head(name: str) -> bool:
    """Whether the tensor is an output head's weight by its name."""
    return _owner(name) in HEADS and not is_in_block(name)


def is_in_block(name: str) -> bool:
    """Whether the tensor is one of a numbered block's."""
    return bool(_BLOCK.search(name))


def block_of(name: str) -> int:
    """The number of the block that a tensor `is_in_block` of."""
    found = _BLOCK.search(name)
    assert found is not None, name
    return int(found[1])


def _owner(name: str) -> str:
    owner, _, parameter = name.rpartition(".")
    return owner.rpartition(".")[2] if parameter == "weight" else ""
