"""The work that is expected of each phase of a compression, for its progress.

The unit is one token's pass through the model, its second moments included. What is done for each
token takes a constant number of these. What is done to a matrix takes as many as the harmonic mean
of its sides, times a constant, since a decomposition is to a pass as n^3 is to n^2. The constants
are of the sample on one core; with `benchmarks.compress_model`'s times of a 7B model on an H200
they agree within a factor of two.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final

from deltadock.compression.distillation import STEPS, TOKENS_PER_STEP
from deltadock.compression.options import Goal, MethodInfo
from deltadock.compression.progress import Phase
from deltadock.compression.statistics import GRADIENT_TOKENS

SAMPLING: Final = 2.7
GRADIENTS: Final = 2.3
DISTILLING: Final = 2.5
"""Passes for each token that is sampled, runs backward, or is in a step of distillation."""
COMPARING: Final = 0.8
"""For each token and model that is compared."""
SPECTRA: Final = 60.0
OTHERS: Final = 1.5
ENCODING: Final[Mapping[str, float]] = MappingProxyType(
    {
        "optimix": 75.0,
        "adamix": 25.0,
        "delta-come": 20.0,
        "topk-2": 20.0,
        "topk-32": 20.0,
        "low-rank": 8.0,
        "bitdelta": 4.0,
        "bitdelta-distilled": 4.0,
        "delta-zip": 16.0,
        "gpt-zip": 16.0,
        "exact": 0.0,
    }
)
"""For the mean side of the matrices, by method."""
DRAFTS: Final = 3
TRIALS: Final = 6
"""Budgets that a search for a size, and for a bound on KL or agreement, usually tries."""
MORE: Final = 2
"""Budgets that a search for a bound may still try, however many it has tried."""


def mean_side(shapes: Sequence[tuple[Sequence[int], bool]]) -> float:
    """Harmonic mean of the sides of the matrices that changed, weighted by their weights.

    Matrices that have not changed count as zero.

    Args:
        shapes: of all tensors, each with whether it changed.
    """
    total = weighted = 0.0
    for shape, changed in shapes:
        if len(shape) < 2 or 0 in shape:
            continue
        size, (h_out, h_in) = math.prod(shape), shape[-2:]
        total += size
        weighted += changed * size * 2 * h_out * h_in / (h_out + h_in)
    return weighted / max(total, 1.0)


def comparing(tokens: float, models: int = 3) -> dict[Phase, float]:
    """The work of running so many models on so many tokens, and comparing them."""
    return {"comparing": COMPARING * models * tokens}


def measuring(tokens: float) -> dict[Phase, float]:
    """The work of sampling so many tokens, and comparing the models on them."""
    return {"sampling": SAMPLING * tokens, **comparing(tokens)}


@dataclass(frozen=True, slots=True)
class ExpectedWork:
    """The work of one compression.

    Attributes:
        method: the method.
        goal: None for a method of one size.
        side: see `mean_side`.
        report: tokens that measure the result; without a calibration text they are sampled.
        sampled: tokens that the fine-tune samples for the calibration.
        train, choose: tokens that calibrate, and that decide; 0 without a calibration text.
    """

    method: MethodInfo
    goal: Goal | None
    side: float
    report: float
    sampled: float = 0.0
    train: float = 0.0
    choose: float = 0.0

    @property
    def measures_trials(self) -> bool:
        """Whether the goal is a bound, for which each trial is finished and measured."""
        return self.goal is not None and self.goal.is_bound

    def text(self) -> dict[Phase, float]:
        """Of making the calibration text."""
        return {"text": SAMPLING * self.sampled}

    def calibration(self) -> dict[Phase, float]:
        """Of what comes between the text and the first encoding."""
        work: dict[Phase, float] = {}
        if self.method.needs_calibration:
            work["inputs"] = self.train + self.report
        if self.method.needs_gradients:
            work["gradients"] = GRADIENTS * min(self.train, GRADIENT_TOKENS)
            work["spectra"] = SPECTRA * self.side
        return work

    def draft(self) -> dict[Phase, float]:
        """Of encoding everything at a budget."""
        return {
            "encoding": ENCODING[self.method.name] * self.side,
            "others": OTHERS * self.side,
        }

    def trial(self) -> dict[Phase, float]:
        """Of trying a budget for a bound."""
        return self.draft() | self.finish() | comparing(self.choose)

    def trials(self, done: int = 0) -> dict[Phase, float]:
        """Of all that comes after the calibration and `done` trials of a budget."""
        if self.measures_trials:
            trial = self.trial()
            later = max(TRIALS - 1 - done, MORE) * sum(trial.values())
            return trial | {"later": later + sum(comparing(self.report, 2).values())}
        draft = self.draft()
        if self.goal is not None and self.goal.is_size:
            later = max(DRAFTS - 1 - done, 0) * sum(draft.values())
            return draft | {"later": later} | self.finish()
        return draft | self.finish()

    def check(self) -> dict[Phase, float]:
        """Of measuring the result, and of what follows if it misses the bound."""
        work = self.measurement()
        if self.measures_trials:
            work["later"] = MORE * sum(self.trial().values())
        return work

    def finish(self) -> dict[Phase, float]:
        """Of what comes after the encoding."""
        work: dict[Phase, float] = {}
        if self.method.distills:
            steps = STEPS * TOKENS_PER_STEP
            work["distillation"] = DISTILLING * steps + 4 * COMPARING * self.choose
        work["writing"] = OTHERS * self.side
        return work | self.measurement()

    def measurement(self) -> dict[Phase, float]:
        """Of measuring the result."""
        if not self.train:
            return measuring(self.report)
        # A calibrated method has run the fine-tune on these tokens before.
        return comparing(self.report, 2 if self.method.needs_calibration else 3)
