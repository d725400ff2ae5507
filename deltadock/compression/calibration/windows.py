"""Calibration text as token windows of equal length, from files, the fine-tuned model or a mixture.

Held-out windows measure the result and never calibrate: of running text, windows are held out; of
conversations and sampled text, whole documents.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from deltadock.compression.calibration.sampling import TextSampler
from deltadock.compression.calibration.sources import (
    Conversations,
    Prompts,
    Text,
    file_sha256,
    load_tokenizer,
    read_source,
)
from deltadock.compression.options import (
    MIN_LENGTH,
    SAMPLED,
    CalibrationOptions,
    Source,
    check_weights,
)
from deltadock.errors import InvalidCalibration

HELD_OUT: Final = 0.1
"""Fraction of the windows that is held out."""
SAFE_WINDOWS: Final = 16
"""Smallest number of windows of a text; shorter texts get shorter windows."""

Watcher = Callable[[str, float], None]
"""Called with a message and the fraction done; whatever it raises ends the calibration."""


@dataclass(frozen=True, slots=True)
class CalibrationSet:
    """Token windows and their sources.

    Attributes:
        train: (n, length) int64, calibration windows.
        held_out: (m, length) int64, windows that measure the result.
        sha256: over both.
        sources: a JSON-able description of each source: kind, sha256 of its file (None if
            there is none), weight, and its tokens in `train` and `held_out`.
    """

    train: Tensor
    held_out: Tensor
    sha256: str
    sources: list[dict[str, Any]]

    @property
    def tokens(self) -> int:
        """Number of calibration tokens."""
        return self.train.numel()


def load_calibration(
    sources: Sequence[Source],
    checkpoint: Path,
    max_length: int,
    seed: int,
    options: CalibrationOptions | None = None,
    device: str = "cpu",
    progress: Watcher = lambda message, done: None,
) -> CalibrationSet:
    """Load windows of a mixture of sources, each limited to its fraction of the tokens.

    Args:
        sources: empty for text sampled from the fine-tuned model.
        checkpoint: the fine-tune's folder, with its tokenizer.
        max_length: the model's longest sequence in tokens.
        seed: of sampling, held-out windows, and subsampling.
        options: tokens and window length.
        device: torch device that samples.
        progress: called for every sampled token; whatever it raises (`Cancelled`) ends it.

    Raises:
        InvalidCalibration: a source is too short, empty, not UTF-8 or has an invalid line.
        InvalidCheckpoint: there is no tokenizer.
        UnsupportedModel: the model cannot be sampled from.
    """
    options = options or CalibrationOptions()
    options.check()
    sources = sources or (SAMPLED,)
    check_weights([source.weight for source in sources])
    total_weight = sum(source.weight for source in sources)
    tokenizer = load_tokenizer(checkpoint)
    contents: list[_SourceTokens] = []
    for number, source in enumerate(sources, 1):
        progress(f"reading source {number} of {len(sources)}", 0.0)
        found = None if source.path is None else read_source(source.path, tokenizer, seed)
        contents.append(_split(found, seed) if isinstance(found, Conversations) else found)
    length = _window_length(contents, min(options.length, options.tokens, max_length))
    sampler: TextSampler | None = None
    train, held_out, described = [], [], []
    for source, content in zip(sources, contents, strict=True):
        limit = max(1, int(options.tokens * source.weight / total_weight) // length)
        if isinstance(content, Text):
            kind, parts = "text", _cut_text(content.tokens, length, limit, seed)
        elif isinstance(content, _SplitTokens):
            kind, parts = "conversations", _cut_documents(content, length, limit)
        else:
            sampler = sampler or TextSampler(checkpoint, tokenizer, seed, device, progress)
            kind, parts = "sampled", _sample(sampler, content, length, limit)
        train.append(parts[0])
        held_out.append(parts[1])
        described.append(
            {
                "kind": kind,
                "sha256": None if source.path is None else file_sha256(source.path),
                "weight": source.weight,
                "tokens": parts[0].numel(),
                "held_out": parts[1].numel(),
            }
        )
    both = torch.cat(train), torch.cat(held_out)
    return CalibrationSet(*both, _hash(*both), described)


def read_windows(path: Path, checkpoint: Path, length: int) -> Tensor:
    """Read a whole file as windows (n, length) int64; short files give 16 shorter windows.

    Raises:
        InvalidCalibration, InvalidCheckpoint: as `load_calibration`.
    """
    content = read_source(path, load_tokenizer(checkpoint), seed=0)
    if isinstance(content, Prompts):
        raise InvalidCalibration("The file has prompts alone, which give nothing to measure.")
    tokens = content.tokens if isinstance(content, Text) else torch.cat(content.documents)
    return _windows(tokens, min(length, tokens.numel() // SAFE_WINDOWS))


@dataclass(frozen=True, slots=True)
class _SplitTokens:
    """Two streams of tokens (n,) int64 without a common document."""

    train: Tensor
    held_out: Tensor


_SourceTokens = Text | _SplitTokens | Prompts | None
"""Tokens or prompts of a source; None: text to sample without prompts."""


def _split(conversations: Conversations, seed: int) -> _SplitTokens:
    """Hold out about `HELD_OUT` of the tokens, at least one document, at most half the tokens."""
    documents = conversations.documents
    total = sum(document.numel() for document in documents)
    order = torch.randperm(len(documents), generator=torch.Generator().manual_seed(seed))
    held: set[int] = set()
    size = 0
    for index in order.tolist():
        if size >= HELD_OUT * total:
            break
        if size + documents[index].numel() <= total / 2:
            held.add(index)
            size += documents[index].numel()
    if not held:  # every document but one is empty of tokens
        raise InvalidCalibration("At least two conversations are needed: one is held out.")
    train = [index for index in order.tolist() if index not in held]
    return _SplitTokens(
        torch.cat([documents[index] for index in train]),
        torch.cat([documents[index] for index in order.tolist() if index in held]),
    )


def _window_length(contents: Sequence[_SourceTokens], length: int) -> int:
    """The longest window length up to `length` that every file can fill.

    Raises:
        InvalidCalibration: a file is too short for any.
    """
    sizes = []
    for content in contents:
        if isinstance(content, Text):
            sizes.append(content.tokens.numel())
            length = min(length, sizes[-1] // 2)
        elif isinstance(content, _SplitTokens):
            sizes.append(content.train.numel() + content.held_out.numel())
            length = min(length, content.held_out.numel(), content.train.numel())
    if sizes:
        length = min(length, max(sizes) // SAFE_WINDOWS)
    if length < MIN_LENGTH:
        raise InvalidCalibration(
            f"The calibration files fill windows of {length} tokens only; at least {MIN_LENGTH} "
            "are needed. Add text, above all to the shortest file."
        )
    return length


def _windows(tokens: Tensor, length: int) -> Tensor:
    """Reshape `tokens` to (n, length), dropping a partial window at the end."""
    count = tokens.numel() // length
    return tokens[: count * length].view(count, length)


def _held_windows(available: int, limit: int) -> int:
    """Number of held-out windows among `available`, if at most `limit` calibrate."""
    return max(1, min(int(available * HELD_OUT), limit // 8))


def _cut_text(tokens: Tensor, length: int, limit: int, seed: int) -> tuple[Tensor, Tensor]:
    windows = _windows(tokens, length)
    order = torch.randperm(len(windows), generator=torch.Generator().manual_seed(seed))
    held = _held_windows(len(windows), limit)
    train = order[held : held + limit].sort().values
    return windows[train], windows[order[:held].sort().values]


def _cut_documents(split: _SplitTokens, length: int, limit: int) -> tuple[Tensor, Tensor]:
    train, held = _windows(split.train, length), _windows(split.held_out, length)
    return train[:limit], held[: _held_windows(len(train) + len(held), limit)]


def _sample(
    sampler: TextSampler, prompts: Prompts | None, length: int, limit: int
) -> tuple[Tensor, Tensor]:
    held = max(1, limit // 8)
    starts = None if prompts is None else prompts.prompts
    streams = sampler.sample(starts, length, limit * length, held * length)
    return _windows(streams[0], length)[:limit], _windows(streams[1], length)[:held]


def _hash(train: Tensor, held_out: Tensor) -> str:
    digest = hashlib.sha256(json.dumps([list(train.shape), list(held_out.shape)]).encode())
    for windows in (train, held_out):
        digest.update(windows.contiguous().numpy().astype("<i8", copy=False).tobytes())
    return digest.hexdigest()


def spaced(available: int, wanted: int) -> Tensor:
    """Indices (n,) int64 of at most `wanted` of `available` windows, evenly spaced.

    Windows are in the order of sources and texts, so that the first ones would not represent all.
    """
    return torch.linspace(0, available - 1, min(available, wanted)).round().long()
