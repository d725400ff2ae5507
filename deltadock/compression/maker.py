"""One pair, calibrated once: artifacts at any number of budgets."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

import torch

from deltadock.artifacts.reader import Artifact
from deltadock.artifacts.writer import write_artifact
from deltadock.compression.assembly.assembling import (
    carried_files,
    encode_others,
    make_manifest,
    make_report,
)
from deltadock.compression.assembly.blocks import encode_blocks
from deltadock.compression.assembly.compressors import Compressor, EachOnItsOwn, UnderOneBudget
from deltadock.compression.calibration.options import Source
from deltadock.compression.calibration.windows import CalibrationSet, load_calibration
from deltadock.compression.catalogue import MethodInfo
from deltadock.compression.distillation.training import distill
from deltadock.compression.methods.registry import matrix_method
from deltadock.compression.model.forward import BlockwiseModel
from deltadock.compression.model.weights import Grown
from deltadock.compression.quality import MergedSource, measure
from deltadock.compression.report import Report, TensorReport
from deltadock.compression.run import Run
from deltadock.compression.scratch import Scratch
from deltadock.compression.statistics.collecting import Matrix, Statistics, collect, matrices_of
from deltadock.compression.work import WorkStore
from deltadock.version import __version__


class Maker:
    """Makes artifacts of one pair by one method.

    Attributes:
        run: the pair; how far the artifact at hand is.
        info: the method, with the least budget that this pair's matrices take.
    """

    def __init__(
        self, run: Run, info: MethodInfo, scratch: Scratch, work: WorkStore, device: str
    ) -> None:
        """Nothing is read yet, but the files that travel along.

        Args:
            run: the two checkpoints.
            info: the method.
            scratch: takes what is set aside between blocks.
            work: keeps each finished block.
            device: torch device.
        """
        self.run, self.info = run, info
        self._scratch, self._work, self._device = scratch, work, device
        self._carried = carried_files(run.base.manifest, run.finetuned)
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
