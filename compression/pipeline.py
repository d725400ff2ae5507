"""A whole checkpoint: from two folders to a delta file and its report.

Weights are streamed, one decoder block in memory at a time. What was made of a block is handed to
the work store at once, so that an interrupted run goes on where it was. The artifact's bytes do
not depend on how often that happened.
"""

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import torch

from artifacts.reader import Artifact
from artifacts.writer import write_artifact
from compression.adapters import import_delta
from compression.assembling import (
    CarriedFiles,
    carried_files,
    encode_others,
    make_manifest,
    make_report,
)
from compression.blocks import encode_blocks
from compression.calibration import CalibrationSet, load_calibration
from compression.calibration_options import Source
from compression.catalogue import MethodInfo
from compression.compressors import Compressor, EachOnItsOwn, UnderOneBudget
from compression.distillation import distill
from compression.forward import BlockwiseModel
from compression.goal import Goal, goal_for
from compression.methods.registry import matrix_method
from compression.quality import MergedSource, measure
from compression.report import Report, TensorReport
from compression.run import CompressOptions, Progress, Run, open_run
from compression.scratch import Scratch
from compression.search import fit_size, reach_bound
from compression.sizes import carried_bytes, preview, shapes_of
from compression.statistics import Matrix, Statistics, collect, matrices_of
from compression.weights import Grown
from compression.work import NoWorkStore, WorkStore
from deltadock import __version__
from deltadock.errors import InvalidGoal


def _ignore(progress: Progress) -> None:
    pass


def compress(
    base: Path,
    finetuned: Path,
    out: Path,
    options: CompressOptions,
    *,
    calibration: Sequence[Source] | Path | None,
    progress: Callable[[Progress], None] = _ignore,
    work: WorkStore | None = None,
    device: str = "cpu",
) -> Report:
    """Compress `finetuned` against `base` into the delta file `out`.

    Args:
        base, finetuned: checkpoint folders; for the method `lora`, `finetuned` is an adapter's.
        out: the delta file; appears complete or not at all.
        options: method, goal, seed and solver.
        calibration: where the text is from; none is text sampled from the fine-tune for methods
            that need calibration, while for others, for which it measures the result, nothing is.
        progress: told of every step; what it raises (`Cancelled`) ends the run.
        work: keeps finished blocks for a later run with the same inputs.
        device: torch device.

    Raises:
        InvalidInput: a subclass names what is wrong with the input and what to do.
    """
    started = time.monotonic()
    info, _ = goal_for(options.method, **options.goals())
    sources = [Source(calibration)] if isinstance(calibration, Path) else list(calibration or ())
    unfinished = out.with_name(out.name + ".unfinished")
    try:
        if info.imports_adapter:
            report = import_delta(
                base,
                finetuned,
                unfinished,
                options,
                calibration=sources,
                progress=progress,
                device=device,
            )
        else:
            report = _compress(
                (base, finetuned, unfinished), options, sources, progress, work, device
            )
        unfinished.replace(out)
    finally:
        unfinished.unlink(missing_ok=True)
    report.seconds = time.monotonic() - started
    return report


def _compress(
    paths: tuple[Path, Path, Path],
    options: CompressOptions,
    sources: Sequence[Source],
    progress: Callable[[Progress], None],
    work: WorkStore | None,
    device: str,
) -> Report:
    base, finetuned, out = paths
    info, goal = goal_for(options.method, **options.goals())
    measured = goal is not None and goal.kind in ("max_kl", "min_agreement")
    if measured and not (sources or info.needs_calibration):
        raise InvalidGoal(f"{goal} is measured on calibration text. Give some.")
    run = open_run(base, finetuned, options, progress)
    carried = carried_files(run.base.manifest, run.finetuned)
    limit = _most_bytes(run, goal)
    guess = 0.0 if goal is None or limit is None else _first_guess(run, info, goal, limit)
    with Scratch() as scratch:
        maker = _Maker(run, info, scratch, carried, work or NoWorkStore(), device)
        if options.method != "exact" or sources:
            maker.prepare(sources)
        if goal is None or goal.kind == "bits":
            return maker.make(None if goal is None else goal.value, out)
        if limit is None:
            return reach_bound(maker.make, out, maker.info, goal)
        bits = fit_size(
            lambda bits: maker.draft(bits, out), maker.info, limit, guess, maker.weights
        )
        return maker.make(bits, out)


def _most_bytes(run: Run, goal: Goal | None) -> float | None:
    """The bytes that a goal allows; None where it is of another kind."""
    if goal is None or goal.kind not in ("target_bytes", "ratio"):
        return None
    return goal.value if goal.kind == "target_bytes" else run.finetuned.bf16_bytes / goal.value


def _first_guess(run: Run, info: MethodInfo, goal: Goal, limit: float) -> float:
    """The budget to try first for a size.

    Raises:
        InvalidGoal: before any work, where the size is far below all that the method can make.
    """
    manifests = run.finetuned.manifest, run.base.manifest
    shapes, carried = shapes_of(*manifests), carried_bytes(*manifests)
    try:
        return preview(shapes, info.name, goal, carried=carried).bits or 0.0
    except InvalidGoal:
        assert info.bits_min is not None, "a method with a goal has a budget"
        least = preview(shapes, info.name, Goal("bits", info.bits_min), carried=carried)
        # An estimate, which of small models is too high.
        if limit < least.artifact_bytes / 2:
            raise
        return info.bits_min


