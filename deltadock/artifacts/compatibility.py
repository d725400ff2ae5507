"""Check from the manifests alone that a fine-tune has its base's architecture."""

import re
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any, Final

from deltadock.artifacts.checkpoint import (
    MODEL_FILES,
    TOKENIZER_FILES,
    VOCABULARY_FILES,
    CheckpointManifest,
    FileEntry,
    TensorEntry,
)
from deltadock.artifacts.names import (
    find_name,
    is_buffer,
    is_embedding,
    is_head,
    predicts_further,
)
from deltadock.errors import (
    ArchitectureMismatch,
    InvalidCheckpoint,
    UnchangedCheckpoint,
    UnsupportedModel,
)

STRUCTURE: Final = (
    "activation_function", "head_dim", "hidden_act", "n_head", "num_attention_heads",
    "num_experts_per_tok", "num_key_value_heads",
)  # fmt: skip
"""Keys of config.json by which equal shapes are used differently, in any version's spelling."""

VOCABULARY: Final = "vocab_size"

TEXT: Final = "_text"
"""End of the `model_type` of a vision-language model's text model."""


def vocabulary(config: Mapping[str, Any]) -> int | None:
    """Rows of the token embedding, also of a nested text model; None: unknown."""
    nested = config.get("text_config")
    size = config.get(VOCABULARY, nested.get(VOCABULARY) if isinstance(nested, dict) else None)
    return size if isinstance(size, int) and not isinstance(size, bool) else None


def with_vocabulary(config: Mapping[str, Any], size: int) -> dict[str, Any]:
    """A parsed config.json with another `vocabulary`."""
    nested = config.get("text_config")
    if VOCABULARY not in config and isinstance(nested, dict):
        return {**config, "text_config": nested | {VOCABULARY: size}}
    return {**config, VOCABULARY: size}


def check_structure(base: Mapping[str, Any], finetuned: Mapping[str, Any]) -> None:
    """Reject a fine-tune whose heads or activations are spelled differently than the base's.

    `artifacts.configs.check_same_forward` compares everything, but needs `transformers`.

    Raises:
        ArchitectureMismatch: naming the first key.
    """
    for key in STRUCTURE:
        old, new = base.get(key), finetuned.get(key)
        if None not in (old, new) and old != new:
            raise ArchitectureMismatch(
                f"config.json says {key} = {new!r} for the fine-tune, but {old!r} for the base. "
                "A delta can only change weights."
            )
    before, after = base.get("text_config"), finetuned.get("text_config")
    if isinstance(before, Mapping) and isinstance(after, Mapping):
        check_structure(before, after)


def _vocabulary_resized(
    before: tuple[int, ...], after: tuple[int, ...], tokens: tuple[int | None, int | None]
) -> bool:
    """Whether a tensor has one row per token and the vocabulary has been resized."""
    return (
        None not in tokens
        and (before[:1], after[:1]) == (tokens[:1], tokens[1:])
        and before[1:] == after[1:]
    )


def check_same_architecture(base: CheckpointManifest, finetuned: CheckpointManifest) -> None:
    """Reject a fine-tune whose tensors, shapes or structure differ from its base's.

    The vocabulary may be larger or smaller than the base's; tensors with one row per token then
    have more or fewer rows.

    Raises:
        ArchitectureMismatch: tensors or keys differ; the message names the first.
        InvalidCheckpoint: a tensor is an empty placeholder.
        UnsupportedModel: only one of the two is quantized.
    """
    match_tensors(base, finetuned)
    check_structure(base.config, finetuned.config)


def inherits_tokenizer(base: CheckpointManifest, finetuned: CheckpointManifest) -> bool:
    """Whether the fine-tune's tokenizer is its base's: it has none, and as many tokens.

    Trainers often save the weights without it.
    """
    has_one, has_its_own = (
        any(file.path in VOCABULARY_FILES for file in manifest.files)
        for manifest in (base, finetuned)
    )
    return has_one and not has_its_own and vocabulary(base.config) == vocabulary(finetuned.config)


def differing_files(
    base: CheckpointManifest, finetuned: CheckpointManifest
) -> dict[str, FileEntry | None]:
    """The model's files that differ from the base's, by name; None: the fine-tune has none.

    What a fine-tune lacks of a tokenizer that it inherits does not differ.
    """
    before, after = (
        {file.path: file for file in manifest.files if file.path in MODEL_FILES}
        for manifest in (base, finetuned)
    )
    inherited = TOKENIZER_FILES - after.keys() if inherits_tokenizer(base, finetuned) else set()
    return {
        path: after.get(path)
        for path in sorted((before.keys() | after.keys()) - inherited)
        if path not in before or path not in after or before[path].sha256 != after[path].sha256
    }


