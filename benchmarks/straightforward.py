"""AdaMix's Algorithm 1 as printed, one matrix at a time: the baseline of `compress_speed`.

Source: Xiong et al., "AdaMix" (arXiv 2506.11087). Nothing is shared between widths, matrices or
steps: a full float64 SVD, one GPTQ with its own Hessian inversion per width, column by column, the
0/1 programme solved by SCIP (without SCIP: dynamic programming over each subset of widths), a
second GPTQ of V at the chosen widths, target correction by an explicit inverse.
"""

from collections.abc import Callable
from importlib.util import find_spec
from itertools import combinations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

WIDTHS = (2, 3, 4, 5, 6, 7, 8)
F_MAX = 4
DAMPING = 0.01

StageCallback = Callable[[str], None]
"""Called with the name of a stage when it ends."""


def moment_of(sequences: list[Tensor]) -> Tensor:
    """`X X^T` summed over sequences (length, h_in): (h_in, h_in) float32."""
    total = torch.zeros(2 * (sequences[0].shape[1],), device=sequences[0].device)
    for sequence in sequences:
        total += sequence.float().t() @ sequence.float()
    return total


def gptq(weights: Tensor, bits: Tensor, hessian: Tensor, block: int = 1) -> Tensor:
    """GPTQ (Frantar et al., arXiv 2210.17323) of a matrix under a Hessian; returns decoded values.

    Args:
        weights: (rows, n).
        bits: (rows, 1) for one grid per row, or (1, n) for one grid per column.
        hessian: (n, n).
        block: columns per block; a block's errors reach later columns in one product.
    """
    damped = hessian.double().clone()
    damped.diagonal().add_(DAMPING * damped.diagonal().mean())
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    factor = torch.linalg.cholesky(inverse, upper=True).float()
    work = weights.float().clone()
    decoded = torch.empty_like(work)
    by_row = bits.shape[0] == work.shape[0]
    levels = 2.0 ** bits.float() - 1
    scale, zero = minmax_grid(work, levels, dim=1) if by_row else (levels, levels)
    n = work.shape[1]
    errors = torch.empty_like(work)
    for j in range(n):
        column = work[:, j : j + 1]
        highest = levels if by_row else levels[:, j : j + 1]
        if not by_row:
            scale, zero = minmax_grid(column, highest, dim=0)
        codes = ((column / scale).round() + zero).clamp_min(0).minimum(highest)
        decoded[:, j : j + 1] = scale * (codes - zero)
        errors[:, j : j + 1] = (column - decoded[:, j : j + 1]) / factor[j, j]
        start, stop = j - j % block, min(j - j % block + block, n)
        work[:, j + 1 : stop] -= errors[:, j : j + 1] @ factor[j : j + 1, j + 1 : stop]
        if j + 1 == stop:
            work[:, stop:] -= errors[:, start:stop] @ factor[start:stop, stop:]
    return decoded


def minmax_grid(values: Tensor, levels: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """Scale and zero point of the asymmetric grid over each vector's range."""
    low = values.amin(dim=dim, keepdim=True).clamp_max(0)
    high = values.amax(dim=dim, keepdim=True).clamp_min(0)
    scale = ((high - low) / levels).clamp_min(torch.finfo(torch.float32).tiny)
    return scale, (-low / scale).round()


def allocate(errors: npt.NDArray[np.float64], budget: int) -> npt.NDArray[np.int64]:
    """Widths (r,) of least error with at most `F_MAX` distinct ones, for errors (r, 1 + widths)."""
    if find_spec("pyscipopt") is not None:
        from deltadock.compression.numerics.allocation import allocate as solve

        return solve(errors, budget, (0, *WIDTHS), F_MAX, "scip").widths
    best, chosen = np.inf, np.zeros(len(errors), np.int64)
    costs = np.asarray((0, *WIDTHS))
    for subset in combinations(range(len(costs)), F_MAX):
        error, widths = knapsack(errors[:, list(subset)], costs[list(subset)], budget)
        if error < best:
            best, chosen = error, widths
    return chosen


def knapsack(
    errors: npt.NDArray[np.float64], costs: npt.NDArray[np.int64], budget: int
) -> tuple[float, npt.NDArray[np.int64]]:
    """Multiple-choice knapsack: least total error within `budget`, and the chosen cost per row."""
    best = np.zeros(budget + 1)
    taken = np.zeros((len(errors), budget + 1), np.int8)
    for row, offers in enumerate(errors):
        following = np.full(budget + 1, np.inf)
        for k, cost in enumerate(costs.tolist()):
            candidate = best[: budget + 1 - cost] + offers[k]
            better = candidate < following[cost:]
            following[cost:][better] = candidate[better]
            taken[row, cost:][better] = k
        best = following
    widths, room = np.zeros(len(errors), np.int64), budget
    for row in range(len(errors) - 1, -1, -1):
        if not np.isfinite(best[budget]):
            break
        widths[row] = costs[taken[row, room]]
        room -= int(widths[row])
    return float(best[budget]), widths


def compress(
    delta: Tensor, sequences: list[Tensor], bits: float, done: StageCallback, block: int = 1
) -> Tensor:
    """Algorithm 1 for one layer.

    Args:
        delta: (h_out, h_in).
        sequences: the layer's inputs, each (length, h_in).
        bits: code bits per weight.
        done: called after each stage.
        block: see `gptq`.

    Returns:
        The compressed delta (h_out, h_in) float32.
    """
    h_out, h_in = delta.shape
    hessian = moment_of(sequences)
    done("moments")
    u, s, v = torch.linalg.svd(delta.double(), full_matrices=False)
    done("SVD")
    budget = int(bits * h_in * h_out / (h_in + h_out))
    kept = budget // min(WIDTHS)
    u, s, v = u[:, :kept].float(), s[:kept].float(), v[:kept].float()
    errors = [s.square() * ((v @ hessian) * v).sum(dim=1)]
    for width in WIDTHS:
        step = v - gptq(v, torch.full((len(v), 1), width, device=v.device), hessian, block)
        errors.append(s.square() * ((step @ hessian) * step).sum(dim=1))
    done("GPTQ of V")
    table = torch.stack(errors, dim=1).double().cpu().numpy()
    widths = torch.from_numpy(allocate(table, budget)).to(v.device)
    done("allocation")
    used = widths > 0
    u, s, v, widths = u[:, used], s[used], v[used], widths[used]
    v_hat = gptq(v, widths[:, None], hessian, block)
    done("GPTQ of V")
    right = (s[:, None] * v_hat).double()
    inner = right @ hessian.double() @ right.t()
    eye = torch.eye(len(inner), dtype=torch.float64, device=inner.device)
    inverse = torch.linalg.inv(inner + 1e-6 * inner.diagonal().mean() * eye)
    corrected = delta.double() @ hessian.double() @ right.t() @ inverse
    done("target correction")
    u_hat = gptq(corrected.float(), widths[None, :], inner, block)
    done("GPTQ of U")
    approximation: Tensor = u_hat @ right.float()
    return approximation
