"""A whole checkpoint: from two folders to a delta file and its report.

Weights are streamed: one decoder block is in memory at a time, and what was made of a block is
handed to the work store at once, so that an interrupted run goes on where it was. The artifact's
bytes do not depend on how often that happened.
"""

import hashlib
import json
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from artifacts.encoding import Encoded
from artifacts.reader import Artifact
from artifacts.serial import deserialize, serialize
from artifacts.writer import write_artifact
from compression.allocation import rank_budget
from compression.assembling import carried_files, encode_others, make_manifest, make_report
from compression.calibration import CalibrationSet, MomentCollector, damped, load_calibration
from compression.catalogue import check_method
from compression.forward import BlockwiseModel
from compression.methods.base import MatrixMethod, MatrixTask
from compression.methods.registry import matrix_method
from compression.quality import MergedSource, measure
from compression.report import MatrixReport, Report
from compression.run import CompressOptions, Progress, Run, open_run
from deltadock import __version__
from deltadock.errors import InvalidCalibration


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
    run = open_run(base, finetuned, options, progress)
    carried = carried_files(run.base.manifest, run.finetuned)
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
    others = encode_others(run, model)
    write_artifact(out, run.encoded, make_manifest(run, data, carried))
    report = make_report(run, out, data, others)
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


def _fingerprint(run: Run, data: CalibrationSet, device: str) -> str:
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
    run: Run, model: BlockwiseModel, data: CalibrationSet, method: MatrixMethod, work: WorkStore
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
    run: Run, method: MatrixMethod, name: str, moment: Tensor, held_moment: Tensor
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
