"""One checkpoint pair, calibrated once: artifacts at any number of budgets."""

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Final, Protocol

import torch
from torch import Tensor

from deltadock.artifacts.compatibility import check_not_quantized
from deltadock.artifacts.encodings import Encoded
from deltadock.artifacts.names import is_embedding
from deltadock.artifacts.reader import Artifact
from deltadock.artifacts.serial import deserialize, serialize
from deltadock.artifacts.writer import artifact_bytes, write_artifact
from deltadock.compression.assembly import (
    EMBEDDING_BITS,
    build_manifest,
    calibration_record,
    carried_files,
    compose_tensors,
    encode_remaining,
    overflows,
)
from deltadock.compression.calibration.sources import file_sha256
from deltadock.compression.calibration.windows import (
    CHOOSE,
    MEASURED_TOKENS,
    REPORT,
    CalibrationSet,
    load_calibration,
    sample_windows,
)
from deltadock.compression.checkpoints import CheckpointPair, MatrixRef, ResizedSource
from deltadock.compression.compressors import (
    Compressor,
    GlobalCompressor,
    PerMatrixCompressor,
    report_matrix,
)
from deltadock.compression.distillation import distill
from deltadock.compression.methods.registry import matrix_method
from deltadock.compression.model.forward import BlockwiseModel
from deltadock.compression.options import (
    METHODS,
    SAMPLED,
    CompressOptions,
    Source,
)
from deltadock.compression.progress import ProgressReporter
from deltadock.compression.quality import MergedSource, base_model, measure
from deltadock.compression.report import MatrixReport, Quality, Report, TensorReport, not_measured
from deltadock.compression.scratch import Scratch
from deltadock.compression.statistics import (
    DeltaMatrix,
    Statistics,
    changed_matrices,
    collect,
    named_matrices,
)
from deltadock.compression.work import ExpectedWork, mean_side
from deltadock.errors import InvalidInput, UnsupportedModel
from deltadock.version import __version__

NO_WEIGHTS: Final = "No weight differs from the base's: the delta has files of the model only."

BATCH_WEIGHTS: Final = {"cpu": 0, "cuda": 1 << 26}
"""Weights of the blocks that are compressed together."""


class BlockStore(Protocol):
    """Stores encoded blocks, so that an interrupted compression can resume."""

    def get(self, key: str) -> bytes | None:
        """Return the data stored under `key`, or None."""
        ...

    def put(self, key: str, data: bytes) -> None:
        """Store `data` under `key`."""
        ...


