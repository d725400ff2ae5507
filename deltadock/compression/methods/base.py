"""What a method is: one matrix's delta in, its encoding and what to report out."""

from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor

from deltadock.artifacts.encodings import Encoded
from deltadock.compression.numerics.allocation import Solver


@dataclass(frozen=True, slots=True)
class MatrixTask:
    """One linear layer to compress.

    Attributes:
        name: weight name.
        delta: (h_out, h_in) float32, fine-tuned minus base.
        moment: (h_in, h_in) float64, second moment of the layer's inputs on calibration tokens.
        dtype: the fine-tuned tensor's dtype, safetensors' spelling.
        bits: budget in code bits per weight.
        solver: which allocation solver.
    """

    name: str
    delta: Tensor
    moment: Tensor
    dtype: str
    bits: float
    solver: Solver


@dataclass(frozen=True, slots=True)
class MatrixResult:
    """The encoding, the compressed delta (h_out, h_in) float32, and notes for the report."""

    encoded: Encoded
    approximation: Tensor
    notes: dict[str, Any] = field(default_factory=dict)


class MatrixMethod(Protocol):
    """A compression method for one linear layer."""

    def __call__(self, task: MatrixTask) -> MatrixResult: ...