class _Maker:
    """Everything calibrated once, to make artifacts at any budget from."""

    def __init__(
        self,
        run: Run,
        info: MethodInfo,
        scratch: Scratch,
        carried: CarriedFiles,
        work: WorkStore,
        device: str,
    ) -> None:
        self.run, self.info = run, info
        self._scratch, self._carried, self._work, self._device = scratch, carried, work, device
        self._model: BlockwiseModel | None = None
        self._data: CalibrationSet | None = None
        self._statistics: Statistics | None = None
        self._compressor: Compressor | None = None
        self._matrices: list[Matrix] = []
        self._others: list[TensorReport] = []
        self._drafted: tuple[float | None] | None = None

    @property
    def weights(self) -> int:
        """How many weights the budget is for."""
        entries = self.run.finetuned.entries
        names = {matrix.ref.name for matrix in self._matrices}
        return sum(_size(entries[name].shape) for name in names)

    def prepare(self, sources: Sequence[Source]) -> None:
        """Read the calibration text and gather what the method looks at."""
        run, info = self.run, self.info
        run.at("calibrating", 0, 3, "reading the configuration")
        model = self._model = BlockwiseModel(run.finetuned.folder, self._device)
        model.check({name: entry.shape for name, entry in run.finetuned.entries.items()})
        if sources or info.needs_calibration:
            longest = getattr(model.config, "max_position_embeddings", None) or 1 << 30
            self._data = load_calibration(
                sources, run.finetuned.folder, longest, run.options.seed, run.options.calibration,
                self._device, lambda text, done: run.at("calibrating", 0, 3, text, within=done),
            )  # fmt: skip
        if self._data is not None and (info.needs_calibration or info.needs_gradients):
            self._statistics = collect(
                run, model, self._data, self._scratch, gradients=info.needs_gradients,
                progress=lambda done, text: run.at("calibrating", 1, 3, text, within=done),
            )  # fmt: skip
        self._matrices = matrices_of(run, model, with_embedding=info.needs_gradients)
        method = matrix_method(info.name)
        if method is not None:
            self._compressor = EachOnItsOwn(run, self._statistics, method, model.device)
        elif self._statistics is not None and info.needs_gradients:
            shared = UnderOneBudget(run, self._statistics, model.device)
            self.info = replace(info, bits_min=max(info.bits_min or 0.0, shared.least_bits))
            self._compressor = shared

    def draft(self, bits: float | None, out: Path) -> int:
        """Encode everything at a budget and write it; the artifact's bytes."""
        run = self.run
        run.encoded, run.matrices, run.distilled = {}, [], None
        if self._compressor is not None:
            self._compressor.settle(bits)
            made = encode_blocks(
                run,
                self._matrices,
                self._compressor,
                self._statistics,
                self._work,
                self._fingerprint(bits),
            )
            run.encoded, run.matrices = made.tensors, made.reports
        self._others = encode_others(run, self._model)
        self._drafted = (bits,)
        return self._write(bits, out, 0)

    def make(self, bits: float | None, out: Path) -> Report:
        """An artifact at a budget, and its report."""
        run = self.run
        if self._drafted != (bits,):
            self.draft(bits, out)
        self._drafted = None
        if self.info.distills and self._model is not None and self._data is not None:
            run.encoded, run.distilled = distill(
                run,
                self._model,
                self._data,
                run.encoded,
                lambda done, text: run.at("assembling", 1, 3, text, within=done),
            )
        self._write(bits, out, 2)
        report = make_report(run, bits, out, self._data, self._others)
        self._measure(report, out)
        return report

    def _write(self, bits: float | None, out: Path, step: int) -> int:
        self.run.at("assembling", step, 3, "writing the artifact")
        manifest = make_manifest(self.run, bits, self._data, self._carried)
        write_artifact(out, self.run.encoded, manifest)
        return out.stat().st_size

    def _measure(self, report: Report, out: Path) -> None:
        run, model, data = self.run, self._model, self._data
        if model is None or data is None:
            return
        shapes = {name: entry.shape for name, entry in run.finetuned.entries.items()}
        with Artifact(out) as artifact:
            quality = measure(
                model,
                data.held_out,
                base=Grown(run.base, shapes),
                finetuned=run.finetuned,
                delta=MergedSource(run.base, artifact),
                progress=lambda k, n: run.at("verifying", k, n, "comparing outputs"),
            )
        report.set_quality(quality)

    def _fingerprint(self, bits: float | None) -> str:
        inputs = {
            "versions": [__version__, torch.__version__],
            "base": self.run.base.manifest.digest,
            "finetuned": self.run.finetuned.manifest.digest,
            "calibration": None if self._data is None else self._data.sha256,
            "device": self._device.partition(":")[0],
            **asdict(self.run.options),
            "bits": bits,
        }
        return hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()


def _size(shape: Sequence[int]) -> int:
    size = 1
    for side in shape:
        size *= side
    return size
