"""Calibration text as token windows of equal length, from files, the fine-tuned model or a mixture.

Each source is split into three disjoint parts by the seed alone, so that every budget has the same
ones: windows that calibrate, that decide between outcomes, and that measure the result. Of running
text, windows are held out; of conversations and sampled text, whole documents.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final, Self

import torch
from safetensors.torch import load, save
from torch import Tensor

from deltadock.compression.calibration.sampling import TextSampler, Watcher, check_fits
from deltadock.compression.calibration.sources import (
    Conversations,
    Prompts,
    Text,
    file_sha256,
    load_tokenizer,
    read_source,
)
from deltadock.compression.checkpoints import CheckpointReader
from deltadock.compression.options import (
    MIN_LENGTH,
    SAMPLED,
    CalibrationOptions,
    CompressOptions,
    Source,
    check_weights,
)
from deltadock.errors import InvalidCalibration
from deltadock.words import counted, duration

REPORT: Final = 0.1
"""Fraction of the windows that measure the result."""
CHOOSE: Final = 1 / 16
"""Fraction of the windows that decide between outcomes."""
MEASURED_TOKENS: Final = 8192
MEASURED_LENGTH: Final = 256
"""Tokens in all and per window of text that is sampled only to measure the result."""
SAFE_WINDOWS: Final = 16
"""Smallest number of windows of a text; shorter texts get shorter windows."""

Parts = tuple[Tensor, Tensor, Tensor]
"""Calibrating, choosing and reporting windows (n, length), or streams of tokens (n,); int64."""


@dataclass(frozen=True, slots=True)
class CalibrationSet:
    """Token windows and their sources.

    Attributes:
        train: (n, length) int64, calibration windows.
        choose: (m, length) int64, windows that decide between outcomes: whether distillation is
            kept, and at which budget a bound on KL or agreement is met.
        report: (k, length) int64, windows that measure the result; they decide nothing.
        sha256: over all three.
        sources: a JSON-able description of each source: kind, sha256 of its file (None if
            there is none), weight, and its tokens in `train` (`tokens`), `choose` and `report`.
        notes: why there are fewer tokens than were asked for, in words.
    """

    train: Tensor
    choose: Tensor
    report: Tensor
    sha256: str
    sources: list[dict[str, Any]]
    notes: list[str] = field(default_factory=list)

    @property
    def tokens(self) -> int:
        """Number of calibration tokens."""
        return self.train.numel()

    @property
    def is_sampled(self) -> bool:
        """Whether the fine-tune has written any of it, which takes long."""
        return any(source["kind"] == "sampled" for source in self.sources)

    def to_bytes(self) -> bytes:
        """As a safetensors file; `sources` and `notes` are its bytes of JSON."""
        words = json.dumps([self.sources, self.notes]).encode()
        parts = {"train": self.train, "choose": self.choose, "report": self.report}
        return save(
            {name: part.contiguous() for name, part in parts.items()}
            | {"json": torch.frombuffer(bytearray(words), dtype=torch.uint8)}
        )

    @classmethod
    def from_bytes(cls, data: bytes) -> Self:
        """What `to_bytes` wrote."""
        found = load(data)
        parts = found["train"], found["choose"], found["report"]
        return cls(*parts, _hash(parts), *json.loads(found["json"].numpy().tobytes()))

    @property
    def measured_on(self) -> list[dict[str, Any]]:
        """The text of `report`, as the report describes it."""
        return [measured_source(one["kind"], one["sha256"], one["report"]) for one in self.sources]


def measured_source(kind: str, sha256: str | None, tokens: int) -> dict[str, Any]:
    """The report's description of a source that figures are measured on."""
    return {"kind": kind, "sha256": sha256, "tokens": tokens}


