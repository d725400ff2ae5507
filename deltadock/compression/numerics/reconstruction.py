"""Target correction for consistency (AdaMix, Eq. 8): U refitted once V is quantized.

With `A = diag(s) V_hat`, the output error `||D X - U A X||^2` over the calibration inputs is
least at `U~ = D G A^T (A G A^T)^-1`, `G = X X^T`. The target is the FULL delta `D`, so ranks that
were dropped are partly recovered by those that were kept.
"""

from typing import Final

import torch
from torch import Tensor

DAMPINGS: Final = (1e-6, 1e-5, 1e-4)
"""Ridge strengths tried in turn, as fractions of the mean diagonal of `A G A^T`."""


def refit_left_factor(
    delta: Tensor, left: Tensor, right: Tensor, moment: Tensor
) -> tuple[Tensor, Tensor, str | None]:
    """The left factor that fits the full delta best for a given right factor.

    The ridge pulls towards `left`, the factor before the correction, so that a direction that the
    calibration never excites keeps its value.

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
    for damping in DAMPINGS:
        ridge = damping * mean
        factor, info = torch.linalg.cholesky_ex(hessian + ridge * eye)
        if info == 0:
            corrected = torch.cholesky_solve((target + ridge * left.double()).t(), factor).t()
            return corrected.float(), hessian, None
    values, vectors = torch.linalg.eigh(hessian)
    ridge = DAMPINGS[-1] * mean
    inverse = vectors / (values.clamp_min(0) + ridge) @ vectors.t()
    corrected = (target + ridge * left.double()) @ inverse
    return corrected.float(), hessian, "target correction by eigendecomposition"
