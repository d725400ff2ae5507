"""The tokenizer of a checkpoint folder."""

from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerFast

from deltadock.artifacts.checkpoint import TOKENIZER


def open_tokenizer(folder: Path) -> Any:
    """Load the tokenizer as its tokenizer.json says, which is what nodes read.

    The classes that `AutoTokenizer` chooses take only the vocabulary from that file and replace its
    normalizer and pre-tokenizer by their own, so that a model that was trained with others is given
    other tokens (huggingface/transformers issue 45920).

    Raises:
        Exception: it cannot be loaded; the library raises nothing more specific.
    """
    kind = PreTrainedTokenizerFast if (folder / TOKENIZER).is_file() else AutoTokenizer
    return kind.from_pretrained(folder, trust_remote_code=False)
