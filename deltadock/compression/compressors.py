"""Apply a method to the matrices of a model, under a per-matrix or a global bit budget."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, Final, Protocol

import torch
from torch import Tensor

from deltadock.compression.checkpoints import CheckpointPair
from deltadock.compression.matrices import DeltaMatrix
from deltadock.compression.methods import optimix
from deltadock.compression.methods.base import (
    MatrixMethod,
    MatrixResult,
    MatrixTask,
    Prepared,
    stacked,
)
from deltadock.compression.numerics.global_allocation import RankProfile, RankWidths, allocate
from deltadock.compression.numerics.metric import Metric, damped, weighted_errors
from deltadock.compression.options import Solver, rank_budget
from deltadock.compression.progress import ProgressReporter
from deltadock.compression.report import MatrixReport
from deltadock.compression.scratch import Scratch
from deltadock.compression.statistics import Statistics
from deltadock.errors import BitsOutOfRange

BATCH_ELEMENTS: Final = {"cpu": 1 << 22, "cuda": 1 << 29}
"""Elements of deltas and moments in one batch of optimix, of which several copies are made."""


class Compressor(Protocol):
    """Compresses matrices at one budget after another."""

    def set_budget(self, bits: float | None) -> None:
        """Set the code bits per compressed weight; None for methods of one size."""
        ...

    def compress(
        self, matrices: Sequence[DeltaMatrix], deltas: Sequence[Tensor]
    ) -> list[MatrixResult | None]:
        """Compress matrices of equal shapes at the budget set, in one batch of calls.

        None if the budget is too small for any code. The deltas are on the compressor's device.
        """
        ...


class PerMatrixCompressor:
    """Gives every linear layer the same bits per weight; embeddings are left out."""

    def __init__(
        self,
        pair: CheckpointPair,
        statistics: Statistics | None,
        scratch: Scratch,
        method: MatrixMethod,
        solver: Solver,
        device: torch.device,
        *,
        reserve: float | None,
    ) -> None:
        """Without `statistics` the method gets the identity as each input moment.

        With a `reserve`, matrices are decomposed once for all budgets up to so many bits per
        weight, and again only where a budget needs twice as many ranks.
        """
        self._pair, self._statistics, self._method = pair, statistics, method
        self._scratch, self._solver, self._device = scratch, solver, device
        self._bits: float | None = None
        self._reserve = reserve
        self._kept: dict[tuple[str, int], tuple[tuple[str, ...], float, str | None]] = {}
        """`Prepared` of a matrix for so many ranks, with names of tensors in the scratch space."""

    def set_budget(self, bits: float | None) -> None:
        self._bits = bits

    def compress(
        self, matrices: Sequence[DeltaMatrix], deltas: Sequence[Tensor]
    ) -> list[MatrixResult | None]:
        shape = h_out, h_in = deltas[0].shape
        if self._bits is not None and rank_budget(self._bits, h_out, h_in) < 2:
            return [None for _ in matrices]
        moments: list[Tensor]
        if self._statistics is None:
            moments = [torch.eye(h_in, dtype=torch.float64, device=self._device)] * len(matrices)
        else:
            inputs = (self._statistics.inputs(m.ref.key, self._device) for m in matrices)
            moments = [damped(moment) for moment in inputs]
        entries = self._pair.finetuned.entries
        tasks = [
            MatrixTask(
                matrix.ref.key, delta, moment, entries[matrix.ref.name].dtype, self._bits or 0.0,
                self._solver,
            )
            for matrix, delta, moment in zip(matrices, deltas, moments, strict=True)
        ]  # fmt: skip
        ranks = self._method.ranks(self._decomposed_bits(), *shape)
        return [*self._method.compress(tasks, self._prepared(tasks, ranks))]

    def _decomposed_bits(self) -> float:
        """The budget that matrices are decomposed for: a function of the budget and the reserve,
        so that results do not depend on the budgets before."""
        bits = self._bits or 0.0
        if self._reserve is None:
            return bits
        return self._reserve * 2.0 ** max(0, math.ceil(math.log2(bits / self._reserve)))

    def _prepared(self, tasks: Sequence[MatrixTask], ranks: int) -> list[Prepared]:
        if self._reserve is None or not ranks:
            return self._method.prepare(tasks, ranks)
        if any((task.name, ranks) not in self._kept for task in tasks):
            for task, made in zip(tasks, self._method.prepare(tasks, ranks), strict=True):
                for name, tensor in made.tensors.items():
                    self._scratch.put(f"{name} {ranks} {task.name}", tensor)
                self._kept[task.name, ranks] = tuple(made.tensors), made.damping, made.fallback
        return [self._restored(task.name, ranks) for task in tasks]

    def _restored(self, key: str, ranks: int) -> Prepared:
        names, damping, fallback = self._kept[key, ranks]
        tensors = {name: self._scratch.get(f"{name} {ranks} {key}", self._device) for name in names}
        return Prepared(tensors, damping, fallback)


class GlobalCompressor:
    """Optimix: the ranks of all layers, head and embeddings compete for one bit budget."""

    def __init__(
        self,
        pair: CheckpointPair,
        statistics: Statistics,
        scratch: Scratch,
        device: torch.device,
        progress: ProgressReporter | None = None,
    ) -> None:
        """Decompose every matrix into `scratch`, and profile its ranks."""
        self._pair, self._statistics = pair, statistics
        self._scratch, self._device = scratch, device
        progress = progress or ProgressReporter()
        self._profiles: dict[str, RankProfile] = {}
        self._widths: dict[str, RankWidths] = {}
        self._gap = 0.0
        matrices = [matrix for matrix in statistics.matrices if pair.weights(matrix.ref)]
        self._weights = sum(pair.weights(matrix.ref) for matrix in matrices)
        done = weights = 0
        for group in self._groups(matrices):
            message = f"spectra, matrix {done + 1} of {len(matrices)}"
            share = weights / self._weights
            progress.report("spectra", done, len(matrices), message, share)
            self._profile(group, [pair.delta(matrix.ref, device) for matrix in group])
            done += len(group)
            weights += sum(pair.weights(matrix.ref) for matrix in group)

    def _groups(self, matrices: Sequence[DeltaMatrix]) -> Iterator[list[DeltaMatrix]]:
        """Matrices of equal shapes and roles, so many as are decomposed in one batch of calls."""
        by_shape: dict[tuple[Any, ...], list[DeltaMatrix]] = {}
        for matrix in matrices:
            by_shape.setdefault((*self._pair.shape(matrix.ref), matrix.role), []).append(matrix)
        for (h_out, h_in, role), group in by_shape.items():
            # The output moment of a head or embedding is diagonal.
            elements = h_out * h_in + h_in**2 + (h_out**2 if role == "linear" else 0)
            count = max(1, BATCH_ELEMENTS[self._device.type] // elements)
            for start in range(0, len(group), count):
                yield group[start : start + count]

    @property
    def least_bits(self) -> float:
        """The smallest budget: bits per weight of the scales alone, without any code."""
        overhead = sum(profile.overhead for profile in self._profiles.values())
        # One bit more, so that rounding cannot bring it below the overhead.
        return (overhead + 1) / self._weights if overhead else 0.0

    def _metrics(self, matrices: Sequence[DeltaMatrix], rows: int) -> tuple[Metric, Metric]:
        """B and A; B without a vocabulary's added rows, which are stored exactly."""
        keys = [matrix.ref.key for matrix in matrices]
        outputs = [self._statistics.outputs(key, self._device) for key in keys]
        outputs = [one[:rows] if one.ndim == 1 else one for one in outputs]
        inputs = [self._statistics.inputs(key, self._device) for key in keys]
        return Metric.of(stacked(outputs)), Metric.of(stacked(inputs))

    def _profile(self, matrices: Sequence[DeltaMatrix], deltas: Sequence[Tensor]) -> None:
        whole = stacked(deltas)
        changed = whole.flatten(1).any(1).tolist()
        made = optimix.profile(whole, *self._metrics(matrices, whole.shape[1]))
        for matrix, different, (decomposed, profile) in zip(matrices, changed, made, strict=True):
            if different:
                for name, tensor in decomposed.tensors().items():
                    self._scratch.put(f"{name} {matrix.ref.key}", tensor)
                self._profiles[matrix.ref.key] = profile

    def set_budget(self, bits: float | None) -> None:
        assert bits is not None, "a global budget needs bits"
        if bits < self.least_bits:
            raise BitsOutOfRange(
                f"{bits:g} bits a weight do not hold the scales of this model's matrices alone. "
                f"Allow more than {self.least_bits:.3g}."
            )
        allocation = allocate(list(self._profiles.values()), bits * self._weights)
        self._widths = dict(zip(self._profiles, allocation.widths, strict=True))
        self._gap = allocation.gap

    def compress(
        self, matrices: Sequence[DeltaMatrix], deltas: Sequence[Tensor]
    ) -> list[MatrixResult | None]:
        given = {matrix.ref.key: delta for matrix, delta in zip(matrices, deltas, strict=True)}
        made: dict[str, MatrixResult] = {}
        for group in self._groups(matrices):
            keys = [matrix.ref.key for matrix in group]
            made |= zip(keys, self._compress(group, [given[key] for key in keys]), strict=True)
        return [made[matrix.ref.key] for matrix in matrices]

    def _compress(
        self, matrices: Sequence[DeltaMatrix], deltas: Sequence[Tensor]
    ) -> list[MatrixResult]:
        whole, entries = stacked(deltas), self._pair.finetuned.entries
        rows, columns = self._metrics(matrices, whole.shape[1])
        results = optimix.compress(
            whole,
            [self._decomposed(matrix.ref.key) for matrix in matrices],
            [self._widths[matrix.ref.key] for matrix in matrices],
            rows,
            columns,
            [entries[matrix.ref.name].dtype for matrix in matrices],
            self._gap,
        )
        if matrices[0].role == "embedding":
            residuals = whole - stacked([result.approximation for result in results])
            left, total = (weighted_errors(x.double(), rows, columns) for x in (residuals, whole))
            errors = (left / total).tolist()
            results = [replace(one, error=e) for one, e in zip(results, errors, strict=True)]
        return results

    def _decomposed(self, key: str) -> optimix.DecomposedMatrix:
        stored = {
            name: self._scratch.get(f"{name} {key}", self._device)
            for name in optimix.STORED
            if f"{name} {key}" in self._scratch
        }
        return optimix.DecomposedMatrix.from_tensors(stored)


