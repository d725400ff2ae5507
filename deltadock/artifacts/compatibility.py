"""Check from the manifests alone that a fine-tune has its base's architecture."""

from collections.abc import Mapping
from typing import Any, Final

from deltadock.artifacts.checkpoint import CheckpointManifest
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
"""Keys of config.json that do not affect what the weights compute."""

WINDOW_KEYS: Final = frozenset({"sliding_window", "max_window_layers"})
"""Keys that are ignored if `use_sliding_window` is false."""

VOCABULARY: Final = "vocab_size"


def vocabulary(config: Mapping[str, Any]) -> int | None:
    """Rows of the token embedding, also of a nested text model; None: unknown."""
    nested = config.get("text_config")
    size = config.get(VOCABULARY, nested.get(VOCABULARY) if isinstance(nested, dict) else None)
    return size if isinstance(size, int) and not isinstance(size, bool) else None


def check_same_config(
    base: Mapping[str, Any],
    finetuned: Mapping[str, Any],
    *,
    any_vocabulary: bool = False,
    within: str = "",
) -> None:
    """Reject a fine-tune whose configuration uses the same weights differently.

    A delta is served by the base's modelling code, so heads, rotary frequencies, norm epsilons
    and the like must equal the base's. A key that only one config has is assumed to be at its
    default.

    Args:
        base, finetuned: the parsed config.json files.
        any_vocabulary: whether vocabulary sizes may differ.
        within: key path of these configs, if nested in another.

    Raises:
        ArchitectureMismatch: keys differ; the message names the first.
    """
    unused = WINDOW_KEYS if base.get("use_sliding_window") is False else frozenset()
    free = FREE_KEYS | unused | ({VOCABULARY} if any_vocabulary else frozenset())
    for key in sorted((base.keys() & finetuned.keys()) - free):
        old, new = base[key], finetuned[key]
        if key.endswith("_config") and isinstance(old, dict) and isinstance(new, dict):
            check_same_config(old, new, any_vocabulary=any_vocabulary, within=f"{within}{key}.")
        elif old != new:
            raise ArchitectureMismatch(
                f"config.json says {within}{key} = {new!r} for the fine-tune, but "
                f"{old!r} for the base. A delta can only change weights."
            )


def _vocabulary_extended(
    before: tuple[int, ...], after: tuple[int, ...], tokens: tuple[int | None, int | None]
) -> bool:
    """Whether a tensor has one row per token and the vocabulary has grown."""
    old, new = tokens
    return (
        old is not None
        and new is not None
        and old < new
        and (before[:1], after[:1]) == ((old,), (new,))
        and before[1:] == after[1:]
    )


def check_same_architecture(base: CheckpointManifest, finetuned: CheckpointManifest) -> None:
    """Reject a fine-tune whose tensor names, shapes or configuration differ from its base's.

    The vocabulary may be larger than the base's; tensors with one row per token then have more
    rows.

    Raises:
        ArchitectureMismatch: tensors or keys differ; the message names the first.
    """
    expected, found = base.config["model_type"], finetuned.config["model_type"]
    if expected != found:
        raise ArchitectureMismatch(f"The base is a {expected!r} model, the fine-tune a {found!r}.")
    tokens = (vocabulary(base.config), vocabulary(finetuned.config))
    if tokens[0] is not None and tokens[1] is not None and tokens[1] < tokens[0]:
        raise ArchitectureMismatch(
            f"The fine-tune's vocabulary has {tokens[1]} tokens, fewer than the base's "
            f"{tokens[0]}. Call resize_token_embeddings({tokens[0]}) on it and save it again."
        )
    shapes = {tensor.name: tensor.shape for tensor in base.tensors}
    tuned_shapes = {tensor.name: tensor.shape for tensor in finetuned.tensors}
    for name in sorted(shapes.keys() | tuned_shapes.keys()):
        if name not in tuned_shapes:
            raise ArchitectureMismatch(f"The fine-tune lacks the base's tensor {name!r}.")
        if name not in shapes:
            raise ArchitectureMismatch(f"The fine-tune's tensor {name!r} is not in the base.")
        before, after = shapes[name], tuned_shapes[name]
        if before != after and not _vocabulary_extended(before, after, tokens):
            raise ArchitectureMismatch(
                f"Tensor {name!r} has shape {list(after)} in the fine-tune, but {list(before)} in "
                "the base. Only a vocabulary that config.json says has grown may add rows."
            )
    check_same_config(base.config, finetuned.config, any_vocabulary=True)
