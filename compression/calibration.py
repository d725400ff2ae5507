"""Calibration: text in, token windows of equal length out; moments of linear layers' inputs."""

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import torch
from torch import Tensor
from transformers import AutoTokenizer

from deltadock.errors import InvalidCalibration, InvalidCheckpoint

LENGTH: Final = 2048
TOKENS: Final = 128 * LENGTH
"""Most tokens that calibrate; shorter windows mean more of them."""
MIN_TOKENS: Final = 256
TOKENIZER_FILES: Final = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")
MAX_CHARACTERS: Final = 4_000_000
PIECE_CHARACTERS: Final = 40_000
"""Longer texts are sampled in pieces: tokenizing takes hundreds of bytes a character."""
DAMPING: Final = 0.01
HELD_OUT: Final = 0.1
"""Share of the windows that is kept out of calibration and measures the result."""


@dataclass(frozen=True, slots=True)
class CalibrationSet:
    """Token windows: `train` (n, length) and `held_out` (m, length) int64, and the text's hash."""

    train: Tensor
    held_out: Tensor
    sha256: str

    @property
    def tokens(self) -> int:
        """Tokens that calibrate."""
        return self.train.numel()


def read_text(path: Path) -> str:
    """The text of a .txt file, or the joined `text` fields of a .jsonl file.

    Raises:
        InvalidCalibration: not UTF-8, or a line without text.
    """
    try:
        content = path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise InvalidCalibration(
            f"The calibration file is not UTF-8 text (byte {error.start}). Convert it first."
        ) from error
    if path.suffix != ".jsonl":
        return content
    texts = []
    for number, line in enumerate(content.splitlines(), 1):
        if not line.strip():
            continue
        try:
            texts.append(str(json.loads(line)["text"]))
        except (ValueError, KeyError, TypeError) as error:
            raise InvalidCalibration(
                f"Line {number} of the calibration file is not an object with a `text`."
            ) from error
    return "\n".join(texts)


def excerpt(text: str, seed: int) -> str:
    """`text`, or pieces of it chosen by `seed` where it is longer than calibration can use."""
    if len(text) <= MAX_CHARACTERS:
        return text
    pieces = len(text) // PIECE_CHARACTERS
    order = torch.randperm(pieces, generator=torch.Generator().manual_seed(seed))
    chosen = order[: MAX_CHARACTERS // PIECE_CHARACTERS].sort().values.tolist()
    return "".join(text[k * PIECE_CHARACTERS : (k + 1) * PIECE_CHARACTERS] for k in chosen)


def tokenize(text: str, checkpoint: Path, length: int) -> Tensor:
    """`text` as (n, length) windows of the checkpoint's tokens; a last partial window is dropped.

    Shorter text is cut into shorter windows, so that there are at least 16.

    Raises:
        InvalidCalibration: fewer than `MIN_TOKENS` tokens.
        InvalidCheckpoint: there is no tokenizer.
    """
    if not any((checkpoint / name).is_file() for name in TOKENIZER_FILES):
        # transformers would make up an empty one.
        raise InvalidCheckpoint(
            "The fine-tune has no tokenizer; put its tokenizer.json and tokenizer_config.json "
            "beside the weights."
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    except (ValueError, OSError) as error:
        raise InvalidCheckpoint(f"The fine-tune's tokenizer cannot be loaded: {error}") from error
    # Truncation and its warning belong to one prompt; this is a corpus.
    tokenizer.model_max_length = 1 << 60
    tokens = torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"])
    if tokens.numel() < MIN_TOKENS:
        raise InvalidCalibration(
            f"The text has {tokens.numel()} tokens; at least {MIN_TOKENS} are needed, and "
            f"{TOKENS} are recommended for calibration."
        )
    length = min(length, tokens.numel() // 16)
    windows = tokens.numel() // length
    return tokens[: windows * length].view(windows, length)


def load_calibration(path: Path, checkpoint: Path, max_length: int, seed: int) -> CalibrationSet:
    """Windows of a calibration file, chosen by `seed` where there are more than needed.

    Args:
        path: .txt or .jsonl.
        checkpoint: folder with the tokenizer.
        max_length: the model's longest sequence.
        seed: decides which windows are held out and which calibrate.
    """
    text = excerpt(read_text(path), seed)
    windows = tokenize(text, checkpoint, min(LENGTH, max_length))
    order = torch.randperm(len(windows), generator=torch.Generator().manual_seed(seed))
    limit = max(1, TOKENS // windows.shape[1])
    held = max(1, min(int(len(windows) * HELD_OUT), limit // 8))
    train = order[held : held + limit].sort().values
    return CalibrationSet(
        windows[train],
        windows[order[:held].sort().values],
        hashlib.sha256(path.read_bytes()).hexdigest(),
    )


@dataclass(slots=True)
class MomentCollector:
    """Second moments `X X^T` of linear layers' inputs, shared by layers with the same input.

    `moment(name)` is (h_in, h_in) float64. Feed it as a `BlockwiseModel.run_block` observer.
    """

    _sums: dict[str, Tensor] = field(default_factory=dict)
    _owner: dict[str, str] = field(default_factory=dict)
    _last: tuple[Tensor, str] | None = None

    def __call__(self, name: str, inputs: Tensor) -> None:
        """Add one batch of inputs (..., h_in) of layer `name`."""
        if self._last is not None and self._last[0] is inputs:
            self._owner[name] = self._last[1]
            return
        self._owner[name] = name
        self._last = (inputs, name)
        rows = inputs.reshape(-1, inputs.shape[-1]).float()
        product = (rows.t() @ rows).double()
        self._sums[name] = self._sums[name] + product if name in self._sums else product

    def moment(self, name: str) -> Tensor:
        """`X X^T` of the layer's inputs so far, (h_in, h_in) float64."""
        return self._sums[self._owner[name]]


def damped(moment: Tensor) -> Tensor:
    """`moment` plus 1 % of its mean diagonal on the diagonal.

    What the calibration text never excites would otherwise cost nothing, and be given up.
    """
    return moment + DAMPING * moment.diagonal().mean() * torch.eye(len(moment), dtype=moment.dtype)
