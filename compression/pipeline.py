"""A whole checkpoint: from two folders to a delta file and its report.

Weights are streamed: one decoder block is in memory at a time, and what was made of a block is
handed to the work store at once, so that an interrupted run goes on where it was. The artifact's
bytes do not depend on how often that happened.
"""

import base64
import hashlib
import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final, Literal, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from artifacts.checkpoint import CheckpointManifest
from artifacts.compatibility import check_same_architecture
from artifacts.encoding import NUMPY_DTYPES, Encoded, encode_exact, encode_rows
from artifacts.reader import Artifact
from artifacts.serial import deserialize, serialize
from artifacts.writer import write_artifact
from compression.allocation import Solver, rank_budget
from compression.calibration import CalibrationSet, MomentCollector, damped, load_calibration
from compression.catalogue import check_method
from compression.forward import BlockwiseModel
from compression.methods.base import MatrixMethod, MatrixTask
from compression.methods.registry import matrix_method
from compression.quality import MergedSource, measure
from compression.report import MatrixReport, Report, TensorReport
from compression.weights import FLOAT_DTYPES, Checkpoint
from deltadock import __version__
from deltadock.errors import InvalidCalibration, NonFiniteWeights, TooLarge

EMBEDDING_BITS: Final = 4
"""Width of an embedding's rows; a tied embedding is the output head as well."""

CARRIED_SUFFIXES: Final = (".json", ".txt", ".model", ".jinja")
MAX_CARRIED_BYTES: Final = 32 * 2**20

Stage = Literal["validating", "calibrating", "compressing", "assembling", "verifying"]


@dataclass(frozen=True, slots=True)
class CompressOptions:
    """What decides an artifact's bytes, apart from the weights and the calibration text.

    Attributes:
        method: a name of `compression.catalogue`.
        bits: code bits per weight of a compressed matrix; None for methods without a budget.
        seed: chooses the calibration windows.
        solver: allocation solver.
    """

    method: str = "adamix"
    bits: float | None = 1.0
    seed: int = 0
    solver: Solver = "exact"


class Progress(NamedTuple):
    """Where a run is: stage, block k of n within it, and the share of the whole run done."""

    stage: Stage
    block: int
    blocks: int
    fraction: float
    message: str


class WorkStore(Protocol):
    """Keeps what was made of each block until the artifact is written."""

    def get(self, key: str) -> bytes | None:
        """What was put under `key`, or None."""
        ...

    def put(self, key: str, data: bytes) -> None:
        """Keep `data` under `key`."""
        ...


class _NoWorkStore:
    def get(self, key: str) -> bytes | None:
        return None

    def put(self, key: str, data: bytes) -> None:
        pass


def _ignore(progress: Progress) -> None:
    pass


SHARES: Final[dict[Stage, tuple[float, float]]] = {
    "validating": (0.0, 0.05),
    "calibrating": (0.05, 0.08),
    "compressing": (0.08, 0.85),
    "assembling": (0.85, 0.88),
    "verifying": (0.88, 1.0),
}
"""Each stage's part of the progress bar."""


@dataclass(slots=True)
class _Run:
    """One compression under way: its inputs, and what has been made so far."""

    base: Checkpoint
    finetuned: Checkpoint
    options: CompressOptions
    report: Callable[[Progress], None]
    encoded: dict[str, Encoded] = field(default_factory=dict)
    matrices: list[MatrixReport] = field(default_factory=list)
    carried: tuple[dict[str, str | None], dict[str, str]] = field(default_factory=lambda: ({}, {}))

    def at(
        self, stage: Stage, block: int, blocks: int, message: str, within: float = 0.0
    ) -> None:
        """Tell where the run is: `block` blocks are done, and the share `within` of the next."""
        begin, end = SHARES[stage]
        fraction = begin + (end - begin) * (block + within) / max(blocks, 1)
        self.report(Progress(stage, block, blocks, fraction, message))

    def changed(self, name: str) -> bool:
        """Whether a tensor differs from the base's, told from its hash."""
        ours, theirs = self.finetuned.entries[name], self.base.entries[name]
        return (ours.sha256, ours.dtype) != (theirs.sha256, theirs.dtype)

    def is_float(self, name: str) -> bool:
        """Whether base and fine-tune both hold plain floats under this name."""
        return {self.finetuned.entries[name].dtype, self.base.entries[name].dtype} <= FLOAT_DTYPES

    def delta(self, name: str) -> Tensor:
        """Fine-tuned minus base, float32."""
        return self.finetuned.tensor(name).float() - self.base.tensor(name).float()


