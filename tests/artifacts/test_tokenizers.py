"""A checkpoint's tokenizer is what its tokenizer.json says, as in the node."""

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import AutoTokenizer, LlamaConfig, PreTrainedTokenizerFast, Qwen2Config

from deltadock.artifacts.tokenizers import open_tokenizer
from deltadock.compression.calibration.sources import load_tokenizer
from deltadock.inference.prompts.tokenizer import Tokenizer as NodeTokenizer
from deltadock.inference.prompts.tokenizer import read_tokenizer_files

TEXT = "in 2026\n Ａ"
CASES = [(LlamaConfig, "GPT2Tokenizer"), (Qwen2Config, "Qwen2TokenizerFast")]
"""Classes with a normalizer or pre-tokenizer of their own."""


@pytest.fixture(params=CASES, ids=["llama", "qwen2"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A checkpoint's folder whose tokenizer splits digits and newlines, and widens nothing."""
    config, named = request.param
    pieces = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("2", "0"), ("Ċ", "Ġ")]
    vocabulary = {piece: n for n, piece in enumerate([*pieces, *map("".join, merges)])}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges))
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(tmp_path)
    config().save_pretrained(tmp_path)
    described = tmp_path / "tokenizer_config.json"
    described.write_text(json.dumps(json.loads(described.read_text()) | {"tokenizer_class": named}))
    return tmp_path


def test_calibration_splits_text_as_the_node(folder: Path) -> None:
    ids = NodeTokenizer(read_tokenizer_files(folder)).encode(TEXT)
    assert AutoTokenizer.from_pretrained(folder)(TEXT)["input_ids"] != ids, "the case is none"
    assert open_tokenizer(folder)(TEXT)["input_ids"] == ids
    assert load_tokenizer(folder)(TEXT)["input_ids"] == ids
