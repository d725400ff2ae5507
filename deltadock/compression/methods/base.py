"""The interface of a method: deltas of matrices in, encodings and figures for the report out."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from deltadock.artifacts.encodings import Encoded, SvdMatrix, Vectors, encode_svd
from deltadock.artifacts.tensors import decoded_delta
from deltadock.compression.numerics.decomposition import decompose
from deltadock.compression.numerics.gptq import Codes
from deltadock.compression.options import Solver
from deltadock.compression.report import Rank

SAMPLED_RANKS: Final = 32
"""Of each matrix's decomposition, in the report."""


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
        approximation: the delta that it decodes to, (h_out, h_in) float32, on the matrix's device.
        rank, widths, damping, gap, fallbacks, spectrum: as in the `MatrixReport`.
        error: the same; None: it is of the outputs, and not measured yet.
    """

    encoded: Encoded
    approximation: Tensor
    rank: int
    widths: dict[str, int]
    damping: float
    gap: float
    fallbacks: list[str]
    spectrum: list[Rank]
    error: float | None = None


class Prepared(NamedTuple):
    """What a method makes of a matrix once for all budgets.

    Attributes:
        tensors: decomposition and statistics, by name.
        damping: largest that GPTQ used.
        fallback: deviation from the method, in words.
    """

    tensors: Mapping[str, Tensor]
    damping: float = 0.0
    fallback: str | None = None


class MatrixMethod(Protocol):
    """A compression method for linear layers; all calls are for matrices of equal shapes."""

    def ranks(self, bits: float, h_out: int, h_in: int) -> int:
        """Leading ranks that `compress` needs at a budget; 0 if it decomposes nothing."""
        ...

    def prepare(self, tasks: Sequence[MatrixTask], ranks: int) -> list[Prepared]:
        """Decompose the matrices; the tasks' budgets do not count."""
        ...

    def compress(
        self, tasks: Sequence[MatrixTask], prepared: Sequence[Prepared]
    ) -> list[MatrixResult]:
        """Compress the matrices, of which at least the ranks of their budget are prepared."""
        ...


class Direct:
    """A method that decomposes nothing, as a function of matrices of equal shapes."""

    def __init__(
        self, compress_tasks: Callable[[Sequence[MatrixTask]], list[MatrixResult]]
    ) -> None:
        self._compress_tasks = compress_tasks

    def ranks(self, _bits: float, _h_out: int, _h_in: int) -> int:
        return 0

    def prepare(self, tasks: Sequence[MatrixTask], _ranks: int) -> list[Prepared]:
        return [Prepared({}) for _ in tasks]

    def compress(
        self, tasks: Sequence[MatrixTask], _prepared: Sequence[Prepared]
    ) -> list[MatrixResult]:
        return self._compress_tasks(tasks)


def prepare_svd(tasks: Sequence[MatrixTask], ranks: int) -> list[Prepared]:
    """The leading singular triples of the deltas, as the tensors `u`, `s` and `v`; and `rest`, the
    singular values of the ranks after those, as far as they are known.
    """
    return [
        Prepared({"u": one.u, "s": one.s, "v": one.v, "rest": one.rest}, fallback=one.fallback)
        for one in decompose(stacked([task.delta for task in tasks]), ranks)
    ]


def stacked(tensors: Sequence[Tensor]) -> Tensor:
    """The tensors with a new first dimension; a single one is not copied."""
    return tensors[0][None] if len(tensors) == 1 else torch.stack(list(tensors))


def fill(rows: Tensor, count: int) -> Tensor:
    """Add zeros to (r, ...) up to `count` rows."""
    return F.pad(rows, (0, 0) * (rows.ndim - 1) + (0, count - len(rows)))


def sample_spectrum(s: Tensor, u_bits: Tensor, v_bits: Tensor) -> list[Rank]:
    """Up to `SAMPLED_RANKS` of a matrix's ranks, evenly over the logarithm of their place.

    Args:
        s: (r,) singular values, falling, to four digits in the result.
        u_bits, v_bits: (r,) widths of the two vectors; 0 where the rank is dropped.
    """
    if not len(s):
        return []
    places = np.unique(np.geomspace(1, len(s), SAMPLED_RANKS).round().astype(np.int64))
    columns = (values.cpu().numpy()[places - 1].tolist() for values in (s, u_bits, v_bits))
    return [
        (place, float(f"{value:.4g}"), u, v)
        for place, value, u, v in zip(places.tolist(), *columns, strict=True)
    ]


def kept_of_all(prepared: Prepared, bits: Tensor) -> list[Rank]:
    """The spectrum of a matrix of which the leading ranks are kept, with these widths (r,)."""
    s = torch.cat([prepared.tensors["s"], prepared.tensors["rest"]])
    widths = F.pad(bits, (0, len(s) - len(bits)))
    return sample_spectrum(s, widths, widths)


def matrix_result(
    encoded: Encoded,
    *,
    device: torch.device,
    rank: int = 0,
    widths: dict[str, int],
    damping: float = 0.0,
    gap: float = 0.0,
    fallbacks: Sequence[str | None] = (),
    spectrum: Sequence[Rank] = (),
) -> MatrixResult:
    """The result of an encoding, decoded on `device`; `fallbacks` that are None are left out."""
    return MatrixResult(
        encoded,
        decoded_delta(encoded, device),
        rank=rank,
        widths=widths,
        damping=damping,
        gap=gap,
        fallbacks=[fallback for fallback in fallbacks if fallback is not None],
        spectrum=list(spectrum),
    )


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
    spectrum: Sequence[Rank],
) -> MatrixResult:
    """Encode quantized singular vectors of which both sides have the widths `bits`, on the CPU.

    Args:
        task: the matrix.
        u, v: codes of U (r, h_out) and V (r, h_in).
        s: (r,) singular values; both sides' scales are folded into them.
        bits: (r,) widths.
        damping: largest that GPTQ used.
        gap: of the allocation.
        fallbacks: deviations from the method; None is left out.
        spectrum: of all ranks that the method chose from.
    """
    matrix = SvdMatrix(_vectors(u, bits), (s * v.scale * u.scale).cpu().numpy(), _vectors(v, bits))
    return matrix_result(
        encode_svd(matrix, task.dtype),
        device=task.delta.device,
        rank=len(bits),
        widths={str(b): int((bits == b).sum()) for b in sorted(set(bits.tolist()))[::-1]},
        damping=damping,
        gap=gap,
        fallbacks=fallbacks,
        spectrum=spectrum,
    )


def _vectors(codes: Codes, bits: Tensor) -> Vectors:
    """Quantized vectors in the artifact's form, without their scales."""
    return Vectors(codes.codes.cpu().numpy(), bits.numpy(), codes.zero.half().cpu().numpy())