def compress(
    base: Path,
    finetuned: Path,
    out: Path,
    options: CompressOptions,
    *,
    calibration: Path | None,
    progress: Callable[[Progress], None] = _ignore,
    work: WorkStore | None = None,
    device: str = "cpu",
) -> Report:
    """Compress `finetuned` against `base` into the delta file `out`.

    Args:
        base, finetuned: checkpoint folders.
        out: the delta file; appears complete or not at all.
        options: method, budget, seed and solver.
        calibration: .txt or .jsonl file; optional for methods that need none, for which it only
            measures the result.
        progress: told of every step; what it raises (`Cancelled`) ends the run.
        work: keeps finished blocks for a later run with the same inputs.
        device: torch device.

    Raises:
        InvalidInput: a subclass names what is wrong with the input and what to do.
    """
    started = time.monotonic()
    info = check_method(options.method, options.bits)
    if info.needs_calibration and calibration is None:
        raise InvalidCalibration(f"The method {info.name!r} needs a calibration text.")
    method = matrix_method(options.method, options.bits)
    run = _open(base, finetuned, options, progress)
    model = data = None
    if calibration is not None:
        run.at("calibrating", 0, 1, "reading the calibration text")
        model = BlockwiseModel(finetuned, device)
        model.check({name: entry.shape for name, entry in run.finetuned.entries.items()})
        longest = getattr(model.config, "max_position_embeddings", None) or 1 << 30
        data = load_calibration(calibration, finetuned, longest, options.seed)
    if method is not None and model is not None and data is not None:
        _compress_blocks(run, model, data, method, work or _NoWorkStore())
    run.at("assembling", 0, 1, "embeddings, norms and other tensors")
    others = _encode_others(run, model)
    write_artifact(out, run.encoded, _manifest(run, data))
    report = _report(run, out, data, others)
    if model is not None and data is not None:
        with Artifact(out) as artifact:
            quality = measure(
                model,
                data.held_out,
                base=run.base,
                finetuned=run.finetuned,
                delta=MergedSource(run.base, artifact),
                progress=lambda k, n: run.at("verifying", k, n, "comparing outputs"),
            )
        report.set_quality(quality)
    report.seconds = time.monotonic() - started
    return report


def _open(
    base: Path, finetuned: Path, options: CompressOptions, progress: Callable[[Progress], None]
) -> _Run:
    progress(Progress("validating", 0, 1, 0.0, "hashing the checkpoints"))
    run = _Run(Checkpoint(base), Checkpoint(finetuned), options, progress)
    check_same_architecture(run.base.manifest, run.finetuned.manifest)
    run.carried = _carried_files(run.base.manifest, run.finetuned)
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


def _fingerprint(run: _Run, data: CalibrationSet, device: str) -> str:
    inputs = {
        "version": __version__,
        "base": run.base.manifest.digest,
        "finetuned": run.finetuned.manifest.digest,
        "calibration": data.sha256,
        "device": device,
        **asdict(run.options),
    }
    return hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()


def _compress_blocks(
    run: _Run, model: BlockwiseModel, data: CalibrationSet, method: MatrixMethod, work: WorkStore
) -> None:
    fingerprint = _fingerprint(run, data, model.device.type)
    blocks = len(model.blocks) + 1
    run.at("calibrating", 1, 2, "embedding the calibration text")
    states = model.embed(data.train, run.finetuned)
    held = model.embed(data.held_out, run.finetuned)
    for index in range(blocks):
        message = f"block {index + 1} of {blocks}"
        run.at("compressing", index, blocks, message)
        moments, held_moments = MomentCollector(), MomentCollector()
        if index < len(model.blocks):
            names = model.linears[model.blocks[index]]
            states = model.run_block(index, states, run.finetuned, moments)
            held = model.run_block(index, held, run.finetuned, held_moments)
        else:
            # The output head is the last block: it is a linear layer like the others.
            names = [model.head] if model.head is not None else []
            for name in names:
                moments(name, model.final_hidden(states, run.finetuned))
                held_moments(name, model.final_hidden(held, run.finetuned))
        names = [name for name in names if run.changed(name) and run.is_float(name)]
        key = f"{fingerprint}/{index}"
        done = work.get(key)
        if done is not None:
            encoded, notes = deserialize(done)
        else:
            encoded, notes = {}, {}
            for position, name in enumerate(names):
                step = f"{message}, matrix {position + 1} of {len(names)}"
                run.at("compressing", index, blocks, step, within=position / len(names))
                made = _compress_matrix(
                    run, method, name, moments.moment(name), held_moments.moment(name)
                )
                if made is not None:
                    encoded[name], notes[name] = made
            work.put(key, serialize(encoded, notes))
        run.encoded.update(encoded)
        run.matrices.extend(MatrixReport(**notes[name]) for name in names if name in notes)
        run.at("compressing", index + 1, blocks, message)


