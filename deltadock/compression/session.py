"""One checkpoint pair, calibrated once: artifacts at any number of budgets."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from deltadock.artifacts.compatibility import check_not_quantized
from deltadock.artifacts.encodings import Encoded
from deltadock.artifacts.reader import Artifact
from deltadock.artifacts.serial import deserialize, serialize
from deltadock.artifacts.writer import artifact_bytes, write_artifact
from deltadock.compression.assembly import (
    EMBEDDING_BITS,
    build_manifest,
    calibration_record,
    carried_files,
    overflows,
)
from deltadock.compression.calibration.windows import (
    CHOOSE,
    MEASURED_TOKENS,
    REPORT,
    CalibrationSet,
    load_calibration,
    sample_windows,
)
from deltadock.compression.checkpoints import CheckpointPair, ResizedSource
from deltadock.compression.compressors import Compressor, GlobalCompressor, PerMatrixCompressor
from deltadock.compression.confidence import check_tokens
from deltadock.compression.distillation import distill
from deltadock.compression.encoder import Draft, Encoder
from deltadock.compression.kept import (
    BlockStore,
    Keys,
    NothingKept,
    changed_segments,
    with_segments,
)
from deltadock.compression.matrices import Targets
from deltadock.compression.methods.registry import matrix_method
from deltadock.compression.model.forward import BlockwiseModel
from deltadock.compression.options import METHODS, SAMPLED, CompressOptions, Source
from deltadock.compression.progress import ProgressReporter
from deltadock.compression.quality import MergedSource, base_model, measure
from deltadock.compression.report import Quality, Report, not_measured
from deltadock.compression.scratch import Scratch
from deltadock.compression.statistics import Statistics, collect
from deltadock.compression.work import ExpectedWork, mean_side
from deltadock.errors import InvalidInput, UnsupportedModel

NO_WEIGHTS: Final = "No weight differs from the base's: the delta has files of the model only."


class CompressionSession:
    """Compresses one pair by one method at any number of budgets.

    Attributes:
        pair: the two checkpoints.
        info: the method, with the smallest budget that this pair's matrices allow.
    """

    def __init__(
        self,
        pair: CheckpointPair,
        options: CompressOptions,
        sources: Sequence[Source],
        scratch: Scratch,
        *,
        progress: ProgressReporter | None = None,
        store: BlockStore | None = None,
        device: str = "cpu",
        reserve: float | None = None,
    ) -> None:
        """Calibrate: load the text and collect the statistics that the method needs.

        Without text, a model that cannot be run is compressed by the names of its tensors.

        Args:
            pair: the two checkpoints.
            options: method, seed, solver and amount of calibration text; of its goal, only how long
                a search for it may take, and whether the text can vouch for it.
            sources: of the calibration text; empty for text sampled from the fine-tune, if the
                method needs any.
            scratch: holds intermediate tensors.
            progress: reports every step.
            store: keeps encoded blocks, distilled scales, and text that was sampled, for a later
                session with the same inputs. Not the statistics: those of a 7B model take tens of
                gigabytes, more than a pass over the text costs.
            device: torch device.
            reserve: budget up to which matrices are decomposed once for all; None for one budget.

        Raises:
            InvalidGoal: the text is too short for a bound.
            UnsupportedModel: weights are quantized, and the method is not lossless; or the method
                must run the model, which cannot be run.
        """
        self.pair, self.info = pair, METHODS[options.method]
        if not self.info.is_lossless:
            check_not_quantized(pair.base.manifest.config)  # the fine-tune is stored alike
        self._options, self._scratch, self._device = options, scratch, device
        self._progress, self._reserve = progress or ProgressReporter(), reserve
        self._store = NothingKept() if store is None else store
        self._keys = Keys(pair, options, device, reserve)
        self._carried = carried_files(pair.base.manifest, pair.finetuned)
        self._draft: Draft | None = None
        self._trials = 0
        _, goal = options.check()
        entries = pair.finetuned.entries.items()
        side = mean_side([(entry.shape, pair.changed(name)) for name, entry in entries])
        self._work = ExpectedWork(self.info, goal, side, MEASURED_TOKENS)
        calibrates = bool(sources) or self.info.needs_calibration
        self._data = self._load_calibration(sources or (SAMPLED,)) if calibrates else None
        self._statistics = self._collect()
        self._targets = self._find_targets()
        compressor = self._make_compressor()
        if isinstance(compressor, GlobalCompressor):
            least = max(self.info.bits_min or 0.0, compressor.least_bits)
            self.info = replace(self.info, bits_min=least)
        self._encoder = Encoder(
            pair, self._targets, compressor, self._statistics, self._store, self._progress, device
        )

    @cached_property
    def _model(self) -> BlockwiseModel:
        """The fine-tune's skeleton; raises UnsupportedModel if it cannot be run."""
        finetuned = self.pair.finetuned
        model = BlockwiseModel(
            finetuned.folder, self._device, finetuned.entries, finetuned.vocabulary
        )
        model.check(finetuned.shapes)
        return model

    @property
    def budgeted_weights(self) -> int:
        """Number of weights that the budget is for."""
        entries, names = self.pair.finetuned.entries, {m.ref.name for m in self._targets.matrices}
        return sum(math.prod(entries[name].shape) for name in names)

    def _load_calibration(self, sources: Sequence[Source]) -> CalibrationSet:
        """Load the text; before and after it, say what there is to do.

        Text that was sampled is kept for a later session: it takes long, and is small.
        """
        options, progress, max_length = self._options, self._progress, self._model.max_length
        key = self._keys.text(sources, max_length)
        kept = self._store.get(key)
        weights = sum(source.weight for source in sources)
        sampled = sum(source.weight for source in sources if source.path is None) / weights
        if sampled and kept is None:  # which takes long; files are read in a moment
            tokens = options.calibration.tokens
            self._work = replace(
                self._work, sampled=sampled * tokens, train=tokens, choose=tokens * CHOOSE,
                report=tokens * REPORT,
            )  # fmt: skip
            progress.expect(self._work.text() | self._work.calibration() | self._work.trials())
        if kept is not None:
            data = CalibrationSet.from_bytes(kept)
        else:
            data = load_calibration(
                sources, self.pair.finetuned.folder, max_length, options.seed,
                options.calibration, self._device,
                lambda text, done: progress.report("text", 0, 1, text, done),
                self.pair.tokenizer_base,
            )  # fmt: skip
            if data.is_sampled:
                self._store.put(key, data.to_bytes())
        self._work = replace(
            self._work, train=data.tokens, choose=data.choose.numel(), report=data.report.numel()
        )
        _, goal = options.check()
        if goal is not None and goal.is_bound:
            check_tokens(goal, *data.choose.shape)
        progress.expect(self._work.calibration() | self._work.trials())
        return data

    def _collect(self) -> Statistics | None:
        if self._data is None or not self.info.needs_calibration:
            return None
        return collect(
            self.pair, self._model, self._data, self._scratch,
            gradients=self.info.needs_gradients, seed=self._options.seed, progress=self._progress,
        )  # fmt: skip

    def _find_targets(self) -> Targets:
        if self.info.is_lossless:
            return Targets.none(self.pair)
        try:
            model = self._model
        except UnsupportedModel:
            return Targets.by_name(self.pair)
        return Targets.of_model(self.pair, model, with_embedding=self.info.needs_gradients)

    def _make_compressor(self) -> Compressor | None:
        """None for a lossless method."""
        method = matrix_method(self.info.name)
        if method is not None:
            return PerMatrixCompressor(
                self.pair, self._statistics, self._scratch, method, self._options.solver,
                torch.device(self._device), reserve=self._reserve,
            )  # fmt: skip
        if self._statistics is None:
            return None
        return GlobalCompressor(
            self.pair, self._statistics, self._scratch, self._model.device, self._progress
        )

    def draft_bytes(self, bits: float | None) -> int:
        """Encode everything at a budget and return the size of its artifact in bytes.

        Distillation changes the values of scales, never their number or dtype: the size is final.
        """
        draft = self._encode(bits)
        return artifact_bytes(draft.tensors, self._manifest(draft))

    def compress(self, bits: float | None, out: Path) -> Report:
        """Write the artifact at a budget; the report has no figures of the whole model yet."""
        draft, distillation = self._encode(bits), None
        if not self._work.measures_trials:
            self._progress.expect(self._work.finish())
        tensors = draft.tensors
        if self.info.distills and self._data is not None:
            trained, distillation = self._distilled(draft, self._data)
            tensors = {
                name: one if trained[name] is one or overflows(self.pair, name, trained[name])
                else trained[name]
                for name, one in tensors.items()
            }  # fmt: skip
        self._progress.report("writing", 0, 1, "writing the artifact")
        write_artifact(out, tensors, self._manifest(draft))
        return Report(
            method=self._options.method,
            nominal_bits=bits,
            artifact_bytes=out.stat().st_size,
            checkpoint_bytes=self.pair.finetuned.bf16_bytes,
            parameters=self.pair.finetuned.parameters,
            base_digest=self.pair.base.manifest.weights_digest,
            calibration=calibration_record(self._data, self._options.seed),
            distillation=distillation,
            matrices=draft.matrices,
            other_tensors=draft.others,
            notes=[
                *self.pair.notes,
                *([] if self._data is None else self._data.notes),
                *([] if draft.matrices or draft.others else [NO_WEIGHTS]),
            ],
        )

    def _distilled(
        self, draft: Draft, data: CalibrationSet
    ) -> tuple[Mapping[str, Encoded], dict[str, float]]:
        """What `distill` makes of a draft; its scales are kept for a later session.

        They are small, and a search for a bound trains those of every budget it tries.
        """
        key = f"{self._key(draft.bits)}/scales"
        stored = self._store.get(key)
        if stored is not None:
            self._progress.report("distillation", 1, 1, "scales of an earlier run", saved=True)
            scales, figures = deserialize(stored)
            return with_segments(draft.tensors, scales), figures
        trained, figures = distill(
            self.pair,
            self._model,
            data,
            draft.tensors,
            self._options.seed,
            lambda done, text: self._progress.report("distillation", 0, 1, text, done),
            None if self._statistics is None else self._statistics.last_states(),
            self._scratch.parent,
        )
        self._store.put(key, serialize(changed_segments(draft.tensors, trained), figures))
        return trained, figures

    def attempt(self, bits: float | None, out: Path) -> tuple[Report, Quality]:
        """Write the artifact at a budget, and measure it on the choosing windows."""
        report = self.compress(bits, out)
        assert self._data is not None, "a bound needs calibration text"
        return report, self._quality(out, self._data.choose)

    def measure(self, report: Report, out: Path) -> None:
        """Measure the final artifact on the reporting windows of the calibration text.

        Without a text, text sampled from the fine-tune takes its place; a note in the report says
        why if none can be.
        """
        progress = self._progress
        progress.expect(self._work.check())
        if self._data is not None:
            known = None if self._statistics is None else self._statistics.held_last_states()
            quality = self._quality(out, self._data.report, known)
            report.set_quality(quality, self._data.measured_on)
            return
        try:
            windows, measured_on, notes = sample_windows(
                self.pair.finetuned, self._model.max_length, self._options, self._device,
                lambda text, done: progress.report("sampling", 0, 1, text, done),
                tokenizer_base=self.pair.tokenizer_base,
            )  # fmt: skip
            quality = self._quality(out, windows)
        except InvalidInput as error:
            report.notes.append(not_measured(error))
            return
        report.notes += notes
        report.set_quality(quality, measured_on)

    def _encode(self, bits: float | None) -> Draft:
        """Encode the checkpoint at a budget; the draft of the last budget is kept."""
        if self._draft is None or self._draft.bits != bits:
            self._draft = None  # its memory is free before the next is encoded
            self._progress.expect(self._work.trials(self._trials))
            self._trials += 1
            self._draft = self._encoder.encode(bits, self._key(bits))
        return self._draft

    def _key(self, bits: float | None) -> str:
        return self._keys.draft(bits, None if self._data is None else self._data.sha256)

    def _manifest(self, draft: Draft) -> dict[str, Any]:
        return build_manifest(
            self.pair.base,
            self._options,
            self._carried,
            finetuned_digest=self.pair.finetuned.manifest.weights_digest,
            parameters=self.pair.finetuned.parameters,
            bits=draft.bits,
            data=self._data,
            settings={"solver": self._options.solver, "embedding_bits": EMBEDDING_BITS},
            matrices=draft.matrices,
        )

    def _quality(self, out: Path, windows: Tensor, known: Tensor | None = None) -> Quality:
        pair, model = self.pair, self._model
        with Artifact(out) as artifact:
            return measure(
                model,
                base_model(model, pair.base, pair.finetuned),
                windows,
                base=ResizedSource(pair.base, pair.finetuned.shapes),
                finetuned=pair.finetuned,
                delta=MergedSource(pair.base, artifact, model.device),
                known=known,
                progress=lambda k, n: self._progress.report("comparing", k, n, "comparing outputs"),
            )