def check_differs(base: CheckpointManifest, finetuned: CheckpointManifest) -> None:
    """Reject a fine-tune that equals its base: there would be nothing to store.

    Raises:
        UnchangedCheckpoint: all tensors, and all files that a delta carries, are the same.
    """
    if not differing_files(base, finetuned) and _same_weights(base, finetuned):
        raise UnchangedCheckpoint(
            "The fine-tune equals its base: every weight and every file of the model is the same. "
            "Was the base uploaded twice, or the training's result saved elsewhere?"
        )


def _same_weights(base: CheckpointManifest, finetuned: CheckpointManifest) -> bool:
    """Whether both have one `weights_digest`; mostly known from the first tensor."""
    return len(base.tensors) == len(finetuned.tensors) and all(
        (old.name, old.dtype, old.shape, old.sha256) == (new.name, new.dtype, new.shape, new.sha256)
        for old, new in zip(base.tensors, finetuned.tensors, strict=True)
    )


def check_same_type(base: str, finetuned: str) -> None:
    """Check that both have the same `model_type` in config.json.

    Raises:
        ArchitectureMismatch: they have not.
    """
    if base != finetuned:
        how = ""
        if finetuned == f"{base}{TEXT}":
            how = (
                " It is of the base's text model: save that alone before its training, as the "
                "fine-tune was saved, and register it as the base."
            )
        elif base == f"{finetuned}{TEXT}":
            how = " The base is its text model alone: register the whole model as the base."
        raise ArchitectureMismatch(
            f"The base is a {base!r} model, the fine-tune a {finetuned!r}.{how}"
        )


def match_tensors(
    base: CheckpointManifest, finetuned: CheckpointManifest
) -> dict[str, TensorEntry]:
    """The fine-tune's tensors by the base's names, as `from_pretrained` would load them.

    Spellings may differ (`find_name`), and a head tied to the embedding may be stored in only one
    of the two. Left out are buffers that `transformers` computes itself, and layers that predict
    further tokens if only one of the two has them.

    Raises:
        ArchitectureMismatch, InvalidCheckpoint, UnsupportedModel: as `check_same_architecture`.
    """
    kind = base.config["model_type"]
    check_same_type(kind, finetuned.config["model_type"])
    ours, theirs = quantization(finetuned), quantization(base)
    if ours != theirs:
        owner, method = ("fine-tune", ours) if ours else ("base", theirs)
        raise _quantized(f"The {owner}'s weights are", method or "")
    tokens = (vocabulary(base.config), vocabulary(finetuned.config))
    before = {t.name: t for t in base.tensors if not is_buffer(t.name, t.shape)}
    if (own := _own_head(base, finetuned)) is not None:
        before |= tied_head(base, own)
    if tied_head(base) and not ties_head(finetuned.config) and not _heads(finetuned):
        raise ArchitectureMismatch(
            f"The fine-tune has no head, and its config.json says {TIED} = false: transformers "
            "would initialise one at random. Save it again, or correct its config.json."
        )
    matched = _by_base_names(before, finetuned, kind)
    for name, entry in sorted(before.items()):
        if name not in matched:
            if predicts_further(name, base.config):
                continue
            raise ArchitectureMismatch(f"The fine-tune lacks the base's tensor {name!r}.")
        shape = matched[name].shape
        if 0 in shape and 0 not in entry.shape:
            raise InvalidCheckpoint(f"Tensor {name!r} of the fine-tune is empty: {EMPTY_TENSOR}")
        if shape != entry.shape and not _vocabulary_resized(entry.shape, shape, tokens):
            raise ArchitectureMismatch(
                f"Tensor {name!r} has shape {list(shape)} in the fine-tune, but "
                f"{list(entry.shape)} in the base. Only a vocabulary that config.json says is "
                "another may have other rows."
            )
    return matched


