"""Whether a fine-tune fits its base, told from the two manifests alone."""

from collections.abc import Mapping
from typing import Any, Final

from artifacts.checkpoint import CheckpointManifest
from deltadock.errors import ArchitectureMismatch

FREE_KEYS: Final = frozenset(
    {
        "_name_or_path", "architectures", "attention_dropout", "auto_map", "bos_token_id", "dtype",
        "eos_token_id", "hidden_dropout", "id2label", "initializer_range", "label2id",
        "max_position_embeddings", "output_attentions", "output_hidden_states", "pad_token_id",
        "problem_type", "return_dict", "tokenizer_class", "torch_dtype", "transformers_version",
        "use_cache",
    }
)  # fmt: skip
"""Keys of config.json that do not change what the weights compute."""

WINDOW_KEYS: Final = frozenset({"sliding_window", "max_window_layers"})
"""Keys that mean nothing where `use_sliding_window` is false."""


def check_same_config(base: Mapping[str, Any], finetuned: Mapping[str, Any]) -> None:
    """Refuse a fine-tune whose configuration makes other use of the same weights.

    A delta is served by the base's own modelling code, so heads, rotary frequencies, norms'
    epsilons and the like must be the base's. A key that only one of them spells out is taken to
    be its default.

    Raises:
        ArchitectureMismatch: naming the first key that differs.
    """
    unused = WINDOW_KEYS if base.get("use_sliding_window") is False else frozenset()
    for key in sorted((base.keys() & finetuned.keys()) - FREE_KEYS - unused):
        if base[key] != finetuned[key]:
            raise ArchitectureMismatch(
                f"config.json says {key} = {finetuned[key]!r} for the fine-tune, but "
                f"{base[key]!r} for the base. A delta can only change weights."
            )


def check_same_architecture(base: CheckpointManifest, finetuned: CheckpointManifest) -> None:
    """Refuse a fine-tune whose tensors, in name and shape, or configuration are not its base's.

    Raises:
        ArchitectureMismatch: naming the first tensor, by name, or key that differs.
    """
    expected, found = base.config["model_type"], finetuned.config["model_type"]
    if expected != found:
        raise ArchitectureMismatch(f"The base is a {expected!r} model, the fine-tune a {found!r}.")
    shapes = {tensor.name: tensor.shape for tensor in base.tensors}
    tuned_shapes = {tensor.name: tensor.shape for tensor in finetuned.tensors}
    for name in sorted(shapes.keys() | tuned_shapes.keys()):
        if name not in tuned_shapes:
            raise ArchitectureMismatch(f"The fine-tune lacks the base's tensor {name!r}.")
        if name not in shapes:
            raise ArchitectureMismatch(f"The fine-tune's tensor {name!r} is not in the base.")
        if shapes[name] != tuned_shapes[name]:
            raise ArchitectureMismatch(
                f"Tensor {name!r} has shape {list(tuned_shapes[name])} in the fine-tune, but "
                f"{list(shapes[name])} in the base."
            )
    check_same_config(base.config, finetuned.config)
