"""Read files of calibration text, render them through the chat template, and tokenize them."""

import hashlib
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from deltadock.artifacts.checkpoint import CONFIG, TOKENIZER_FILES, VOCABULARY_FILES
from deltadock.artifacts.tokenizers import open_tokenizer
from deltadock.compression.calibration.records import Record, RecordReader, check_documents
from deltadock.compression.options import CALIBRATION_SUFFIXES, check_text_tokens
from deltadock.errors import InvalidCalibration, InvalidCheckpoint

MAX_CHARACTERS: Final = 4_000_000
"""Tokenizing takes hundreds of bytes per character; longer texts are subsampled."""
PIECE_CHARACTERS: Final = 40_000


@dataclass(frozen=True, slots=True)
class Text:
    """Running text: one stream of tokens (n,) int64, of which windows are held out."""

    tokens: Tensor


@dataclass(frozen=True, slots=True)
class Conversations:
    """Separate documents, each a stream of tokens (n,) int64; whole documents are held out."""

    documents: list[Tensor]


@dataclass(frozen=True, slots=True)
class Prompts:
    """Prompts (n,) int64 for the fine-tuned model to continue."""

    prompts: list[Tensor]


Material = Text | Conversations | Prompts


def load_tokenizer(checkpoint: Path, base: Path | None = None) -> Any:
    """Load the checkpoint's tokenizer.

    Args:
        checkpoint: its folder.
        base: the folder whose tokenizer it inherits; None: it has its own.

    Raises:
        InvalidCheckpoint: there is none, or it cannot be loaded.
    """
    if base is not None:
        with tempfile.TemporaryDirectory(prefix="deltadock-tokenizer-") as name:
            for folder in (base, checkpoint):
                for file in TOKENIZER_FILES | {CONFIG}:
                    if (folder / file).is_file():
                        shutil.copyfile(folder / file, Path(name, file))
            return load_tokenizer(Path(name))
    if not any((checkpoint / name).is_file() for name in VOCABULARY_FILES):
        # transformers would create an empty one.
        raise InvalidCheckpoint(
            "The fine-tune has no tokenizer; put its tokenizer.json and tokenizer_config.json "
            "beside the weights."
        )
    try:
        tokenizer = open_tokenizer(checkpoint)
    except Exception as error:  # the library raises nothing more specific
        raise InvalidCheckpoint(f"The fine-tune's tokenizer cannot be loaded: {error}") from error
    # A corpus is longer than a model's context: no truncation, no warning.
    tokenizer.model_max_length = 1 << 60
    return tokenizer


def encode(tokenizer: Any, text: str) -> Tensor:
    """Tokenize `text`, (n,) int64; special tokens only where the text contains them."""
    return torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"], dtype=torch.int64)


def read_source(path: Path, tokenizer: Any, seed: int) -> Material:
    """Read and tokenize a file; longer files than calibration can use are subsampled by `seed`.

    Raises:
        InvalidCalibration: named otherwise, empty, too short, not UTF-8, or with an invalid line
            (named by number).
    """
    if path.suffix not in CALIBRATION_SUFFIXES:
        raise InvalidCalibration(
            f"A calibration text is a .txt or .jsonl file, and {path.name!r} is neither: "
            "rename it. The first is plain text, the second has a JSON object per line."
        )
    content = _read(path)
    if path.suffix == ".txt":
        return Text(_enough(encode(tokenizer, excerpt(content, seed))))
    reader = RecordReader()
    records = [record for line in content.split("\n") if (record := reader.read(line))]
    reader.finish()
    kind = reader.kind
    if kind == "text":
        text = "\n".join(dict.fromkeys(str(record.prompt) for record in records))
        return Text(_enough(encode(tokenizer, excerpt(text, seed))))
    chosen = _some(records, lambda record: record.characters, seed)
    documents = [encode(tokenizer, record.render(tokenizer)) for record in chosen]
    # One that is in the file twice would be held out and trained on.
    distinct = {document.numpy().tobytes(): document for document in documents if document.numel()}
    documents = list(distinct.values())
    check_documents(kind, len(documents))
    if kind == "prompt":
        return Prompts(documents)
    _enough(torch.cat(documents))
    return Conversations(documents)


def file_sha256(path: Path) -> str:
    """SHA-256 (hex) of a file's bytes."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def excerpt(text: str, seed: int) -> str:
    """`text`, or random pieces of it if it is longer than calibration can use."""
    if len(text) <= MAX_CHARACTERS:
        return text
    pieces = len(text) // PIECE_CHARACTERS
    order = torch.randperm(pieces, generator=torch.Generator().manual_seed(seed))
    chosen = order[: MAX_CHARACTERS // PIECE_CHARACTERS].sort().values.tolist()
    return "".join(text[k * PIECE_CHARACTERS : (k + 1) * PIECE_CHARACTERS] for k in chosen)


def _some(
    records: Sequence["Record"], size: Callable[["Record"], int], seed: int
) -> list["Record"]:
    """A random subset of `records` of the size that calibration can use, in order."""
    order = torch.randperm(len(records), generator=torch.Generator().manual_seed(seed))
    chosen: list[int] = []
    total = 0
    for index in order.tolist():
        total += size(records[index])
        if chosen and total > MAX_CHARACTERS:
            break
        chosen.append(index)
    return [records[index] for index in sorted(chosen)]


def _enough(tokens: Tensor) -> Tensor:
    check_text_tokens(tokens.numel())
    return tokens


def _read(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InvalidCalibration(
            f"The calibration file is not UTF-8 text (byte {error.start}). Convert it first."
        ) from error
