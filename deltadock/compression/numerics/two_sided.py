"""A matrix under two metrics: weighted SVD, loss of each rank at each width, and quantization.

An error R of a layer's weights costs about `tr(B R A R^T) / 2` nats per token: A is the second
moment of the layer's inputs, B that of the gradients at its outputs (a Kronecker-factored Fisher
matrix). With `A = L L^T` and `B = M M^T`, the singular value decomposition of `M^T D L` splits the
delta D into ranks whose errors add up, and dropping a rank costs its singular value squared. Both
factors are then quantized, V's rows under A and U's columns under B.
"""

from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from deltadock.compression.numerics.metric import Metric, weighted_error
from deltadock.compression.numerics.midrise import MidriseCodes, quantize

WIDTHS: Final = (1, 2, 3, 4, 5, 6, 8)
SIMULATED: Final = 128
"""Ranks of a matrix whose quantization is simulated; the others are interpolated."""
RIDGE: Final = 1e-6
REFINEMENTS: Final = 3


class Side:
    """One side of a matrix: its metric, and a scale (n,) that divides its coordinates."""

    def __init__(self, metric: Metric, scale: Tensor | None = None) -> None:
        """Factor the metric of the scaled coordinates; a coordinate of scale 0 decodes to 0."""
        self.metric = metric
        self.scale = scale
        self._compensation = None
        if not metric.diagonal:
            self._compensation = (
                metric if scale is None else metric.scaled(self._divisor())
            ).error_compensation()

    def _divisor(self) -> Tensor:
        assert self.scale is not None
        return torch.where(self.scale > 0, self.scale, torch.ones_like(self.scale))

    def quantize(self, vectors: Tensor, bits: Tensor) -> MidriseCodes:
        """Quantize rows (r, n) of any norm, row i to `bits[i]`, in scaled coordinates."""
        target = vectors if self.scale is None else vectors / self._divisor()
        return quantize(target, bits, self._compensation)

    def units(self, codes: MidriseCodes) -> Tensor:
        """Dequantize without the steps, (r, n) float64, in unscaled coordinates."""
        units = codes.units().double()
        return units if self.scale is None else units * self.scale

    def with_scale(self, vectors: Tensor, weights: Tensor) -> "Side":
        """The side with each coordinate scaled by the vectors' (r, n) weighted norm in it."""
        scale = (vectors.square() * weights[:, None]).sum(0).sqrt()
        # The artifact keeps the scale in half precision.
        scale = (scale / scale.max().clamp_min(torch.finfo(torch.float64).tiny)).half().double()
        return Side(self.metric, scale)


@dataclass(frozen=True, slots=True)
class Spectrum:
    """`D = U^T diag(s) V` under two metrics.

    Attributes:
        u: (r, h_out) float64, rows of length one under B.
        s: (r,) descending, in the root of the errors' unit.
        v: (r, h_in) float64, rows of length one under A.
    """

    u: Tensor
    s: Tensor
    v: Tensor


@dataclass(frozen=True, slots=True)
class QuantizedFactors:
    """A quantized decomposition: `U_units^T diag(s) V_units` with both sides' scales applied."""

    u: MidriseCodes
    v: MidriseCodes
    s: Tensor
    error: float
    fallbacks: list[str]


def weighted_svd(
    delta: Tensor, rows: Metric, columns: Metric, limit: int | None = None
) -> Spectrum:
    """Decompose a delta (h_out, h_in) under B (`rows`) and A (`columns`), at most `limit` ranks.

    Through the Gram matrix of the shorter side: its rounding hides singular values below 1e-8 of
    the largest, far below what any budget keeps.
    """
    whitened = columns.whiten(rows.whiten(delta.double().t()).t())
    tall = whitened.shape[0] > whitened.shape[1]
    short = whitened if not tall else whitened.t()
    values, vectors = torch.linalg.eigh(short @ short.t())
    s = values.flip(0).clamp_min(0).sqrt()
    count = int((s > 1e-7 * s[0]).sum()) if s[0] > 0 else 0
    count = min(count, limit or count)
    s = s[:count]
    near = vectors.flip(1)[:, :count].t()
    # A fixed sign: equal inputs give equal bytes whatever sign the eigensolver returns.
    peak = near.abs().argmax(dim=1, keepdim=True)
    near = near * near.gather(1, peak).sign()
    far = near @ short / s[:, None]
    u, v = (far, near) if tall else (near, far)
    return Spectrum(rows.unwhiten(u), s, columns.unwhiten(v))


