"""AdaMix: mixed-precision SVD factors with widths allocated by calibrated error.

Source: Xiong et al., "AdaMix: Adaptive Mixed-Precision Delta-Compression with Quantization Error
Optimization for Large Language Models" (arXiv 2506.11087), Algorithm 1. Steps:
1. SVD `D = U diag(s) V`; as no rank costs less than the smallest width, only the leading ranks
   are candidates (App. C.1), and a few spare ones.
2. Every width is simulated in one GPTQ pass: `E[i, b] = s_i^2 (v - v_b) G (v - v_b)^T`. Up to here
   the budget only limits the number of ranks.
3. Widths by 0/1 allocation under the budget (Eq. 10); V_hat is a gather of simulated rows.
4. Target correction (Eq. 8) refits U to the full delta; GPTQ quantizes it, column i at width b_i.
"""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Final, NamedTuple

import torch
from torch import Tensor

from deltadock.compression.methods.base import (
    MatrixResult,
    MatrixTask,
    Prepared,
    fill,
    sample_spectrum,
    stacked,
    svd_result,
)
from deltadock.compression.numerics.allocation import WIDTHS, Allocation, Array, allocate
from deltadock.compression.numerics.decomposition import decompose
from deltadock.compression.numerics.gptq import Codes, quantize_columns, quantize_rows
from deltadock.compression.numerics.metric import mean_of_used
from deltadock.compression.options import rank_budget
from deltadock.compression.report import Rank

F_MAX: Final = 4
SPARE_RANKS: Final = 8
CANDIDATES: Final = tuple(width for width in WIDTHS if width > 0)

RIDGES: Final = (1e-6, 1e-5, 1e-4)
"""Ridge strengths tried in turn, as fractions of the mean diagonal of `A G A^T`."""


class AdaMix:
    """The method. Prepared are U, the singular values, V at every width, and the errors."""

    def ranks(self, bits: float, h_out: int, h_in: int) -> int:
        return rank_budget(bits, h_out, h_in) // min(CANDIDATES) + SPARE_RANKS

    def prepare(self, tasks: Sequence[MatrixTask], ranks: int) -> list[Prepared]:
        decomposed = decompose(stacked([task.delta for task in tasks]), ranks)
        k = max(len(one.s) for one in decomposed)
        v = stacked([fill(one.v, k) for one in decomposed])
        s = stacked([fill(one.s, k) for one in decomposed])
        moments = stacked([task.moment for task in tasks])
        widths = torch.tensor(CANDIDATES).repeat_interleave(k).expand(len(tasks), -1)
        simulated, damping = quantize_rows(v.repeat(1, len(CANDIDATES), 1), widths, moments)
        errors = simulated_errors(v, s, simulated, moments)
        shape = len(tasks), len(CANDIDATES), k
        parts = {"codes": simulated.codes, "scale": simulated.scale, "zero": simulated.zero}
        parts = {name: part.view(*shape, *part.shape[2:]) for name, part in parts.items()}
        return [
            Prepared(
                {
                    **{name: part[number, :, : len(one.s)] for name, part in parts.items()},
                    "u": one.u,
                    "s": one.s,
                    "errors": errors[number, : len(one.s)],
                },
                damping[number],
                one.fallback,
            )
            for number, one in enumerate(decomposed)
        ]

    def compress(
        self, tasks: Sequence[MatrixTask], prepared: Sequence[Prepared]
    ) -> list[MatrixResult]:
        errors = [_considered_errors(*pair) for pair in zip(tasks, prepared, strict=True)]
        with ThreadPoolExecutor() as threads:
            allocations = list(threads.map(_allocate, tasks, errors))
        chosen = [_choose(*pair) for pair in zip(prepared, allocations, strict=True)]
        # Ranks of zeros fill up the matrices that keep fewer.
        most = max(1, *(len(one.bits) for one in chosen))
        v_hat = Codes(
            stacked([fill(one.v.codes, most) for one in chosen]),
            stacked([fill(one.v.scale, most) for one in chosen]),
            stacked([fill(one.v.zero, most) for one in chosen]),
        )
        s = stacked([fill(one.s, most) for one in chosen])
        left = stacked([fill(one.u.t(), most).t() for one in chosen])
        bits = stacked([fill(one.bits, most) for one in chosen]).clamp_min(1)
        corrected, hessians, fallbacks = refit_left_factors(
            stacked([task.delta for task in tasks]),
            left,
            s[:, :, None] * v_hat.decode(),
            stacked([task.moment for task in tasks]),
        )
        u_hat, damping = quantize_columns(corrected, bits, hessians)
        return [
            svd_result(
                tasks[number],
                u_hat[number, torch.arange(len(one.bits))],
                one.s,
                one.v,
                one.bits,
                damping=max(damping[number], prepared[number].damping),
                gap=one.gap,
                fallbacks=[prepared[number].fallback, fallbacks[number]],
                spectrum=one.spectrum,
            )
            for number, one in enumerate(chosen)
        ]


