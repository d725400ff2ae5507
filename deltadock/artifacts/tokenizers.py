"""The tokenizer of a checkpoint folder."""

import json
from collections.abc import Mapping
from inspect import signature
from pathlib import Path
from typing import Any, Final

from transformers import AutoTokenizer, PreTrainedTokenizerFast
from transformers.models.auto.tokenization_auto import (
    TOKENIZER_MAPPING_NAMES,
    tokenizer_class_from_name,
)

from deltadock.artifacts.checkpoint import CONFIG, TOKENIZER

NAMING_FILES: Final = ("special_tokens_map.json", "tokenizer_config.json")
"""Files that name special tokens; the later one decides."""


def open_tokenizer(folder: Path) -> Any:
    """Load the tokenizer as its tokenizer.json says, which is what nodes read.

    The classes that `AutoTokenizer` chooses take only the vocabulary from that file and replace its
    normalizer and pre-tokenizer by their own, so that a model that was trained with others is given
    other tokens (huggingface/transformers issue 45920).

    Raises:
        Exception: it cannot be loaded; the library raises nothing more specific.
    """
    if not (folder / TOKENIZER).is_file():
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    paths = [folder / name for name in (CONFIG, TOKENIZER, *NAMING_FILES)]
    files = {path.name: path.read_text("utf-8") for path in paths if path.is_file()}
    for name, token in default_tokens(files).items():
        setattr(tokenizer, name, token)
    return tokenizer


def named_tokens(files: Mapping[str, str]) -> dict[str, Any]:
    """What a checkpoint's text files, by name, say of its tokenizer's special tokens and class."""
    return {
        key: value
        for name in NAMING_FILES
        for key, value in json.loads(files.get(name, "{}")).items()
    }


def default_tokens(files: Mapping[str, str]) -> dict[str, str]:
    """The special tokens, by name such as `eos_token`, that only the tokenizer's class names.

    GPT-2's files, for one, name none. A class's token counts if tokenizer.json has it as such.
    """
    named = named_tokens(files)
    model = json.loads(files.get(CONFIG, "{}")).get("model_type")
    kind = str(named.get("tokenizer_class") or TOKENIZER_MAPPING_NAMES.get(model))
    if kind.removesuffix("Fast") not in TOKENIZER_MAPPING_NAMES.values():
        return {}
    tokens = {
        name: parameter.default
        for name, parameter in signature(tokenizer_class_from_name(kind)).parameters.items()
        if name.endswith("_token") and name not in named and isinstance(parameter.default, str)
    }
    if not tokens:
        return {}
    added = json.loads(files.get(TOKENIZER, "{}")).get("added_tokens", [])
    special = {token["content"] for token in added if token["special"]}
    return {name: token for name, token in tokens.items() if token in special}
