"""Encodes a checkpoint at one budget after another, block by block."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Final

import torch

from deltadock.artifacts.encodings import Encoded
from deltadock.artifacts.serial import deserialize, serialize
from deltadock.compression.assembly import (
    EMBEDDING_BITS,
    compose_tensors,
    encode_remaining,
    overflows,
)
from deltadock.compression.checkpoints import CheckpointPair
from deltadock.compression.compressors import Compressor, report_matrix
from deltadock.compression.kept import BlockStore
from deltadock.compression.matrices import DeltaMatrix, Targets
from deltadock.compression.progress import ProgressReporter
from deltadock.compression.report import MatrixReport, TensorReport
from deltadock.compression.statistics import Statistics

BATCH_WEIGHTS: Final = {"cpu": 0, "cuda": 1 << 26}
"""Weights of the blocks that are compressed together."""


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


class Encoder:
    """Encodes the tensors of a pair that differ; encoded blocks are stored at once."""

    def __init__(
        self,
        pair: CheckpointPair,
        targets: Targets,
        compressor: Compressor | None,
        statistics: Statistics | None,
        store: BlockStore,
        progress: ProgressReporter,
        device: str,
    ) -> None:
        """Set up; without a `compressor` every tensor is stored exactly.

        Args:
            pair: the two checkpoints.
            targets: the matrices that the compressor gets.
            compressor: on `device`.
            statistics: what the reports of the matrices measure errors by, if there are any.
            store: keeps encoded blocks.
            progress: reports every group of equal matrices.
            device: torch device.
        """
        self._pair, self._targets, self._compressor = pair, targets, compressor
        self._statistics, self._store = statistics, store
        self._progress, self._device = progress, device

    def encode(self, bits: float | None, key: str) -> Draft:
        """Encode the checkpoint at a budget; blocks are stored under `key`."""
        draft = Draft(bits)
        if self._compressor is not None:
            self._compressor.set_budget(bits)
            self._encode_targets(draft, self._compressor, key)
        self._progress.report("others", 0, 1, "encoding the other tensors")
        others, draft.others = encode_remaining(
            self._pair,
            draft.tensors,
            embedding=self._targets.embedding,
            embedding_bits=None if self._compressor is None else EMBEDDING_BITS,
        )
        draft.tensors |= others
        return draft

    def _encode_targets(self, draft: Draft, compressor: Compressor, key: str) -> None:
        blocks = sorted({matrix.block for matrix in self._targets.matrices})
        for group in self._batches(blocks):
            first, count = blocks.index(group[0]), len(blocks)
            members = [matrix for matrix in self._targets.matrices if matrix.block in group]
            stored = self._store.get(f"{key}/{group[0]}")
            if stored is not None:
                tensors, reports = deserialize(stored)
            else:
                position = first, len(group), count
                tensors, reports = self._encode_blocks(compressor, members, position)
                self._store.put(f"{key}/{group[0]}", serialize(tensors, reports))
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

    def _part(self, block: int) -> str:
        """What a block is to people: one of the model's, or what follows them."""
        blocks = self._targets.blocks
        if block < blocks:
            return f"block {block + 1} of {blocks}"
        return "output head" if block == blocks else "embedding"

    def _batches(self, blocks: Sequence[int]) -> list[list[int]]:
        """Consecutive blocks that are compressed together, on a GPU; one by one on a CPU.

        They depend on nothing but the matrices, so that a resumed compression gives equal bytes.
        """
        limit = BATCH_WEIGHTS[torch.device(self._device).type]
        weights = dict.fromkeys(blocks, 0)
        for matrix in self._targets.matrices:
            weights[matrix.block] += self._pair.weights(matrix.ref)
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
        pair = self._pair
        encodings: dict[str, Encoded | None] = {}
        reports: dict[str, Any] = {}
        by_shape: dict[tuple[tuple[int, ...], str], list[DeltaMatrix]] = {}
        for matrix in members:
            by_shape.setdefault((pair.shape(matrix.ref), matrix.role), []).append(matrix)
        done = 0
        for group in by_shape.values():
            message = f"{self._part(members[0].block)}, matrix {done + 1} of {len(members)}"
            share = (first + count * done / len(members)) / total
            self._progress.report("encoding", first, total, message, share)
            done += len(group)
            matrices, deltas = [], []
            for matrix in group:
                delta = pair.delta(matrix.ref, self._device)
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
        composed = compose_tensors(pair, [matrix.ref for matrix in members], encodings)
        kept = {name: one for name, one in composed.items() if not overflows(pair, name, one)}
        return kept, reports
