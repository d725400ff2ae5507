"""The interface of a method: one matrix's delta in, its encoding and figures for the report out."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from deltadock.artifacts.encodings import Encoded, SvdMatrix, Vectors, decode_dense, encode_svd
from deltadock.compression.numerics.gptq import Codes
from deltadock.compression.options import Solver


@dataclass(frozen=True, slots=True)
class MatrixTask:
    """One linear layer to compress.

    Attributes:
        name: weight name.
        delta: (h_out, h_in) float32, fine-tuned minus base.
        moment: (h_in, h_in) float64, second moment of the layer's inputs on calibration tokens.
        dtype: the fine-tuned tensor's dtype, safetensors' spelling.
        bits: budget in code bits per weight.
        solver: allocation solver.
    """

    name: str
    delta: Tensor
    moment: Tensor
    dtype: str
    bits: float
    solver: Solver


@dataclass(frozen=True, slots=True)
class MatrixResult:
    """A compressed layer.

    Attributes:
        encoded: the encoding.
        approximation: the delta that it decodes to, (h_out, h_in) float32.
        notes: fields of the `MatrixReport` by name.
    """

    encoded: Encoded
    approximation: Tensor
    notes: dict[str, Any] = field(default_factory=dict)


class MatrixMethod(Protocol):
    """A compression method for one linear layer."""

    def __call__(self, task: MatrixTask) -> MatrixResult: ...


def matrix_result(
    encoded: Encoded,
    *,
    rank: int = 0,
    widths: dict[str, int],
    damping: float = 0.0,
    gap: float = 0.0,
    fallbacks: Sequence[str | None] = (),
) -> MatrixResult:
    """The result of an encoding, decoded; `fallbacks` that are None are left out."""
    notes = {
        "rank": rank,
        "widths": widths,
        "damping": damping,
        "gap": gap,
        "fallbacks": [fallback for fallback in fallbacks if fallback is not None],
    }
    return MatrixResult(encoded, torch.from_numpy(decode_dense(encoded)), notes)


def svd_result(
    task: MatrixTask,
    u: Codes,
    s: Tensor,
    v: Codes,
    bits: Tensor,
    *,
    damping: float,
    gap: float = 0.0,
    fallbacks: Sequence[str | None] = (),
) -> MatrixResult:
    """Encode quantized singular vectors of which both sides have the widths `bits`.

    Args:
        task: the matrix.
        u, v: codes of U (r, h_out) and V (r, h_in).
        s: (r,) singular values; both sides' scales are folded into them.
        bits: (r,) widths.
        damping: largest that GPTQ used.
        gap: of the allocation.
        fallbacks: deviations from the method; None is left out.
    """
    matrix = SvdMatrix(_vectors(u, bits), (s * v.scale * u.scale).cpu().numpy(), _vectors(v, bits))
    return matrix_result(
        encode_svd(matrix, task.dtype),
        rank=len(bits),
        widths={str(b): int((bits == b).sum()) for b in sorted(set(bits.tolist()))[::-1]},
        damping=damping,
        gap=gap,
        fallbacks=fallbacks,
    )


def _vectors(codes: Codes, bits: Tensor) -> Vectors:
    """Quantized vectors in the artifact's form, without their scales."""
    return Vectors(codes.codes.cpu().numpy(), bits.numpy(), codes.zero.half().cpu().numpy())
