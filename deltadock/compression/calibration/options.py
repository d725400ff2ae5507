"""What a compression calibrates with; plain Python, as the api checks it too."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from deltadock.errors import InvalidCalibration

LENGTH: Final = 2048
TOKENS: Final = 128 * LENGTH
MIN_LENGTH: Final = 16
MAX_LENGTH: Final = 1 << 17
MIN_TOKENS: Final = 256
MAX_TOKENS: Final = 1 << 24
MAX_SOURCES: Final = 16


@dataclass(frozen=True, slots=True)
class CalibrationOptions:
    """Most tokens that calibrate, and the window's length in tokens (shorter for short models)."""

    tokens: int = TOKENS
    length: int = LENGTH

    def check(self) -> None:
        """Refuse sizes that cannot be.

        Raises:
            InvalidCalibration: naming the range.
        """
        if not MIN_TOKENS <= self.tokens <= MAX_TOKENS:
            raise InvalidCalibration(
                f"Calibration takes {MIN_TOKENS} to {MAX_TOKENS} tokens, not {self.tokens}."
            )
        if not MIN_LENGTH <= self.length <= MAX_LENGTH:
            raise InvalidCalibration(
                f"A calibration window has {MIN_LENGTH} to {MAX_LENGTH} tokens, not {self.length}."
            )


@dataclass(frozen=True, slots=True)
class Source:
    """One part of the calibration text.

    Attributes:
        path: .txt, or .jsonl whose lines have `text`, `messages`, `prompt` with `completion`, or
            `prompt` alone, which the fine-tuned model continues; None: text that the fine-tuned
            model writes without any.
        weight: its share of the tokens, relative to the other sources'.
    """

    path: Path | None = None
    weight: float = 1.0


SAMPLED: Final = Source()
"""Text sampled from the fine-tuned model: what calibrates where no source is given."""


def check_weights(weights: Sequence[float]) -> None:
    """Refuse a mixture that has no proportions.

    Raises:
        InvalidCalibration: too many parts, or a weight that is not positive and finite.
    """
    if len(weights) > MAX_SOURCES:
        raise InvalidCalibration(f"A mixture has at most {MAX_SOURCES} sources.")
    for weight in weights:
        if not (math.isfinite(weight) and 0 < weight <= 1e6):
            raise InvalidCalibration(
                f"The weight {weight:g} of a calibration source is not above 0 and at most 1e6."
            )
