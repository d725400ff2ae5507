"""A checkpoint's tokenizer is what its tokenizer.json says, as in the node."""

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import (
    AutoTokenizer,
    GPT2Config,
    LlamaConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
)

from deltadock.artifacts.tokenizers import open_tokenizer
from deltadock.compression.calibration.sources import Conversations, load_tokenizer, read_source
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


@pytest.mark.parametrize("folder", CASES[:1], ids=[""], indirect=True)
@pytest.mark.parametrize("config", [GPT2Config, Qwen2Config])
@pytest.mark.parametrize(
    ("named", "has_token", "end"),
    [({}, True, "<|endoftext|>"), ({"eos_token": None}, True, None), ({}, False, None)],
    ids=["unnamed", "null", "unknown"],
)
def test_special_tokens_that_no_file_names_are_the_classs(
    config: type[GPT2Config | Qwen2Config],
    named: dict[str, None],
    has_token: bool,
    end: str | None,
    folder: Path,
) -> None:
    own = Tokenizer.from_file(str(folder / "tokenizer.json"))
    if has_token:
        own.add_special_tokens(["<|endoftext|>"])
    own.save(str(folder / "tokenizer.json"))
    config(bos_token_id=None, eos_token_id=None).save_pretrained(folder)
    (folder / "tokenizer_config.json").write_text(json.dumps({"model_max_length": 1024} | named))
    opened, node = open_tokenizer(folder), NodeTokenizer(read_tokenizer_files(folder))
    if has_token:
        theirs = AutoTokenizer.from_pretrained(folder).special_tokens_map
        assert opened.special_tokens_map == node.chat.special_tokens == theirs
    assert opened.eos_token == end
    assert node.eos_ids == (set() if end is None else {own.token_to_id(end)})
    assert opened.encode(TEXT + "<|endoftext|>") == node.encode(TEXT + "<|endoftext|>")
    records = folder / "records.jsonl"
    records.write_text(
        "\n".join(f'{{"prompt": "{n}", "completion": "{n}{TEXT[:7] * 9}"}}' for n in range(9))
    )
    found = read_source(records, load_tokenizer(folder), 0)
    assert isinstance(found, Conversations)
    assert all(
        (document[-1].item() in node.eos_ids) == (end is not None) for document in found.documents
    )
