"""Progress of a compression: its stages, each a share of the whole."""

from collections.abc import Callable
from typing import Final, Literal, NamedTuple

Stage = Literal["validating", "calibrating", "compressing", "assembling", "verifying"]

STAGE_FRACTIONS: Final[dict[Stage, tuple[float, float]]] = {
    "validating": (0.0, 0.05),
    "calibrating": (0.05, 0.4),
    "compressing": (0.4, 0.75),
    "assembling": (0.75, 0.92),
    "verifying": (0.92, 1.0),
}
"""Begin and end of each stage as fractions of the whole compression."""


class Progress(NamedTuple):
    """Progress of a compression: stage, block k of n within it, fraction of the whole (0 to 1)."""

    stage: Stage
    block: int
    blocks: int
    fraction: float
    message: str


class ProgressReporter:
    """Computes the overall fraction of each step and calls a callback with it."""

    def __init__(self, callback: Callable[[Progress], None] | None = None) -> None:
        """Report to `callback`; whatever it raises (`Cancelled`) ends the compression."""
        self._callback = callback

    def report(
        self, stage: Stage, block: int, blocks: int, message: str, within: float = 0.0
    ) -> None:
        """Report that `block` blocks are done, and the fraction `within` of the next one."""
        if self._callback is not None:
            begin, end = STAGE_FRACTIONS[stage]
            fraction = begin + (end - begin) * (block + within) / max(blocks, 1)
            self._callback(Progress(stage, block, blocks, fraction, message))