def load_calibration(
    sources: Sequence[Source],
    checkpoint: Path,
    max_length: int,
    seed: int,
    options: CalibrationOptions | None = None,
    device: str = "cpu",
    progress: Watcher = lambda message, done: None,
    tokenizer_base: Path | None = None,
) -> CalibrationSet:
    """Load windows of a mixture of sources, each limited to its fraction of the tokens.

    Args:
        sources: empty for text sampled from the fine-tuned model.
        checkpoint: the fine-tune's folder.
        max_length: the model's longest sequence in tokens.
        seed: of sampling, held-out windows, and subsampling.
        options: tokens and window length.
        device: torch device that samples.
        progress: called for every sampled token; whatever it raises (`Cancelled`) ends it.
        tokenizer_base: the folder whose tokenizer the fine-tune inherits; None: it has its own.

    Raises:
        InvalidCalibration: a source is too short, empty, not UTF-8 or has an invalid line, or the
            model samples too slowly.
        InvalidCheckpoint: there is no tokenizer.
        UnsupportedModel: the model cannot be sampled from.
    """
    options = options or CalibrationOptions()
    options.check()
    sources = sources or (SAMPLED,)
    check_weights([source.weight for source in sources])
    total_weight = sum(source.weight for source in sources)
    tokenizer = load_tokenizer(checkpoint, tokenizer_base)
    contents: list[_SourceTokens] = []
    for number, source in enumerate(sources, 1):
        progress(f"reading source {number} of {len(sources)}", 0.0)
        found = None if source.path is None else read_source(source.path, tokenizer, seed)
        contents.append(_split(found, seed) if isinstance(found, Conversations) else found)
    length = _window_length(contents, min(options.length, options.tokens, max_length))
    shares = [source.weight / total_weight for source in sources]
    to_sample = [isinstance(content, Prompts | None) for content in contents]
    notes = []
    if any(to_sample):
        sampler = TextSampler(checkpoint, tokenizer, seed, device, progress)
        share = sum(share for share, sample in zip(shares, to_sample, strict=True) if sample)
        for k, content in enumerate(contents):
            if isinstance(content, Prompts | None):
                counts = _sampled_windows(_limit(options, shares[k], length))
                needs = [count * length for count in counts]
                starts = None if content is None else content.prompts
                streams = sampler.sample(starts, length, needs, shares[k] / share)
                contents[k] = _Sampled((streams[0], streams[1], streams[2]))
        if sampler.ran_out:
            sampled = [content for content in contents if isinstance(content, _Sampled)]
            written = sum(part.numel() for content in sampled for part in content.parts)
            notes.append(_ran_out(sampler, written))
            length = _window_length(contents, length, notes[0])
    found_parts: list[Parts] = []
    described = []
    for source, content, share in zip(sources, contents, shares, strict=True):
        limit = _limit(options, share, length)
        if isinstance(content, Text):
            kind, parts = "text", _cut_text(content.tokens, length, limit, seed)
        elif isinstance(content, _Sampled):
            kind, parts = "sampled", _cut_sampled(content, length, limit)
        else:
            assert isinstance(content, _SplitTokens), "all others are sampled by then"
            kind, parts = "conversations", _cut_documents(content, length, limit)
        found_parts.append(parts)
        described.append(
            {
                "kind": kind,
                "sha256": None if source.path is None else file_sha256(source.path),
                "weight": source.weight,
                "tokens": parts[0].numel(),
                "choose": parts[1].numel(),
                "report": parts[2].numel(),
            }
        )
    train, choose, report = (torch.cat(part) for part in zip(*found_parts, strict=True))
    return CalibrationSet(train, choose, report, _hash((train, choose, report)), described, notes)