@dataclass(slots=True)
class Draft:
    """The encodings of a whole checkpoint at one budget, before distillation.

    Attributes:
        bits: the budget; None for methods of one size.
        tensors: encodings by tensor name.
        matrices: reports of the compressed matrices.
        others: reports of the other changed tensors.
    """

    bits: float | None
    tensors: dict[str, Encoded] = field(default_factory=dict)
    matrices: list[MatrixReport] = field(default_factory=list)
    others: list[TensorReport] = field(default_factory=list)


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
        scratch: Scratch,
        *,
        progress: ProgressReporter | None = None,
        store: BlockStore | None = None,
        device: str = "cpu",
        reserve: float | None = None,
    ) -> None:
        """Read the carried files; `prepare` reads the weights.

        Args:
            pair: the two checkpoints.
            options: method, seed, solver and amount of calibration text; of its goal, only how long
                a search for it may take.
            scratch: holds intermediate tensors.
            progress: reports every step.
            store: keeps encoded blocks, distilled scales, and text that was sampled, for a later
                session with the same inputs. Not the statistics: those of a 7B model take tens of
                gigabytes, more than a pass over the text costs.
            device: torch device.
            reserve: budget up to which matrices are decomposed once for all; None for one budget.

        Raises:
            UnsupportedModel: weights are quantized, and the method is not lossless.
        """
        self.pair, self.info = pair, METHODS[options.method]
        if not self.info.is_lossless:
            check_not_quantized(pair.base.manifest.config)  # the fine-tune is stored alike
        self._options, self._scratch, self._store, self._device = options, scratch, store, device
        self._progress, self._reserve = progress or ProgressReporter(), reserve
        self._carried = carried_files(pair.base.manifest, pair.finetuned)
        self._model: BlockwiseModel | None = None
        self._data: CalibrationSet | None = None
        self._statistics: Statistics | None = None
        self._compressor: Compressor | None = None
        self._matrices: list[DeltaMatrix] = []
        self._blocks = 0
        self._draft: Draft | None = None
        self._trials = 0
        _, goal = options.check()
        entries = pair.finetuned.entries.items()
        side = mean_side([(entry.shape, pair.changed(name)) for name, entry in entries])
        self._work = ExpectedWork(self.info, goal, side, MEASURED_TOKENS)

    @property
    def budgeted_weights(self) -> int:
        """Number of weights that the budget is for."""
        entries = self.pair.finetuned.entries
        return sum(math.prod(entries[name].shape) for name in {m.ref.name for m in self._matrices})

    def prepare(self, sources: Sequence[Source]) -> None:
        """Calibrate: load the text and collect the statistics that the method needs.

        Without text, a model that cannot be run is compressed by the names of its tensors.
        """
        pair, info, options = self.pair, self.info, self._options
        if not sources and not info.needs_calibration:
            try:
                self._model = self._open_model()
            except UnsupportedModel:
                self._matrices = named_matrices(pair)
                numbers = (one.block for one in self._matrices if one.role == "linear")
                self._blocks = 1 + max(numbers, default=-1)
                self._compressor = self._per_matrix()
                return
        model = self._model = self._model or self._open_model()
        self._blocks = len(model.blocks)
        if sources or info.needs_calibration:
            self._data = self._load_calibration(sources, model)
        if self._data is not None and info.needs_calibration:
            self._statistics = collect(
                pair, model, self._data, self._scratch, gradients=info.needs_gradients,
                seed=options.seed, progress=self._progress,
            )  # fmt: skip
        self._matrices = changed_matrices(pair, model, with_embedding=info.needs_gradients)
        self._compressor = self._per_matrix()
        if self._compressor is None and self._statistics is not None and info.needs_gradients:
            compressor = GlobalCompressor(
                pair, self._statistics, self._scratch, model.device, self._progress
            )
            self.info = replace(info, bits_min=max(info.bits_min or 0.0, compressor.least_bits))
            self._compressor = compressor

    def _per_matrix(self) -> Compressor | None:
        """The compressor of a method that treats each matrix by itself; None: it does not."""
        method = matrix_method(self.info.name)
        if method is None:
            return None
        return PerMatrixCompressor(
            self.pair, self._statistics, self._scratch, method, self._options.solver,
            torch.device(self._device), reserve=self._reserve,
        )  # fmt: skip

    def _load_calibration(self, sources: Sequence[Source], model: BlockwiseModel) -> CalibrationSet:
        """Load the text; before and after it, say what there is to do.

        Text that was sampled is kept for a later session: it takes long, and is small.
        """
        options, progress = self._options, self._progress
        sources = sources or (SAMPLED,)
        key = f"text/{self._text_fingerprint(sources, model.max_length)}"
        kept = None if self._store is None else self._store.get(key)
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
                sources, self.pair.finetuned.folder, model.max_length, options.seed,
                options.calibration, self._device,
                lambda text, done: progress.report("text", 0, 1, text, done),
                self.pair.tokenizer_base,
            )  # fmt: skip
            if self._store is not None and data.is_sampled:
                self._store.put(key, data.to_bytes())
        self._work = replace(
            self._work, train=data.tokens, choose=data.choose.numel(), report=data.report.numel()
        )
        progress.expect(self._work.calibration() | self._work.trials())
        return data

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
        if self.info.distills and self._model is not None and self._data is not None:
            trained, distillation = self._distilled(draft, self._model, self._data)
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
            notes=[*self.pair.notes, *([] if draft.matrices or draft.others else [NO_WEIGHTS])],
        )

    def _distilled(
        self, draft: Draft, model: BlockwiseModel, data: CalibrationSet
    ) -> tuple[dict[str, Encoded], dict[str, float]]:
        """What `distill` makes of a draft; its scales are kept for a later session.

        They are small, and a search for a bound trains those of every budget it tries.
        """
        key = f"{self._fingerprint(draft.bits)}/scales"
        stored = None if self._store is None else self._store.get(key)
        if stored is not None:
            self._progress.report("distillation", 1, 1, "scales of an earlier run", saved=True)
            scales, figures = deserialize(stored)
            return _with_segments(draft.tensors, scales), figures
        trained, figures = distill(
            self.pair,
            model,
            data,
            draft.tensors,
            self._options.seed,
            lambda done, text: self._progress.report("distillation", 0, 1, text, done),
            None if self._statistics is None else self._statistics.last_states(),
        )
        if self._store is not None:
            self._store.put(key, serialize(_changed_segments(draft.tensors, trained), figures))
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
        if self._data is not None:
            known = None if self._statistics is None else self._statistics.held_last_states()
            self._progress.expect(self._work.measurement())
            quality = self._quality(out, self._data.report, known)
            report.set_quality(quality, self._data.measured_on)
            return
        progress = self._progress
        progress.expect(self._work.measurement())
        try:
            self._model = self._model or self._open_model()
            windows, measured_on = sample_windows(
                self.pair.finetuned, self._model.max_length, self._options, self._device,
                lambda text, done: progress.report("sampling", 0, 1, text, done),
                tokenizer_base=self.pair.tokenizer_base,
            )  # fmt: skip
            quality = self._quality(out, windows)
        except InvalidInput as error:
            report.notes.append(not_measured(error))
            return
        report.set_quality(quality, measured_on)

    def _open_model(self) -> BlockwiseModel:
        finetuned = self.pair.finetuned
        model = BlockwiseModel(finetuned.folder, self._device, finetuned.entries)
        model.check(finetuned.shapes)
        return model

    def _encode(self, bits: float | None) -> Draft:
        """Encode the checkpoint at a budget; the draft of the last budget is kept."""
        if self._draft is not None and self._draft.bits == bits:
            return self._draft
        self._draft = None  # its memory is free before the next is encoded
        draft = Draft(bits)
        self._progress.expect(self._work.trials(self._trials))
        self._trials += 1
        if self._compressor is not None:
            self._compressor.set_budget(bits)
            fingerprint = self._fingerprint(bits)
            blocks = sorted({matrix.block for matrix in self._matrices})
            for group in self._batches(blocks):
                first, count = blocks.index(group[0]), len(blocks)
                members = [matrix for matrix in self._matrices if matrix.block in group]
                key = f"{fingerprint}/{group[0]}"
                stored = None if self._store is None else self._store.get(key)
                if stored is not None:
                    tensors, reports = deserialize(stored)
                else:
                    tensors, reports = self._encode_blocks(
                        self._compressor, members, (first, len(group), count)
                    )
                    if self._store is not None:
                        self._store.put(key, serialize(tensors, reports))
                draft.tensors |= tensors
                draft.matrices += [
                    MatrixReport(**reports[matrix.ref.key])
                    for matrix in members
                    if matrix.ref.key in reports and matrix.ref.name in tensors
                ]
                self._progress.report(
                    "encoding", first + len(group), count, self._part(group[-1]),
                    saved=stored is not None,
                )  # fmt: skip
        self._progress.report("others", 0, 1, "encoding the other tensors")
        others, draft.others = encode_remaining(
            self.pair,
            draft.tensors,
            embedding=self._embedding(),
            embedding_bits=None if self.info.is_lossless else EMBEDDING_BITS,
        )
        draft.tensors |= others
        self._draft = draft
        return draft

    def _embedding(self) -> str | None:
        """The tensor of the input embedding, if known."""
        if self._model is not None:
            return self._model.embedding
        return next((name for name in self.pair.base.entries if is_embedding(name)), None)

    def _part(self, block: int) -> str:
        """What a block is to people: one of the model's, or what follows them."""
        if block < self._blocks:
            return f"block {block + 1} of {self._blocks}"
        return "output head" if block == self._blocks else "embedding"

    def _batches(self, blocks: Sequence[int]) -> list[list[int]]:
        """Consecutive blocks that are compressed together, on a GPU; one by one on a CPU.

        They depend on nothing but the matrices, so that a resumed compression gives equal bytes.
        """
        limit = BATCH_WEIGHTS[torch.device(self._device).type]
        weights = dict.fromkeys(blocks, 0)
        for matrix in self._matrices:
            weights[matrix.block] += self.pair.weights(matrix.ref)
        batches: list[list[int]] = []
        for block in blocks:
            if batches and sum(weights[one] for one in (*batches[-1], block)) <= limit:
                batches[-1].append(block)
            else:
                batches.append([block])
        return batches

    def _encode_blocks(
        self,
        compressor: Compressor,
        members: Sequence[DeltaMatrix],
        position: tuple[int, int, int],
    ) -> tuple[dict[str, Encoded], dict[str, Any]]:
        """Encode the tensors of some blocks; with the report of each of their matrices, as JSON.

        `position`: number of the first block, of these blocks and of all.
        """
        first, count, total = position
        encodings: dict[str, Encoded | None] = {}
        reports: dict[str, Any] = {}
        by_shape: dict[tuple[tuple[int, ...], str], list[DeltaMatrix]] = {}
        for matrix in members:
            by_shape.setdefault((self.pair.shape(matrix.ref), matrix.role), []).append(matrix)
        done = 0
        for group in by_shape.values():
            message = f"{self._part(members[0].block)}, matrix {done + 1} of {len(members)}"
            share = (first + count * done / len(members)) / total
            self._progress.report("encoding", first, total, message, share)
            done += len(group)
            matrices, deltas = [], []
            for matrix in group:
                delta = self.pair.delta(matrix.ref, self._device)
                peak = float(delta.abs().max()) if delta.numel() else 0.0
                if peak == 0.0:
                    encodings[matrix.ref.key] = None
                # Scales as small as this have no precision left: stored exactly.
                elif peak >= torch.finfo(torch.float32).tiny:
                    matrices.append(matrix)
                    deltas.append(delta)
            if not matrices:
                continue
            results = compressor.compress(matrices, deltas)
            for matrix, delta, result in zip(matrices, deltas, results, strict=True):
                # A delta out of the range of codes and scales is stored exactly, as one without a
                # budget is.
                if result is not None and result.approximation.isfinite().all():
                    encodings[matrix.ref.key] = result.encoded
                    report = report_matrix(matrix, delta, result, self._statistics)
                    reports[matrix.ref.key] = asdict(report)
        refs: list[MatrixRef] = [matrix.ref for matrix in members]
        composed = compose_tensors(self.pair, refs, encodings)
        kept = {name: one for name, one in composed.items() if not overflows(self.pair, name, one)}
        return kept, reports

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
        assert model is not None, "windows are loaded together with the model"
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

    def _text_fingerprint(self, sources: Sequence[Source], max_length: int) -> str:
        """SHA-256 (hex) over everything that decides the calibration text."""
        texts = [
            (None if one.path is None else file_sha256(one.path), one.weight) for one in sources
        ]
        inputs = {
            "versions": [__version__, torch.__version__],
            "finetuned": self.pair.finetuned.manifest.digest,
            "tokenizer_of": self.pair.base.manifest.digest if self.pair.tokenizer_base else None,
            "texts": texts,
            "length": max_length,
            "calibration": asdict(self._options.calibration),
            "seed": self._options.seed,
            "device": self._device.partition(":")[0],
        }
        return hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()

    def _fingerprint(self, bits: float | None) -> str:
        """SHA-256 (hex) over everything that decides the blocks' bytes."""
        inputs = {
            "versions": [__version__, torch.__version__],
            "base": self.pair.base.manifest.digest,
            "finetuned": self.pair.finetuned.manifest.digest,
            "calibration": None if self._data is None else self._data.sha256,
            "device": self._device.partition(":")[0],
            **asdict(self._options),
            "bits": bits,
            "reserve": self._reserve,
        }
        return hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()


def _changed_segments(
    before: Mapping[str, Encoded], after: Mapping[str, Encoded]
) -> dict[str, Encoded]:
    """The tensors of `after` with the segments alone that `before` does not share with it."""
    changed = {}
    for name, one in after.items():
        old = before[name].segments
        segments = {key: data for key, data in one.segments.items() if data is not old[key]}
        if segments:
            changed[name] = Encoded(one.record, segments)
    return changed


def _with_segments(
    before: Mapping[str, Encoded], changed: Mapping[str, Encoded]
) -> dict[str, Encoded]:
    """The inverse of `_changed_segments`: its `after`."""
    return {
        name: Encoded(one.record, {**one.segments, **changed[name].segments})
        if name in changed
        else one
        for name, one in before.items()
    }