def width_losses(side: Side, vectors: Tensor) -> Tensor:
    """Fraction of each vector's energy lost at each width: (r, len(WIDTHS)) float64.

    Of the best multiple of the quantized vector, as the rank's scale is fitted afterwards.
    """
    count = len(vectors)
    picked = torch.linspace(0, count - 1, min(count, SIMULATED), device=vectors.device)
    picked = picked.round().long()
    sample = vectors[picked]
    widths = torch.tensor(WIDTHS, device=vectors.device).repeat_interleave(len(sample))
    target = sample.repeat(len(WIDTHS), 1)
    quantized = side.units(side.quantize(target, widths))
    weighed = side.metric.times(quantized)
    along = (weighed * target).sum(1).clamp_min(0).square()
    length = (weighed * quantized).sum(1).clamp_min(torch.finfo(torch.float64).tiny)
    energy = (side.metric.times(target) * target).sum(1)
    lost = (1 - along / length / energy).clamp(0, 1).view(len(WIDTHS), len(sample)).t()
    position = torch.arange(count, device=vectors.device)
    right = (
        torch.searchsorted(picked, position).clamp(1, len(picked) - 1) if count > 1 else position
    )
    left = (right - 1).clamp_min(0)
    span = (picked[right] - picked[left]).clamp_min(1)
    share = ((position - picked[left]) / span)[:, None].double()
    return lost[left] * (1 - share) + lost[right] * share


def quantize_factors(
    delta: Tensor,
    spectrum: Spectrum,
    sides: tuple[Side, Side],
    widths: tuple[Tensor, Tensor],
    refinements: int = REFINEMENTS,
) -> QuantizedFactors:
    """Quantize the given ranks, alternately refitting U and V to the full delta.

    Args:
        delta: (h_out, h_in).
        spectrum: of the ranks to keep.
        sides: of U and of V.
        widths: (r,) int64 of U's and of V's vectors.
        refinements: rounds of refitting U and V; the best result is kept.
    """
    target = delta.double()
    (u_side, v_side), (u_bits, v_bits) = sides, widths
    fallbacks: list[str] = []
    best: QuantizedFactors | None = None
    if not len(spectrum.s):
        return _empty(target, u_side.metric, v_side.metric)
    u, v = spectrum.u * spectrum.s[:, None], spectrum.v
    v_codes = v_side.quantize(v, v_bits)
    v_units = v_side.units(v_codes)
    for step in range(2 * refinements + 1):
        if step % 2 == 0:
            u = _refit(target, u, v_units, v_side.metric, fallbacks)
            u_codes = u_side.quantize(u, u_bits)
            u_units = u_side.units(u_codes)
        else:
            v = _refit(target.t(), v, u_units, u_side.metric, fallbacks)
            v_codes = v_side.quantize(v, v_bits)
            v_units = v_side.units(v_codes)
        s = fit_scales(target, u_units, v_units, u_side.metric, v_side.metric)
        residual = target - (u_units.t() * s) @ v_units
        error = weighted_error(residual, u_side.metric, v_side.metric)
        if best is None or error < best.error:
            best = QuantizedFactors(u_codes, v_codes, s, error, fallbacks)
        # Start of the other side's refit, in the scale of the side that is now fixed.
        if step % 2 == 0:
            v = v_units * s[:, None]
        else:
            u = u_units * s[:, None]
    assert best is not None, "the first step sets it"
    return best


def _empty(target: Tensor, rows: Metric, columns: Metric) -> QuantizedFactors:
    empty = torch.zeros(0, dtype=torch.int64)
    u, v = (MidriseCodes(torch.zeros(0, n, dtype=torch.uint8), empty, empty) for n in target.shape)
    return QuantizedFactors(u, v, torch.zeros(0), weighted_error(target, rows, columns), [])


def fit_scales(target: Tensor, u: Tensor, v: Tensor, rows: Metric, columns: Metric) -> Tensor:
    """The rank scales (r,) of least weighted error to `target`: the solution of a linear system.

    Args:
        target: (h_out, h_in).
        u, v: (r, h_out) and (r, h_in), fixed.
        rows, columns: B and A.
    """
    weighed_u, weighed_v = rows.times(u), columns.times(v)
    system = (weighed_u @ u.t()) * (weighed_v @ v.t())
    right = ((weighed_u @ target) * weighed_v).sum(1)
    system.diagonal().add_(1e-9 * system.diagonal().mean())
    solved: Tensor = torch.linalg.solve(system, right)
    return solved


def _refit(
    target: Tensor, start: Tensor, other: Tensor, metric: Metric, fallbacks: list[str]
) -> Tensor:
    """The vectors (r, m) of least error to `target` (m, n) for a fixed `other` (r, n).

    `metric` weights the n coordinates; a small ridge pulls towards `start`, so that directions
    without calibration inputs keep their values.
    """
    weighed = metric.times(other)
    system = weighed @ other.t()
    system = (system + system.t()) / 2
    ridge = RIDGE * system.diagonal().mean().clamp_min(torch.finfo(torch.float64).tiny / RIDGE)
    right = weighed @ target.t() + ridge * start
    system.diagonal().add_(ridge)
    factor, failed = torch.linalg.cholesky_ex(system)
    if not failed:
        return torch.cholesky_solve(right, factor)
    note = "refit by eigendecomposition"
    if note not in fallbacks:
        fallbacks.append(note)
    values, vectors = torch.linalg.eigh(system)
    solved: Tensor = (vectors / values.clamp_min(ridge)) @ (vectors.t() @ right)
    return solved