def _limit(options: CalibrationOptions, share: float, length: int) -> int:
    """How many windows of a source with this share of the tokens may calibrate."""
    return max(1, int(options.tokens * share) // length)


def _ran_out(sampler: TextSampler, tokens: int) -> str:
    return (
        f"The fine-tune wrote {counted(tokens, 'token')} of calibration text in "
        f"{duration(sampler.seconds)}, which is as long as it may take. A text that is given "
        "(`--calibration`) takes no such time."
    )


def sample_windows(
    checkpoint: CheckpointReader,
    max_length: int,
    options: CompressOptions,
    device: str,
    progress: Watcher,
    *,
    tokenizer_base: Path | None = None,
    changes: Mapping[str, Tensor] = MappingProxyType({}),
) -> tuple[Tensor, list[dict[str, Any]], list[str]]:
    """Sample windows (n, length) int64 that only measure, for a compression without a text.

    Returns them, `Report.measured_on`, and notes on why there are fewer than usual. The model's
    memory is free again afterwards.

    Raises:
        InvalidCalibration: the model cannot begin a text, ends every one at once, or is too slow.
        UnsupportedModel: it cannot be run; as `check_fits` and `TextSampler`.
    """
    check_fits(checkpoint.parameters, device)
    tokenizer = load_tokenizer(checkpoint.folder, tokenizer_base)
    sampler = TextSampler(checkpoint.folder, tokenizer, options.seed, device, progress, changes)
    length = min(options.calibration.length, max_length, MEASURED_LENGTH)
    count = max(1, min(options.calibration.tokens // 8, MEASURED_TOKENS) // length)
    (stream,) = sampler.sample(None, length, [count * length])
    notes = [_ran_out(sampler, stream.numel())] if sampler.ran_out else []
    if notes:
        length = _window_length([Text(stream)], length, notes[0])
        count = max(1, stream.numel() // length)
    windows = _windows(stream, length)[:count]
    return windows, [measured_source("sampled", None, windows.numel())], notes


def read_windows(
    path: Path, checkpoint: Path, length: int, tokenizer_base: Path | None = None
) -> Tensor:
    """Read a whole file as windows (n, length) int64; short files give 16 shorter windows.

    Raises:
        InvalidCalibration, InvalidCheckpoint: as `load_calibration`.
    """
    content = read_source(path, load_tokenizer(checkpoint, tokenizer_base), seed=0)
    if isinstance(content, Prompts):
        raise InvalidCalibration("The file has prompts alone, which give nothing to measure.")
    tokens = content.tokens if isinstance(content, Text) else torch.cat(content.documents)
    return _windows(tokens, min(length, tokens.numel() // SAFE_WINDOWS))


@dataclass(frozen=True, slots=True)
class _SplitTokens:
    """Three streams of tokens (n,) int64 without a common document."""

    parts: Parts


class _Sampled(_SplitTokens):
    """Streams that the fine-tune has written, each long enough unless it ran out of time."""


_SourceTokens = Text | _SplitTokens | Prompts | None
"""Tokens or prompts of a source; None: text to sample without prompts."""


def _split(conversations: Conversations, seed: int) -> _SplitTokens:
    """Hold out documents of about `REPORT` and `CHOOSE` of the tokens.

    Each part has at least one document, and at most a third of the tokens unless all documents
    are longer.
    """
    sizes = [document.numel() for document in conversations.documents]
    total = sum(sizes)
    order = torch.randperm(len(sizes), generator=torch.Generator().manual_seed(seed)).tolist()
    held: list[list[int]] = []
    for fraction, parts_left in ((REPORT, 2), (CHOOSE, 1)):
        taken: list[int] = []
        size = 0
        for index in list(order):
            if size >= fraction * total or len(order) == parts_left:
                break
            if 3 * (size + sizes[index]) <= total:
                taken.append(index)
                order.remove(index)
                size += sizes[index]
        if not taken:
            taken = [min(order, key=lambda index: sizes[index])]
            order.remove(taken[0])
        held.append(taken)
    report, choose = held
    train, choosing, reporting = (
        torch.cat([conversations.documents[index] for index in part])
        for part in (order, choose, report)
    )
    return _SplitTokens((train, choosing, reporting))


def _window_length(contents: Sequence[_SourceTokens], length: int, why: str = "") -> int:
    """The longest window length up to `length` that every file, and sampled text, can fill.

    Args:
        contents: the sources.
        length: tokens.
        why: sampled text is short, if it is.

    Raises:
        InvalidCalibration: one is too short for any.
    """
    sizes = []
    for content in contents:
        if isinstance(content, Text):
            sizes.append(content.tokens.numel())
            length = min(length, sizes[-1] // 3)
        elif isinstance(content, _SplitTokens):
            lengths = [tokens.numel() for tokens in content.parts]
            sizes.append(sum(lengths))
            length = min(length, *lengths)
    if sizes:
        length = min(length, max(sizes) // SAFE_WINDOWS)
    if length < MIN_LENGTH:
        if why:
            raise InvalidCalibration(f"{why} These tokens are too few to calibrate on.")
        raise InvalidCalibration(
            f"The calibration files fill windows of {counted(length, 'token')} only; at least "
            f"{MIN_LENGTH} are needed, with one window to calibrate, one to choose and one to "
            "report. Add text, above all to the shortest file."
        )
    return length


def _windows(tokens: Tensor, length: int) -> Tensor:
    """Reshape `tokens` to (n, length), dropping a partial window at the end."""
    count = tokens.numel() // length
    return tokens[: count * length].view(count, length)


def _held_windows(available: int, limit: int) -> tuple[int, int]:
    """Numbers of choosing and reporting windows of `available`, if at most `limit` calibrate."""
    choose = max(1, min(int(available * CHOOSE), limit // 16))
    return choose, max(1, min(int(available * REPORT), limit // 8))


def _cut_text(tokens: Tensor, length: int, limit: int, seed: int) -> Parts:
    windows = _windows(tokens, length)
    order = torch.randperm(len(windows), generator=torch.Generator().manual_seed(seed))
    choose, report = _held_windows(len(windows), limit)
    chosen = order[:report], order[report : report + choose], order[report + choose :][:limit]
    reporting, choosing, train = (windows[part.sort().values] for part in chosen)
    return train, choosing, reporting


def _cut_documents(split: _SplitTokens, length: int, limit: int) -> Parts:
    train, choosing, reporting = (_windows(tokens, length) for tokens in split.parts)
    choose, report = _held_windows(len(train) + len(choosing) + len(reporting), limit)
    return train[:limit], choosing[:choose], reporting[:report]


def _sampled_windows(limit: int) -> tuple[int, int, int]:
    """Numbers of calibrating, choosing and reporting windows to sample."""
    return limit, max(1, limit // 16), max(1, limit // 8)


def _cut_sampled(sampled: _Sampled, length: int, limit: int) -> Parts:
    train, choosing, reporting = (
        _windows(stream, length)[:count]
        for stream, count in zip(sampled.parts, _sampled_windows(limit), strict=True)
    )
    return train, choosing, reporting


def _hash(parts: Parts) -> str:
    digest = hashlib.sha256(json.dumps([list(windows.shape) for windows in parts]).encode())
    for windows in parts:
        digest.update(windows.contiguous().numpy().astype("<i8", copy=False).tobytes())
    return digest.hexdigest()


def spaced(available: int, wanted: int) -> Tensor:
    """Indices (n,) int64 of at most `wanted` of `available` windows, evenly spaced.

    Windows are in the order of sources and texts, so that the first ones would not represent all.
    """
    return torch.linspace(0, available - 1, min(available, wanted)).round().long()