def _by_base_names(
    before: Mapping[str, TensorEntry], finetuned: CheckpointManifest, model_type: str
) -> dict[str, TensorEntry]:
    """The fine-tune's tensors by the names of `before`, the base's tensors."""
    matched: dict[str, TensorEntry] = {}
    for entry in finetuned.tensors:
        if is_buffer(entry.name, entry.shape):
            continue
        name = find_name(entry.name, before, model_type)
        if name is None and is_head(entry.name) and _is_copy(entry, finetuned):
            continue
        if name is None and predicts_further(entry.name, finetuned.config):
            continue
        if name is None:
            raise ArchitectureMismatch(
                f"The fine-tune's tensor {entry.name!r} is not in the base.{_advice(entry.name)}"
            )
        if name in matched:
            raise ArchitectureMismatch(
                f"The fine-tune's tensors {matched[name].name!r} and {entry.name!r} are both the "
                f"base's {name!r}. Leave one out."
            )
        matched[name] = entry
    for name in before:
        if name not in matched and is_head(name) and ties_head(finetuned.config):
            table = next((one for one in before if is_embedding(one) and one in matched), None)
            if table is not None:
                matched[name] = matched[table]
    return matched


def _advice(name: str) -> str:
    """What to do with a fine-tune that has a tensor of this name, which the base lacks."""
    return next((f" {how}" for pattern, how in _FOREIGN if pattern.search(name)), "")


_FOREIGN: Final[tuple[tuple[re.Pattern[str], str], ...]] = (
    (
        re.compile(r"^base_model\.|\.base_layer\.|\.lora_"),
        "It was saved with its adapter's layers: save what PEFT's merge_and_unload returns, or the "
        "adapter alone with the PeftModel's save_pretrained.",
    ),
    (
        re.compile(r"^(?:v_head|score|classifier|classification_head|pretrained_model)\."),
        "Models with a head for values or classes are not served: save the language model alone.",
    ),
    (
        re.compile(r"\.experts\.(?:\d+\.|gate_up_proj|down_proj)"),
        "Base and fine-tune name the experts of a mixture differently. Load one of them and save "
        "it with save_pretrained(FOLDER, save_original_format=True), or False, as the other was.",
    ),
)
"""Names of tensors that are in no base, or under another name, and what to do."""


def tied_head(checkpoint: CheckpointManifest, name: str = "") -> dict[str, TensorEntry]:
    """The head by its name, if the files lack it and it is the embedding; else empty.

    Args:
        checkpoint: of a model.
        name: the head's; by default as the embedding is spelled.
    """
    table = next((entry for entry in checkpoint.tensors if is_embedding(entry.name)), None)
    if _heads(checkpoint) or table is None or not ties_head(checkpoint.config):
        return {}
    inner = "language_model." if table.name.startswith("language_model.model.") else ""
    return {name or f"{inner}lm_head.weight": table}


def is_tied(checkpoint: CheckpointManifest) -> bool:
    """Whether `from_pretrained` makes embedding and head one tensor.

    It does so if config.json says it, unless the files hold two different ones.
    """
    heads = _heads(checkpoint)
    return ties_head(checkpoint.config) and all(_is_copy(head, checkpoint) for head in heads)


def _own_head(base: CheckpointManifest, finetuned: CheckpointManifest) -> str | None:
    """The head of a fine-tune that is not tied, if the base's is and is not stored."""
    name = next(iter(tied_head(base)), None)
    heads = _heads(finetuned)
    return name if heads and not all(_is_copy(head, finetuned) for head in heads) else None


def _heads(checkpoint: CheckpointManifest) -> list[TensorEntry]:
    return [entry for entry in checkpoint.tensors if is_head(entry.name)]


def _is_copy(head: TensorEntry, checkpoint: CheckpointManifest) -> bool:
    """Whether a head has the content of the checkpoint's embedding."""
    return any(
        is_embedding(entry.name) and (entry.sha256, entry.dtype) == (head.sha256, head.dtype)
        for entry in checkpoint.tensors
    )


TIED_BY_DEFAULT: Final = frozenset(
    {
        "biogpt", "bloom", "cohere", "cohere2", "cohere2_vision", "ctrl", "ernie4_5", "falcon",
        "falcon_mamba", "gemma", "gemma2", "gemma3", "gemma3_text", "gemma3n", "gemma3n_text",
        "gemma4", "gemma4_text", "gpt2", "gpt-sw3", "gpt_bigcode", "gpt_neo", "jetmoe", "lfm2",
        "lfm2_moe", "lfm2_vl", "mamba", "mpt", "openai-gpt", "opt", "paligemma",
        "recurrent_gemma", "smollm3", "starcoder2", "vaultgemma", "xglm", "zamba", "zamba2",
    }
)  # fmt: skip
"""Families whose head is tied to the embedding if config.json does not say: older versions of
`transformers` did not write what is the default."""


