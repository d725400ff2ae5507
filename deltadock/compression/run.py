"""One compression: what decides it, where it is, and its two checkpoints."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Literal, NamedTuple

import torch
from torch import Tensor

from deltadock.artifacts.compatibility import check_same_architecture
from deltadock.artifacts.encodings import Encoded
from deltadock.compression.calibration.options import CalibrationOptions
from deltadock.compression.catalogue import default_method
from deltadock.compression.goal import GOAL_KINDS
from deltadock.compression.model.families import check_not_quantized
from deltadock.compression.model.weights import FLOAT_DTYPES, Checkpoint, MatrixRef
from deltadock.compression.numerics.allocation import Solver
from deltadock.compression.report import MatrixReport
from deltadock.errors import NonFiniteWeights

Stage = Literal["validating", "calibrating", "compressing", "assembling", "verifying"]


@dataclass(frozen=True, slots=True)
class CompressOptions:
    """What decides an artifact's bytes, apart from the weights and the calibration text.

    Attributes:
        method: a name of `deltadock.compression.catalogue`.
        bits: code bits per weight of what is compressed; 1.0 where no goal is given.
        target_bytes, ratio, max_kl, min_agreement: the other goals, see `compression.goal.Goal`.
        seed: chooses the calibration windows.
        solver: allocation solver.
        calibration: how much text calibrates.
    """

    method: str = default_method().name
    bits: float | None = None
    target_bytes: int | None = None
    ratio: float | None = None
    max_kl: float | None = None
    min_agreement: float | None = None
    seed: int = 0
    solver: Solver = "exact"
    calibration: CalibrationOptions = field(default_factory=CalibrationOptions)

    def goals(self) -> dict[str, Any]:
        """The goals by name, as `deltadock.compression.goal.goal_for` takes them."""
        return {kind: getattr(self, kind) for kind in GOAL_KINDS}


class Progress(NamedTuple):
    """Where a run is: stage, block k of n within it, and the share of the whole run done."""

    stage: Stage
    block: int
    blocks: int
    fraction: float
    message: str


SHARES: Final[dict[Stage, tuple[float, float]]] = {
    "validating": (0.0, 0.05),
    "calibrating": (0.05, 0.4),
    "compressing": (0.4, 0.75),
    "assembling": (0.75, 0.92),
    "verifying": (0.92, 1.0),
}
"""Each stage's part of the progress bar."""


@dataclass(slots=True)
class Run:
    """One compression under way: its inputs, and what has been made so far."""

    base: Checkpoint
    finetuned: Checkpoint
    options: CompressOptions
    report: Callable[[Progress], None]
    encoded: dict[str, Encoded] = field(default_factory=dict)
    matrices: list[MatrixReport] = field(default_factory=list)
    distilled: dict[str, float] | None = None

    def at(self, stage: Stage, block: int, blocks: int, message: str, within: float = 0.0) -> None:
        """Tell where the run is: `block` blocks are done, and the share `within` of the next."""
        begin, end = SHARES[stage]
        fraction = begin + (end - begin) * (block + within) / max(blocks, 1)
        self.report(Progress(stage, block, blocks, fraction, message))

    def changed(self, name: str) -> bool:
        """Whether a tensor differs from the base's, told from its hash."""
        ours, theirs = self.finetuned.entries[name], self.base.entries[name]
        return (ours.sha256, ours.dtype) != (theirs.sha256, theirs.dtype)

    def content(self, name: str) -> tuple[Any, ...]:
        """Equal for tensors that are copies of each other, in the base and in the fine-tune."""
        both = self.base.entries[name], self.finetuned.entries[name]
        return tuple((entry.sha256, entry.dtype, entry.shape) for entry in both)

    def is_float(self, name: str) -> bool:
        """Whether base and fine-tune both hold plain floats under this name."""
        return {self.finetuned.entries[name].dtype, self.base.entries[name].dtype} <= FLOAT_DTYPES

    def added_rows(self, name: str) -> int:
        """Rows that a larger vocabulary has added to a tensor of the base."""
        ours, theirs = self.finetuned.entries[name].shape, self.base.entries[name].shape
        return ours[0] - theirs[0] if ours else 0

    def delta(self, name: str) -> Tensor:
        """Fine-tuned minus base, float32; added rows are left out."""
        return self.matrix_delta(MatrixRef(name))

    def matrix_delta(self, ref: MatrixRef) -> Tensor:
        """Fine-tuned minus base of a linear map, (h_out, h_in) float32, without added rows."""
        before = self.base.matrix(ref)
        after = self.finetuned.matrix(ref)
        return (after[: len(before)] if after.ndim else after).float() - before.float()


def open_run(
    base: Path, finetuned: Path, options: CompressOptions, progress: Callable[[Progress], None]
) -> Run:
    """Open both checkpoints and see that they belong together and hold nothing but numbers.

    Raises:
        ArchitectureMismatch: the fine-tune is not one of this base.
        UnsupportedModel: weights are quantized, and the method is not `exact`.
        NonFiniteWeights: a tensor holds NaN or an infinity.
    """
    progress(Progress("validating", 0, 1, 0.0, "hashing the checkpoints"))
    run = Run(Checkpoint(base), Checkpoint(finetuned), options, progress)
    check_same_architecture(run.base.manifest, run.finetuned.manifest)
    if options.method != "exact":
        check_not_quantized(run.base.manifest.config)
        check_not_quantized(run.finetuned.manifest.config)
    names = list(run.finetuned.entries)
    for number, name in enumerate(names):
        if number % 64 == 0:
            run.at("validating", number, len(names), "looking for NaN and infinities")
        for checkpoint, owner in ((run.finetuned, "fine-tune"), (run.base, "base")):
            tensor = checkpoint.tensor(name)
            if tensor.is_floating_point() and not torch.isfinite(tensor.float()).all():
                raise NonFiniteWeights(
                    f"Tensor {name!r} of the {owner} holds NaN or an infinity. The training that "
                    "wrote it has diverged; upload an earlier checkpoint."
                )
    return run