def report_matrix(
    matrix: DeltaMatrix, delta: Tensor, result: MatrixResult, statistics: Statistics | None
) -> MatrixReport:
    """The report of a compressed matrix; its error is on the reporting windows if there are any."""
    error = result.error
    if error is None:
        device = delta.device
        held = None if statistics is None else statistics.held_inputs(matrix.ref.key, device)
        if held is None or not held.any():
            held = torch.eye(delta.shape[1], dtype=torch.float64, device=device)
        error = output_error(delta, result.approximation, held)
    calibration = [] if statistics is None else statistics.notes.get(matrix.ref.key, [])
    return MatrixReport(
        name=matrix.ref.key,
        shape=list(delta.shape),
        kind=result.encoded.record["kind"],
        bytes=result.encoded.nbytes,
        error=error,
        rank=result.rank,
        widths=result.widths,
        damping=result.damping,
        gap=result.gap,
        fallbacks=[*calibration, *result.fallbacks],
        spectrum=result.spectrum,
    )


def output_error(delta: Tensor, approximation: Tensor, moment: Tensor) -> float:
    """`||(D - D_hat) X||^2 / ||D X||^2` for inputs X with this second moment."""

    def energy(matrix: Tensor) -> float:
        matrix = matrix.double()
        return float(((matrix @ moment) * matrix).sum())

    return energy(delta - approximation) / max(energy(delta), 1e-300)