def ties_head(config: Mapping[str, Any]) -> bool:
    """Whether a model without a head in its files takes the embedding for it."""
    nested = config.get("text_config")
    parts = [config, nested] if isinstance(nested, Mapping) else [config]
    stated = [bool(part[TIED]) for part in parts if part.get(TIED) is not None]
    return any(stated) if stated else config.get("model_type") in TIED_BY_DEFAULT


TIED: Final = "tie_word_embeddings"

EMPTY_TENSOR: Final = (
    "DeepSpeed ZeRO-3 saves such placeholders where each GPU holds a part of the weights. Save "
    "with stage3_gather_16bit_weights_on_model_save, or run zero_to_fp32.py on the checkpoint."
)

_QUANTIZED_PARTS: Final[Mapping[str, re.Pattern[str]]] = MappingProxyType(
    {
        "bitsandbytes": re.compile(r"\.(?:absmax|quant_map|SCB|quant_state\..*)$"),
        "gptq or awq": re.compile(r"\.(?:qweight|qzeros|g_idx)$"),
        "compressed-tensors": re.compile(r"\.weight_(?:packed|zero_point|shape)$"),
        "fp8": re.compile(r"\.(?:weight_scale|weight_scale_inv|input_scale|scale_weight)$"),
        "mxfp4": re.compile(r"proj_scales$"),
        "mxfp4, dequantized": re.compile(r"proj_blocks$"),
    }
)
"""Names of tensors that only quantized checkpoints have, by quantization method."""

_DEQUANTIZED: Final[Mapping[str, str]] = MappingProxyType(
    {
        "bitsandbytes": "load it with transformers, call model.dequantize() and save it",
        "higgs": "load it with transformers, call model.dequantize() and save it",
        "fp8": (
            "load it with quantization_config=FineGrainedFP8Config(dequantize=True) and save it "
            "with save_pretrained(FOLDER, save_original_format=False)"
        ),
        "mxfp4": (
            "load it with quantization_config=Mxfp4Config(dequantize=True) and save it with "
            "save_pretrained(FOLDER, save_original_format=False)"
        ),
        "compressed-tensors": (
            "load it with quantization_config=CompressedTensorsConfig(dequantize=True) and save it"
        ),
    }
)
"""How `transformers` dequantizes, by quantization method."""


def quantized_by(names: Iterable[str]) -> str | None:
    """The quantization method that tensor names reveal; None: none of them does."""
    names = list(names)
    return next(
        (
            method
            for method, pattern in _QUANTIZED_PARTS.items()
            if any(pattern.search(name) for name in names)
        ),
        None,
    )


def quantization(checkpoint: CheckpointManifest) -> str | None:
    """The quantization method of a checkpoint's weights; None: they are not quantized."""
    return _configured(checkpoint.config) or quantized_by(t.name for t in checkpoint.tensors)


def _configured(config: Mapping[str, Any]) -> str | None:
    for part in (config, config.get("text_config")):
        if isinstance(part, Mapping) and (found := part.get("quantization_config")):
            method = found.get("quant_method") if isinstance(found, Mapping) else None
            return str(method or "of an unnamed kind")
    return None


def check_not_quantized(config: Mapping[str, Any], names: Iterable[str] = ()) -> None:
    """Refuse a checkpoint whose weights are quantized.

    Args:
        config: the parsed config.json.
        names: of its tensors.

    Raises:
        UnsupportedModel: naming the quantization, and how to undo it.
    """
    if method := _configured(config) or quantized_by(names):
        raise _quantized("The weights are", method)


def _quantized(subject: str, method: str) -> UnsupportedModel:
    if method == "mxfp4, dequantized":
        return UnsupportedModel(
            f"{subject} dequantized, but named as MXFP4's blocks, under which from_pretrained does "
            "not find them: transformers saves a model so that it has dequantized. Save it again "
            "with save_pretrained(FOLDER, save_original_format=False), or rename '..._blocks'."
        )
    how = _DEQUANTIZED.get(method, "load it in its own library, dequantize and save it")
    return UnsupportedModel(
        f"{subject} quantized ({method:.40}), so that a difference of them means nothing. Take the "
        f"checkpoint before its quantization, or {how}; base and fine-tune alike."
    )
