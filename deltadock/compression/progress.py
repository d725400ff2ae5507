"""Progress of a compression: its phases, each a share of the whole by the work expected of it."""

import time
from collections.abc import Callable, Mapping
from itertools import accumulate, pairwise
from types import MappingProxyType
from typing import Final, Literal, NamedTuple

Stage = Literal["validating", "calibrating", "compressing", "assembling", "verifying"]

Phase = Literal[
    "reading", "text", "inputs", "gradients", "spectra", "encoding", "others", "distillation",
    "writing", "sampling", "comparing", "later",
]  # fmt: skip
"""Parts of a compression in their order; `later` stands for further trials of a search."""

STAGES: Final[Mapping[Phase, Stage]] = MappingProxyType(
    {
        "reading": "validating",
        "text": "calibrating",
        "inputs": "calibrating",
        "gradients": "calibrating",
        "spectra": "calibrating",
        "encoding": "compressing",
        "others": "assembling",
        "distillation": "assembling",
        "writing": "assembling",
        "sampling": "assembling",
        "comparing": "verifying",
    }
)
"""The stage of a job that a phase belongs to."""

PREDICTABLE: Final = 0.1
"""Fraction of a run's part of the work after which its rate predicts the end."""

READING: Final = 0.03
"""Share of reading both checkpoints, after which what else there is to do is known."""


class Progress(NamedTuple):
    """Progress of a compression.

    Attributes:
        phase: what is done now.
        block, blocks: steps of it that are done, and all; when encoding, blocks of the model.
        fraction: of the whole, 0 to 1; it never falls.
        worked: what this run has worked of that since it read the checkpoints: without what was
            saved by an earlier one.
        message: for people; from the first comma on it says where in the block the work is.
    """

    phase: Phase
    block: int
    blocks: int
    fraction: float
    worked: float
    message: str

    @property
    def stage(self) -> Stage:
        """The stage of a job."""
        return STAGES[self.phase]


class Forecast:
    """Predicts how long a run goes on, by the rate of what it has worked itself."""

    def __init__(self) -> None:
        self._began = time.monotonic()

    def seconds_left(self, progress: Progress) -> float | None:
        """The seconds until the end, after each report; None: too little is done to tell."""
        now = time.monotonic()
        if progress.worked == 0.0:
            self._began = now
        left = 1 - progress.fraction
        if not 0 < PREDICTABLE * (progress.worked + left) <= progress.worked:
            return None
        return (now - self._began) * left / progress.worked


class ProgressReporter:
    """Computes the fraction of each step and calls a callback with it."""

    def __init__(self, callback: Callable[[Progress], None] | None = None) -> None:
        """Report to `callback`; whatever it raises (`Cancelled`) ends the compression."""
        self._callback = callback
        self._spans: dict[Phase, tuple[float, float]] = {"reading": (0.0, READING)}
        self._fraction = self._worked = 0.0
        self._last: Progress | None = None
        self._scale: float | None = None
        """The fraction that a unit of work is."""

    def expect(self, work: Mapping[Phase, float]) -> None:
        """Divide the rest among the phases that follow, in proportion to their work.

        Work is in any one unit. Where less is left than the last call expected, the fraction moves
        on, so that the rate of what was done before tells how long the rest takes.
        """
        ends = [0.0, *accumulate(work.values())]
        total = ends[-1] or 1.0
        if self._scale is None:
            self._fraction = READING
        else:
            self._fraction = max(self._fraction, 1 - total * self._scale)
        self._scale = (1 - self._fraction) / total
        places = [1 - self._scale * (total - end) for end in ends]
        self._spans = dict(zip(work, pairwise(places), strict=True))

    def report(
        self,
        phase: Phase,
        block: int,
        blocks: int,
        message: str,
        done: float | None = None,
        *,
        saved: bool = False,
    ) -> None:
        """Report a step.

        Args:
            phase: one of those expected.
            block, blocks: steps of it that are done, and all.
            message: for people.
            done: fraction of the phase, by default that of its steps.
            saved: an earlier run did what was done since the last report.
        """
        if self._callback is None:
            return
        first, last = self._spans.get(phase, (self._fraction, self._fraction))
        within = block / max(blocks, 1) if done is None else done
        fraction = max(self._fraction, first + (last - first) * within)
        if not saved and phase != "reading":
            self._worked += fraction - self._fraction
        self._fraction = fraction
        self._last = Progress(phase, block, blocks, fraction, self._worked, message)
        self._callback(self._last)

    def finish(self) -> None:
        """Report that all is done, where more was expected."""
        if self._callback is not None and self._last is not None and self._fraction < 1.0:
            self._fraction = 1.0
            self._callback(self._last._replace(fraction=1.0))