def _compress_matrix(
    run: _Run, method: MatrixMethod, name: str, moment: Tensor, held_moment: Tensor
) -> tuple[Encoded, dict[str, Any]] | None:
    """One matrix's encoding and report; None where it is smaller than the budget's granularity."""
    delta = run.delta(name)
    bits = run.options.bits
    assert bits is not None, "a matrix method always has a budget"
    if rank_budget(bits, *delta.shape) < 2:
        return None
    moment = damped(moment.cpu())
    result = method(
        MatrixTask(name, delta, moment, run.finetuned.entries[name].dtype, bits, run.options.solver)
    )
    error = _output_error(delta, result.approximation, held_moment.cpu())
    notes = {
        "name": name,
        "shape": list(delta.shape),
        "kind": result.encoded.record["kind"],
        "bytes": result.encoded.nbytes,
        "error": error,
        **result.notes,
    }
    return result.encoded, notes


def _output_error(delta: Tensor, approximation: Tensor, moment: Tensor) -> float:
    """`||(D - D_hat) X||^2 / ||D X||^2` on held-out tokens."""

    def energy(matrix: Tensor) -> float:
        matrix = matrix.double()
        return float(((matrix @ moment) * matrix).sum())

    return energy(delta - approximation) / max(energy(delta), 1e-300)


def _encode_others(run: _Run, model: BlockwiseModel | None) -> list[TensorReport]:
    """Every changed tensor that no method took: embeddings row by row, the rest exactly."""
    others = []
    for name, entry in run.finetuned.entries.items():
        if name in run.encoded or not run.changed(name):
            continue
        lossy = run.options.method != "exact"
        if lossy and model is not None and name == model.embedding and run.is_float(name):
            encoded = encode_rows(run.delta(name).numpy(), EMBEDDING_BITS, entry.dtype, {})
        else:
            raw = run.finetuned.tensor(name).contiguous().reshape(-1).view(torch.uint8).numpy()
            encoded = encode_exact(
                raw.reshape(-1).view(np.dtype(NUMPY_DTYPES[entry.dtype])), entry.dtype, entry.shape
            )
        run.encoded[name] = encoded
        others.append(TensorReport(name, encoded.record["kind"], list(entry.shape), encoded.nbytes))
    return others


def _carried_files(
    base: CheckpointManifest, tuned: Checkpoint
) -> tuple[dict[str, str | None], dict[str, str]]:
    """Config and tokenizer files that differ from the base's.

    Returns:
        Text files (None: the fine-tune has none of this name), and others in base64.

    Raises:
        TooLarge: together they are over `MAX_CARRIED_BYTES`.
    """
    before = {file.path: file.sha256 for file in base.files}
    after = {file.path: file for file in tuned.manifest.files}
    texts: dict[str, str | None] = {}
    others: dict[str, str] = {}
    size = 0
    for path in sorted(before.keys() | after.keys()):
        if "/" in path or path.endswith(".safetensors.index.json"):
            continue
        if not path.endswith(CARRIED_SUFFIXES):
            continue
        if path not in after:
            texts[path] = None
        elif before.get(path) != after[path].sha256:
            size += after[path].size
            if size > MAX_CARRIED_BYTES:
                raise TooLarge(
                    f"The fine-tune's config and tokenizer files that differ from the base's are "
                    f"over {MAX_CARRIED_BYTES} bytes. Leave out what serving does not need."
                )
            content = (tuned.folder / path).read_bytes()
            try:
                texts[path] = content.decode("utf-8")
            except UnicodeDecodeError:
                others[path] = base64.b64encode(content).decode()
    return texts, others


def _manifest(run: _Run, data: CalibrationSet | None) -> dict[str, Any]:
    texts, others = run.carried
    return {
        "base_digest": run.base.manifest.weights_digest,
        "finetuned_digest": run.finetuned.manifest.weights_digest,
        "model_type": run.base.manifest.config["model_type"],
        "method": run.options.method,
        "nominal_bits": run.options.bits,
        "settings": {"solver": run.options.solver, "embedding_bits": EMBEDDING_BITS},
        "seed": run.options.seed,
        "calibration": None
        if data is None
        else {"sha256": data.sha256, "tokens": data.tokens, "seed": run.options.seed},
        "checkpoint_bytes": run.finetuned.bf16_bytes,
        "parameters": run.finetuned.parameters,
        "version": __version__,
        "files": texts,
        "binary_files": others,
        "matrices": {
            matrix.name: {
                "error": matrix.error,
                "damping": matrix.damping,
                "fallbacks": matrix.fallbacks,
            }
            for matrix in run.matrices
        },
    }


def _report(
    run: _Run, out: Path, data: CalibrationSet | None, others: list[TensorReport]
) -> Report:
    return Report(
        method=run.options.method,
        nominal_bits=run.options.bits,
        artifact_bytes=out.stat().st_size,
        checkpoint_bytes=run.finetuned.bf16_bytes,
        parameters=run.finetuned.parameters,
        base_digest=run.base.manifest.weights_digest,
        calibration=None
        if data is None
        else {"sha256": data.sha256, "tokens": data.tokens, "seed": run.options.seed},
        matrices=run.matrices,
        other_tensors=others,
    )
