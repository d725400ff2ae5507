"""All matrices of a checkpoint, block by block, kept in the work store as they are finished."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from deltadock.artifacts.encodings import Encoded
from deltadock.artifacts.serial import deserialize, serialize
from deltadock.compression.assembly.composing import composed
from deltadock.compression.assembly.compressors import Compressor, notes_of
from deltadock.compression.report import MatrixReport
from deltadock.compression.run import Run
from deltadock.compression.statistics.collecting import Matrix, Statistics
from deltadock.compression.work import WorkStore


@dataclass(slots=True)
class Encodings:
    """What was made of the matrices: tensors' encodings, and a report of each matrix."""

    tensors: dict[str, Encoded] = field(default_factory=dict)
    reports: list[MatrixReport] = field(default_factory=list)


def encode_blocks(
    run: Run,
    matrices: Sequence[Matrix],
    compressor: Compressor,
    statistics: Statistics | None,
    work: WorkStore,
    fingerprint: str,
) -> Encodings:
    """Encode every block with a compressor that has settled on a budget.

    Args:
        run: the two checkpoints, and who hears of the progress.
        matrices: in the order of the model.
        compressor: what encodes one matrix.
        statistics: what measures the error of each on held-out tokens.
        work: keeps each block.
        fingerprint: names all that decides the blocks' bytes.
    """
    made = Encodings()
    blocks = sorted({matrix.block for matrix in matrices})
    for position, block in enumerate(blocks):
        message = f"block {position + 1} of {len(blocks)}"
        run.at("compressing", position, len(blocks), message)
        members = [matrix for matrix in matrices if matrix.block == block]
        key = f"{fingerprint}/{block}"
        done = work.get(key)
        if done is not None:
            tensors, notes = deserialize(done)
        else:
            notes = {}
            parts: dict[str, Encoded | None] = {}
            for number, matrix in enumerate(members):
                step = f"{message}, matrix {number + 1} of {len(members)}"
                run.at("compressing", position, len(blocks), step, within=number / len(members))
                _encode(run, matrix, compressor, statistics, parts, notes)
            tensors = composed(run, [matrix.ref for matrix in members], parts)
            work.put(key, serialize(tensors, notes))
        made.tensors.update(tensors)
        made.reports.extend(
            MatrixReport(**notes[matrix.ref.key])
            for matrix in members
            if matrix.ref.key in notes and matrix.ref.name in tensors
        )
        run.at("compressing", position + 1, len(blocks), message)
    return made


def _encode(
    run: Run,
    matrix: Matrix,
    compressor: Compressor,
    statistics: Statistics | None,
    parts: dict[str, Encoded | None],
    notes: dict[str, Any],
) -> None:
    delta = run.matrix_delta(matrix.ref)
    if not delta.any():
        parts[matrix.ref.key] = None
        return
    result = compressor.compress(matrix, delta)
    # A delta beyond what codes and scales can express is kept exactly, as one without a budget is.
    if result is not None and result.approximation.isfinite().all():
        parts[matrix.ref.key] = result.encoded
        notes[matrix.ref.key] = notes_of(matrix, delta, result, statistics)
