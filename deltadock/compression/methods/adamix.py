"""AdaMix: mixed-precision SVD factors with widths allocated by calibrated error.

Source: Xiong et al., "AdaMix: Adaptive Mixed-Precision Delta-Compression with Quantization Error
Optimization for Large Language Models" (arXiv 2506.11087), Algorithm 1. Steps:
1. SVD `D = U diag(s) V`; as no rank costs less than the smallest width, only the leading ranks
   are candidates (App. C.1), and a few spare ones.
2. Every width is simulated in one GPTQ pass: `E[i, b] = s_i^2 (v - v_b) G (v - v_b)^T`.
3. Widths by 0/1 allocation under the budget (Eq. 10); V_hat is a gather of simulated rows.
4. Target correction (Eq. 8) refits U to the full delta; GPTQ quantizes it, column i at width b_i.
"""

from typing import Final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from deltadock.compression.methods.base import MatrixResult, MatrixTask, svd_result
from deltadock.compression.numerics.allocation import WIDTHS, allocate
from deltadock.compression.numerics.decomposition import decompose
from deltadock.compression.numerics.gptq import Codes, quantize_columns, quantize_rows
from deltadock.compression.options import rank_budget

F_MAX: Final = 4
SPARE_RANKS: Final = 8
CANDIDATES: Final = tuple(width for width in WIDTHS if width > 0)

RIDGES: Final = (1e-6, 1e-5, 1e-4)
"""Ridge strengths tried in turn, as fractions of the mean diagonal of `A G A^T`."""


def compress_matrix(task: MatrixTask) -> MatrixResult:
    """Compress one linear layer's delta."""
    h_out, h_in = task.delta.shape
    budget = rank_budget(task.bits, h_out, h_in)
    decomposed = decompose(task.delta, budget // min(CANDIDATES) + SPARE_RANKS)
    u, s, v = decomposed.u, decomposed.s, decomposed.v

    widths = torch.tensor(CANDIDATES).repeat_interleave(len(s))
    simulated, damping_v = quantize_rows(v.repeat(len(CANDIDATES), 1), widths, task.moment)
    errors = simulated_errors(v, s, simulated, task.moment)
    allocation = allocate(errors, budget, WIDTHS, F_MAX, task.solver)

    kept = torch.from_numpy(np.flatnonzero(allocation.widths))
    bits = torch.from_numpy(allocation.widths)[kept]
    column = torch.tensor([CANDIDATES.index(int(width)) for width in bits], dtype=torch.long)
    v_hat = simulated.rows(column * len(s) + kept)

    right = s[kept, None] * v_hat.decode()
    corrected, hessian, fallback = refit_left_factor(task.delta, u[:, kept], right, task.moment)
    u_hat, damping_u = quantize_columns(corrected, bits, hessian)

    return svd_result(
        task,
        u_hat,
        s[kept],
        v_hat,
        bits,
        damping=max(damping_u, damping_v),
        gap=allocation.gap,
        fallbacks=[decomposed.fallback, fallback],
    )


def simulated_errors(
    v: Tensor, s: Tensor, simulated: Codes, moment: Tensor
) -> npt.NDArray[np.float64]:
    """`E[i, b]` for the widths of `WIDTHS`: (k, len(WIDTHS)) float64; width 0 drops the rank."""

    def weighted(rows: Tensor) -> Tensor:
        rows = rows.double()
        return ((rows @ moment) * rows).sum(dim=1)

    k = len(s)
    decoded = simulated.decode()
    columns = [weighted(v)]
    columns += [weighted(v - decoded[i * k : (i + 1) * k]) for i in range(len(CANDIDATES))]
    scaled: npt.NDArray[np.float64] = (
        (torch.stack(columns, dim=1) * s.double()[:, None] ** 2).cpu().numpy()
    )
    return scaled


def refit_left_factor(
    delta: Tensor, left: Tensor, right: Tensor, moment: Tensor
) -> tuple[Tensor, Tensor, str | None]:
    """Target correction (Eq. 8): refit U to the full delta once V is quantized.

    With `A = diag(s) V_hat`, the output error `||D X - U A X||^2` over the calibration inputs is
    least at `U~ = D G A^T (A G A^T)^-1`, `G = X X^T`. The target is the full delta `D`, so that
    the ranks kept recover part of those dropped. The ridge pulls towards `left`, the factor before
    the correction, so that directions without calibration inputs keep their values.

    Args:
        delta: (h_out, h_in), D.
        left: (h_out, r), U.
        right: (r, h_in), A, float.
        moment: (h_in, h_in), G.

    Returns:
        U~ (h_out, r) float32, its Hessian `A G A^T` (r, r) float64, and the fallback taken
        (None, or a sentence for the report).
    """
    a = right.double()
    weighted = a @ moment.double()
    hessian = weighted @ a.t()
    hessian = (hessian + hessian.t()) / 2
    target = delta.double() @ weighted.t()
    mean = hessian.diagonal().mean().clamp_min(torch.finfo(torch.float64).tiny)
    eye = torch.eye(len(hessian), dtype=torch.float64, device=hessian.device)
    for strength in RIDGES:
        ridge = strength * mean
        factor, info = torch.linalg.cholesky_ex(hessian + ridge * eye)
        if info == 0:
            corrected = torch.cholesky_solve((target + ridge * left.double()).t(), factor).t()
            return corrected.float(), hessian, None
    values, vectors = torch.linalg.eigh(hessian)
    ridge = RIDGES[-1] * mean
    inverse = vectors / (values.clamp_min(0) + ridge) @ vectors.t()
    corrected = (target + ridge * left.double()) @ inverse
    return corrected.float(), hessian, "target correction by eigendecomposition"
