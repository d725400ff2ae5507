"""Calibration: token windows of equal length.

Windows come from files, from the fine-tuned model itself, or from a mixture. What is held out
measures the result; nothing of it calibrates: of running text, windows; of conversations and
sampled documents, whole ones.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from deltadock.compression.calibration.sampling import Sampler
from deltadock.compression.calibration.sources import (
    Conversations,
    Prompts,
    Text,
    hash_of,
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
"""Share of the windows that is kept out of calibration and measures the result."""
SAFE_WINDOWS: Final = 16
"""Least windows that a text is cut into, if need be into shorter ones."""

Watcher = Callable[[str, float], None]
"""Told what is being done and the share done; what it raises ends the work."""


@dataclass(frozen=True, slots=True)
class CalibrationSet:
    """Token windows, and where they are from.

    Attributes:
        train: (n, length) int64: what calibrates.
        held_out: (m, length) int64: what measures.
        sha256: over both.
        sources: a JSON-able description of each source: kind, sha256 of its file (None where
            there is none), weight, and its tokens in `train` and `held_out`.
    """

    train: Tensor
    held_out: Tensor
    sha256: str
    sources: list[dict[str, Any]]

    @property
    def tokens(self) -> int:
        """Tokens that calibrate."""
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
    """Windows of a mixture of sources, each giving at most its share of the tokens.

    Args:
        sources: none is text sampled from the fine-tuned model.
        checkpoint: the fine-tune's folder, with its tokenizer.
        max_length: the model's longest sequence in tokens.
        seed: decides what is sampled, held out, and chosen where there is more than needed.
        options: tokens and window length.
        device: torch device that samples.
        progress: told of every sampled token; what it raises (`Cancelled`) ends the work.

    Raises:
        InvalidCalibration: a source that is too short, empty, not UTF-8 or has a bad line.
        InvalidCheckpoint: there is no tokenizer.
        UnsupportedModel: the model cannot be sampled from.
    """
    options = options or CalibrationOptions()
    options.check()
    sources = sources or (SAMPLED,)
    check_weights([source.weight for source in sources])
    total_weight = sum(source.weight for source in sources)
    tokenizer = load_tokenizer(checkpoint)
    materials: list[_Part] = []
    for number, source in enumerate(sources, 1):
        progress(f"reading source {number} of {len(sources)}", 0.0)
        found = None if source.path is None else read_source(source.path, tokenizer, seed)
        materials.append(_split(found, seed) if isinstance(found, Conversations) else found)
    length = _window_length(materials, min(options.length, options.tokens, max_length))
    sampler: Sampler | None = None
    train, held_out, described = [], [], []
    for source, material in zip(sources, materials, strict=True):
        limit = max(1, int(options.tokens * source.weight / total_weight) // length)
        if isinstance(material, Text):
            kind, parts = "text", _cut_text(material.tokens, length, limit, seed)
        elif isinstance(material, _Halves):
            kind, parts = "conversations", _cut_halves(material, length, limit)
        else:
            sampler = sampler or Sampler(checkpoint, tokenizer, seed, device, progress)
            kind, parts = "sampled", _sample(sampler, material, length, limit)
        train.append(parts[0])
        held_out.append(parts[1])
        described.append(
            {
                "kind": kind,
                "sha256": None if source.path is None else hash_of(source.path),
                "weight": source.weight,
                "tokens": parts[0].numel(),
                "held_out": parts[1].numel(),
            }
        )
    both = torch.cat(train), torch.cat(held_out)
    return CalibrationSet(*both, _hash(*both), described)


def read_windows(path: Path, checkpoint: Path, length: int) -> Tensor:
    """The whole of a file as windows (n, length) int64, at least 16 of them if need be shorter.

    Raises:
        InvalidCalibration, InvalidCheckpoint: as `load_calibration`.
    """
    material = read_source(path, load_tokenizer(checkpoint), seed=0)
    if isinstance(material, Prompts):
        raise InvalidCalibration("The file has prompts alone, which give nothing to measure.")
    tokens = material.tokens if isinstance(material, Text) else torch.cat(material.documents)
    return _windows(tokens, min(length, tokens.numel() // SAFE_WINDOWS))


@dataclass(frozen=True, slots=True)
class _Halves:
    """Two streams of tokens (n,) int64 without a document in common."""

    train: Tensor
    held_out: Tensor


_Part = Text | _Halves | Prompts | None
"""What a source gives; None: text that is yet to be sampled."""


def _split(conversations: Conversations, seed: int) -> _Halves:
    """About `HELD_OUT` of the tokens held out, at least one document, never most of them."""
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
    return _Halves(
        torch.cat([documents[index] for index in train]),
        torch.cat([documents[index] for index in order.tolist() if index in held]),
    )


def _window_length(materials: Sequence[_Part], length: int) -> int:
    """The longest window up to `length` that every file fills.

    Raises:
        InvalidCalibration: a file is too short for any.
    """
    sizes = []
    for material in materials:
        if isinstance(material, Text):
            sizes.append(material.tokens.numel())
            length = min(length, sizes[-1] // 2)
        elif isinstance(material, _Halves):
            sizes.append(material.train.numel() + material.held_out.numel())
            length = min(length, material.held_out.numel(), material.train.numel())
    if sizes:
        length = min(length, max(sizes) // SAFE_WINDOWS)
    if length < MIN_LENGTH:
        raise InvalidCalibration(
            f"The calibration files fill windows of {length} tokens only; at least {MIN_LENGTH} "
            "are needed. Add text, above all to the shortest file."
        )
    return length


def _windows(tokens: Tensor, length: int) -> Tensor:
    """`tokens` as (n, length); a last partial window is dropped."""
    count = tokens.numel() // length
    return tokens[: count * length].view(count, length)


def _held_windows(available: int, limit: int) -> int:
    """How many of `available` windows are held out where at most `limit` calibrate."""
    return max(1, min(int(available * HELD_OUT), limit // 8))


def _cut_text(tokens: Tensor, length: int, limit: int, seed: int) -> tuple[Tensor, Tensor]:
    windows = _windows(tokens, length)
    order = torch.randperm(len(windows), generator=torch.Generator().manual_seed(seed))
    held = _held_windows(len(windows), limit)
    train = order[held : held + limit].sort().values
    return windows[train], windows[order[:held].sort().values]


def _cut_halves(halves: _Halves, length: int, limit: int) -> tuple[Tensor, Tensor]:
    train, held = _windows(halves.train, length), _windows(halves.held_out, length)
    return train[:limit], held[: _held_windows(len(train) + len(held), limit)]


def _sample(
    sampler: Sampler, prompts: Prompts | None, length: int, limit: int
) -> tuple[Tensor, Tensor]:
    held = max(1, limit // 8)
    begun_by = None if prompts is None else prompts.prompts
    streams = sampler.sample(begun_by, length, limit * length, held * length)
    return _windows(streams[0], length)[:limit], _windows(streams[1], length)[:held]


def _hash(train: Tensor, held_out: Tensor) -> str:
    digest = hashlib.sha256(json.dumps([list(train.shape), list(held_out.shape)]).encode())
    for windows in (train, held_out):
        digest.update(windows.contiguous().numpy().astype("<i8", copy=False).tobytes())
    return digest.hexdigest()


def spaced(available: int, wanted: int) -> Tensor:
    """At most `wanted` of `available` windows, (n,) int64, from all over them.

    The sources of a mixture follow one another, and so does a text from its beginning to its end.
    """
    return torch.linspace(0, available - 1, min(available, wanted)).round().long()
