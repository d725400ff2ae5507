"""How a method is applied to the matrices of a model: each on its own, or all under one budget."""

from typing import Any, Protocol

import torch
from torch import Tensor

from deltadock.compression.methods import optimix
from deltadock.compression.methods.base import MatrixMethod, MatrixResult, MatrixTask
from deltadock.compression.numerics.budget import Profile, Widths, share
from deltadock.compression.numerics.metric import Metric, weighted_error
from deltadock.compression.numerics.ranks import rank_budget
from deltadock.compression.run import Run
from deltadock.compression.statistics.collecting import Matrix, Statistics
from deltadock.compression.statistics.moments import damped
from deltadock.errors import BitsOutOfRange


class Compressor(Protocol):
    """Compresses matrices at one budget after another."""

    def settle(self, bits: float | None) -> None:
        """Take up a budget: code bits per weight of what is compressed; None for methods that have
        one size only."""
        ...

    def compress(self, matrix: Matrix, delta: Tensor) -> MatrixResult | None:
        """A matrix at the budget taken up; None where the budget is too small for any code."""
        ...


class EachOnItsOwn:
    """Every linear layer gets the same bits per weight; embeddings are not for the method."""

    def __init__(
        self,
        run: Run,
        statistics: Statistics | None,
        method: MatrixMethod,
        device: torch.device,
    ) -> None:
        """Without `statistics` the method looks at no moment."""
        self._run, self._statistics, self._method = run, statistics, method
        self._device = device
        self._bits: float | None = None

    def settle(self, bits: float | None) -> None:
        self._bits = bits

    def compress(self, matrix: Matrix, delta: Tensor) -> MatrixResult | None:
        if self._bits is not None and rank_budget(self._bits, *delta.shape) < 2:
            return None
        key = matrix.ref.key
        if self._statistics is None:
            moment = torch.eye(delta.shape[1], dtype=torch.float64)
        else:
            moment = damped(self._statistics.inputs(key))
        task = MatrixTask(
            key,
            delta.to(self._device),
            moment.to(self._device),
            self._run.finetuned.entries[matrix.ref.name].dtype,
            self._bits or 0.0,
            self._run.options.solver,
        )
        return self._method(task)


class UnderOneBudget:
    """Optimix: linear layers, head and embeddings compete for one budget."""

    def __init__(self, run: Run, statistics: Statistics, device: torch.device) -> None:
        """Profile every matrix."""
        self._run, self._statistics, self._device = run, statistics, device
        self._profiles: dict[str, Profile] = {}
        self._widths: dict[str, Widths] = {}
        self._weights = 0
        self.gap = 0.0
        matrices = statistics.matrices
        for position, matrix in enumerate(matrices):
            message = f"spectrum {position + 1} of {len(matrices)}"
            run.at("calibrating", 2, 3, message, within=position / len(matrices))
            delta = run.matrix_delta(matrix.ref)
            self._weights += delta.numel()
            if delta.any():
                self._profile(matrix, delta)

    @property
    def least_bits(self) -> float:
        """The budget that holds what the matrices take without any code."""
        overhead = sum(profile.overhead for profile in self._profiles.values())
        # A little more, lest rounding takes it back.
        return (overhead + 1) / self._weights if overhead else 0.0

    def _metrics(self, matrix: Matrix, rows: int) -> tuple[Metric, Metric]:
        """B and A; a vocabulary's added rows are not compressed and have no part in B."""
        outputs = self._statistics.outputs(matrix.ref.key).to(self._device)
        outputs = outputs[:rows] if outputs.ndim == 1 else outputs
        inputs = self._statistics.inputs(matrix.ref.key).to(self._device)
        return Metric.of(outputs), Metric.of(inputs)

    def _profile(self, matrix: Matrix, delta: Tensor) -> None:
        key, scratch = matrix.ref.key, self._statistics.scratch
        prepared, profile = optimix.profile(
            delta.to(self._device), *self._metrics(matrix, len(delta))
        )
        for name, tensor in prepared.tensors().items():
            scratch.put(f"{name} {key}", tensor)
        self._profiles[key] = profile

    def settle(self, bits: float | None) -> None:
        assert bits is not None, "one budget for the model needs a budget"
        if bits < self.least_bits:
            raise BitsOutOfRange(
                f"{bits:g} bits a weight do not hold the scales of this model's matrices alone. "
                f"Allow more than {self.least_bits:.3g}."
            )
        shares = share(list(self._profiles.values()), bits * self._weights)
        self._widths = dict(zip(self._profiles, shares.widths, strict=True))
        self.gap = shares.gap

    def compress(self, matrix: Matrix, delta: Tensor) -> MatrixResult:
        key, scratch = matrix.ref.key, self._statistics.scratch
        stored = {
            name: scratch.get(f"{name} {key}", self._device)
            for name in optimix.STORED
            if f"{name} {key}" in scratch
        }
        rows, columns = self._metrics(matrix, len(delta))
        result = optimix.compress(
            delta.to(self._device),
            optimix.Prepared.from_tensors(stored),
            self._widths[key],
            rows,
            columns,
            self._run.finetuned.entries[matrix.ref.name].dtype,
        )
        result.notes["gap"] = self.gap
        if matrix.role == "embedding":
            residual = (delta - result.approximation).double().to(self._device)
            whole = weighted_error(delta.double().to(self._device), rows, columns)
            result.notes["error"] = weighted_error(residual, rows, columns) / whole
        return result


def output_error(delta: Tensor, approximation: Tensor, moment: Tensor) -> float:
    """`||(D - D_hat) X||^2 / ||D X||^2` for inputs X with this second moment."""

    def energy(matrix: Tensor) -> float:
        matrix = matrix.double()
        return float(((matrix @ moment) * matrix).sum())

    return energy(delta - approximation) / max(energy(delta), 1e-300)


def notes_of(
    matrix: Matrix, delta: Tensor, result: MatrixResult, statistics: Statistics | None
) -> dict[str, Any]:
    """What the report says of a matrix."""
    held = None if statistics is None else statistics.held_inputs(matrix.ref.key)
    if held is None or not held.any():
        held = torch.eye(delta.shape[1], dtype=torch.float64)
    planned = [] if statistics is None else statistics.notes.get(matrix.ref.key, [])
    notes = {
        "name": matrix.ref.key,
        "shape": list(delta.shape),
        "kind": result.encoded.record["kind"],
        "bytes": result.encoded.nbytes,
        **result.notes,
    }
    notes.setdefault("error", output_error(delta, result.approximation, held))
    notes["fallbacks"] = [*planned, *notes["fallbacks"]]
    return notes