class _Chosen(NamedTuple):
    """The r ranks kept of a matrix: U (h_out, r), s (r,), V, widths (r,) on the CPU, the gap; and
    the spectrum of all that were considered.
    """

    u: Tensor
    s: Tensor
    v: Codes
    bits: Tensor
    gap: float
    spectrum: list[Rank]


def _considered_errors(task: MatrixTask, prepared: Prepared) -> Array:
    """Errors of the ranks that AdaMix considers at the budget, (r, len(WIDTHS))."""
    most = rank_budget(task.bits, *task.delta.shape) // min(CANDIDATES) + SPARE_RANKS
    errors: Array = prepared.tensors["errors"][:most].cpu().numpy()
    return errors


def _allocate(task: MatrixTask, errors: Array) -> Allocation:
    return allocate(errors, rank_budget(task.bits, *task.delta.shape), WIDTHS, F_MAX, task.solver)


def _choose(prepared: Prepared, allocation: Allocation) -> _Chosen:
    """The ranks that have a width."""
    tensors = prepared.tensors
    widths = torch.from_numpy(allocation.widths)
    kept = widths.nonzero()[:, 0]
    bits = widths[kept]
    number = torch.tensor([CANDIDATES.index(width) for width in bits.tolist()], dtype=torch.long)
    index = number.to(tensors["u"].device), kept.to(tensors["u"].device)
    v = Codes(tensors["codes"], tensors["scale"], tensors["zero"])[index]
    s = tensors["s"]
    spectrum = sample_spectrum(s[: len(widths)], widths, widths)
    return _Chosen(tensors["u"][:, index[1]], s[index[1]], v, bits, allocation.gap, spectrum)


def simulated_errors(v: Tensor, s: Tensor, simulated: Codes, moments: Tensor) -> Tensor:
    """`E[i, b]` for the widths of `WIDTHS`, width 0 drops the rank: (b, k, len(WIDTHS)) float64.

    Args:
        v: (b, k, h_in).
        s: (b, k).
        simulated: every width of `CANDIDATES` in turn, (b, len(CANDIDATES) * k) vectors.
        moments: (b, h_in, h_in).
    """

    def weighted(rows: Tensor) -> Tensor:
        rows = rows.double()
        return ((rows @ moments) * rows).sum(dim=2)

    decoded = simulated.decode().split(v.shape[1], dim=1)
    columns = [weighted(v), *(weighted(v - part) for part in decoded)]
    return torch.stack(columns, dim=2) * s.double()[:, :, None] ** 2


def refit_left_factors(
    deltas: Tensor, left: Tensor, right: Tensor, moments: Tensor
) -> tuple[Tensor, Tensor, list[str | None]]:
    """Target correction (Eq. 8): refit U to the full delta once V is quantized, for b matrices.

    With `A = diag(s) V_hat`, the output error `||D X - U A X||^2` over the calibration inputs is
    least at `U~ = D G A^T (A G A^T)^-1`, `G = X X^T`. The target is the full delta `D`, so that
    the ranks kept recover part of those dropped. The ridge pulls towards `left`, the factor before
    the correction, so that directions without calibration inputs keep their values.

    Args:
        deltas: (b, h_out, h_in), D.
        left: (b, h_out, r), U.
        right: (b, r, h_in), A, float; ranks of zeros do not change the others.
        moments: (b, h_in, h_in), G.

    Returns:
        U~ (b, h_out, r) float32; its Hessians `A G A^T` (b, r, r) float64, with their mean on the
        diagonal for ranks of zeros; and the fallback taken for each matrix (None, or a sentence
        for the report).
    """
    a = right.double()
    weighted = a @ moments
    hessians = weighted @ a.mT
    hessians = (hessians + hessians.mT) / 2
    targets = deltas.double() @ weighted.mT
    diagonal = hessians.diagonal(dim1=1, dim2=2)
    mean = mean_of_used(diagonal)
    diagonal += torch.where(diagonal == 0, mean, 0.0)
    corrected = torch.empty(left.shape, device=left.device)
    fallbacks: list[str | None] = [None] * len(hessians)
    left_over = torch.arange(len(hessians), device=left.device)

    def ridged(strength: float) -> tuple[Tensor, Tensor]:
        ridge = strength * mean[left_over]
        system = hessians[left_over]
        system.diagonal(dim1=1, dim2=2).add_(ridge)
        return system, targets[left_over] + ridge[:, None] * left[left_over].double()

    for strength in RIDGES:
        system, target = ridged(strength)
        factor, info = torch.linalg.cholesky_ex(system)
        failed = info != 0
        solved = torch.cholesky_solve(target.mT, factor).mT.float()
        if not failed.any():
            corrected[left_over] = solved
            return corrected, hessians, fallbacks
        corrected[left_over[~failed]] = solved[~failed]
        left_over = left_over[failed]
    values, vectors = torch.linalg.eigh(hessians[left_over])
    ridge = RIDGES[-1] * mean[left_over]
    scaled = vectors / (values.clamp_min(0) + ridge)[:, None]
    corrected[left_over] = (target @ (scaled @ vectors.mT)).float()
    for number in left_over.tolist():
        fallbacks[number] = "target correction by eigendecomposition"
    return corrected, hessians, fallbacks
