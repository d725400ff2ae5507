"""Matrices under two metrics: weighted SVD, loss of each rank at each width, and quantization.

An error R of a layer's weights costs about `tr(B R A R^T) / 2` nats per token: A is the second
moment of the layer's inputs, B that of the gradients at its outputs (a Kronecker-factored Fisher
matrix). With `A = L L^T` and `B = M M^T`, the singular value decomposition of `M^T D L` splits the
delta D into ranks whose errors add up, and dropping a rank costs its singular value squared. Both
factors are then quantized, V's rows under A and U's columns under B.

All functions take b matrices of equal shape at a time. Ranks of zeros fill up those with fewer.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Final

import torch
from torch import Tensor

from deltadock.compression.numerics.metric import Metric, mean_of_used, weighted_errors
from deltadock.compression.numerics.midrise import MidriseCodes, quantize

WIDTHS: Final = (1, 2, 3, 4, 5, 6, 8)
SIMULATED: Final = 128
"""Ranks of a matrix whose quantization is simulated; the others are interpolated."""
RIDGE: Final = 1e-6
REFINEMENTS: Final = 3
TINY: Final = torch.finfo(torch.float64).tiny
REFIT_FALLBACK: Final = "refit by eigendecomposition"


class Side:
    """One side of b matrices: its metric, and a scale (b, n) that divides its coordinates."""

    def __init__(self, metric: Metric, scale: Tensor | None = None) -> None:
        """A coordinate of scale 0 decodes to 0."""
        self.metric = metric
        self.scale = scale

    @cached_property
    def _compensation(self) -> Tensor | None:
        if self.metric.diagonal:
            return None
        scaled = self.metric if self.scale is None else self.metric.scaled(self._divisor())
        return scaled.error_compensation()

    def _divisor(self) -> Tensor:
        assert self.scale is not None
        return torch.where(self.scale > 0, self.scale, 1.0)

    def quantize(self, vectors: Tensor, bits: Tensor) -> MidriseCodes:
        """Quantize rows (b, r, n) of any norm at widths (b, r), in scaled coordinates."""
        target = vectors if self.scale is None else vectors / self._divisor()[:, None]
        return quantize(target, bits, self._compensation)

    def units(self, codes: MidriseCodes) -> Tensor:
        """Dequantize without the steps, (b, r, n) float64, in unscaled coordinates."""
        units = codes.units().double()
        return units if self.scale is None else units * self.scale[:, None]

    def with_scale(self, vectors: Tensor, weights: Tensor) -> "Side":
        """The side with each coordinate scaled by the vectors' (b, r, n) weighted norm in it."""
        scale = (vectors.square() * weights[:, :, None]).sum(1).sqrt()
        # The artifact keeps the scale in half precision.
        most = scale.amax(1, keepdim=True).clamp_min(TINY)
        return Side(self.metric, (scale / most).half().double())


@dataclass(frozen=True, slots=True)
class Spectrum:
    """`D = U^T diag(s) V` under two metrics, for b matrices.

    Attributes:
        u: (b, r, h_out) float64, rows of length one under B.
        s: (b, r) descending, in the root of the errors' unit; 0 for ranks that fill up.
        v: (b, r, h_in) float64, rows of length one under A.
    """

    u: Tensor
    s: Tensor
    v: Tensor


@dataclass(frozen=True, slots=True)
class QuantizedFactors:
    """Quantized decompositions: `U_units^T diag(s) V_units` with both sides' scales applied.

    Attributes:
        u, v: codes; those of ranks that fill up have no meaning.
        s: (b, r), 0 for ranks that fill up.
        error: (b,), under both metrics.
        fallbacks: deviations from the method, of each matrix.
    """

    u: MidriseCodes
    v: MidriseCodes
    s: Tensor
    error: Tensor
    fallbacks: list[list[str]]


def weighted_svd(
    deltas: Tensor, rows: Metric, columns: Metric, limit: int | None = None
) -> Spectrum:
    """Decompose deltas (b, h_out, h_in) under B (`rows`) and A (`columns`), at most `limit` ranks.

    Through the Gram matrix of the shorter side: its rounding hides singular values below 1e-8 of
    the largest, far below what any budget keeps.
    """
    whitened = columns.whiten(rows.whiten(deltas.double().mT).mT)
    tall = whitened.shape[1] > whitened.shape[2]
    short = whitened if not tall else whitened.mT
    values, vectors = torch.linalg.eigh(short @ short.mT)
    s = values.flip(1).clamp_min(0).sqrt()
    present = s > 1e-7 * s[:, :1]
    count = int(present.sum(1).max())
    count = min(count, limit or count)
    s = torch.where(present, s, 0.0)[:, :count]
    near = vectors.flip(2)[:, :, :count].mT * present[:, :count, None]
    # A fixed sign: equal inputs give equal bytes whatever sign the eigensolver returns.
    peak = near.abs().argmax(dim=2, keepdim=True)
    near = near * near.gather(2, peak).sign()
    far = near @ short / s.clamp_min(TINY)[:, :, None]
    u, v = (far, near) if tall else (near, far)
    return Spectrum(rows.unwhiten(u), s, columns.unwhiten(v))


def width_losses(side: Side, vectors: Tensor) -> Tensor:
    """Fraction of each vector's energy lost at each width: (b, r, len(WIDTHS)) float64.

    Of the best multiple of the quantized vector, as the rank's scale is fitted afterwards. Of
    vectors of zeros at the end, which fill up a matrix, the figures have no meaning.
    """
    b, most, n = vectors.shape
    if not most:
        return vectors.new_zeros(b, 0, len(WIDTHS))
    last = (vectors.any(2).sum(1) - 1).clamp_min(0)
    steps = torch.linspace(0, 1, min(most, SIMULATED), dtype=torch.float64, device=vectors.device)
    picked = (steps * last[:, None]).round().long()
    sample = vectors.gather(1, picked[:, :, None].expand(-1, -1, n))
    widths = torch.tensor(WIDTHS, device=vectors.device).repeat_interleave(len(steps))
    target = sample.repeat(1, len(WIDTHS), 1)
    quantized = side.units(side.quantize(target, widths.expand(b, -1)))
    weighed = side.metric.times(quantized)
    along = (weighed * target).sum(2).clamp_min(0).square()
    length = (weighed * quantized).sum(2).clamp_min(TINY)
    energy = (side.metric.times(sample) * sample).sum(2).clamp_min(TINY).repeat(1, len(WIDTHS))
    lost = (1 - along / length / energy).clamp(0, 1).view(b, len(WIDTHS), len(steps)).mT
    position = torch.arange(most, device=vectors.device).expand(b, -1).contiguous()
    right = torch.searchsorted(picked, position).clamp(min(1, len(steps) - 1), len(steps) - 1)
    left = (right - 1).clamp_min(0)
    start = picked.gather(1, left)
    span = (picked.gather(1, right) - start).clamp_min(1)
    share = ((position - start) / span).clamp_max(1)[:, :, None].double()

    def at(index: Tensor) -> Tensor:
        return lost.gather(1, index[:, :, None].expand(-1, -1, len(WIDTHS)))

    return at(left) * (1 - share) + at(right) * share


def quantize_factors(
    deltas: Tensor,
    spectrum: Spectrum,
    sides: tuple[Side, Side],
    widths: tuple[Tensor, Tensor],
    refinements: int = REFINEMENTS,
) -> QuantizedFactors:
    """Quantize the given ranks, alternately refitting U and V to the full deltas.

    Args:
        deltas: (b, h_out, h_in).
        spectrum: of the ranks to keep, at least one.
        sides: of U and of V.
        widths: (b, r) int64 of U's and of V's vectors.
        refinements: rounds of refitting U and V; the best result is kept.
    """
    targets = deltas.double()
    (u_side, v_side), (u_bits, v_bits) = sides, widths
    fallbacks: list[list[str]] = [[] for _ in targets]
    best: QuantizedFactors | None = None
    present = spectrum.s > 0
    u, v = spectrum.u * spectrum.s[:, :, None], spectrum.v
    v_codes = v_side.quantize(v, v_bits)
    v_units = v_side.units(v_codes) * present[:, :, None]
    for step in range(2 * refinements + 1):
        if step % 2 == 0:
            u = _refit(targets, u, v_units, v_side.metric, fallbacks)
            u_codes = u_side.quantize(u, u_bits)
            u_units = u_side.units(u_codes) * present[:, :, None]
        else:
            v = _refit(targets.mT, v, u_units, u_side.metric, fallbacks)
            v_codes = v_side.quantize(v, v_bits)
            v_units = v_side.units(v_codes) * present[:, :, None]
        s = fit_scales(targets, u_units, v_units, u_side.metric, v_side.metric)
        residuals = targets - (u_units * s[:, :, None]).mT @ v_units
        error = weighted_errors(residuals, u_side.metric, v_side.metric)
        made = QuantizedFactors(u_codes, v_codes, s, error, fallbacks)
        best = made if best is None else _better(best, made)
        # Start of the other side's refit, in the scale of the side that is now fixed.
        if step % 2 == 0:
            v = v_units * s[:, :, None]
        else:
            u = u_units * s[:, :, None]
    assert best is not None, "the first step sets it"
    return best


def _better(first: QuantizedFactors, second: QuantizedFactors) -> QuantizedFactors:
    """For each matrix the one with the smaller error."""
    better = second.error < first.error
    vectors = better[:, None]

    def codes(one: MidriseCodes, other: MidriseCodes) -> MidriseCodes:
        chosen = torch.where(vectors[:, :, None], other.codes, one.codes)
        return MidriseCodes(chosen, one.bits, torch.where(vectors, other.step, one.step))

    return QuantizedFactors(
        codes(first.u, second.u),
        codes(first.v, second.v),
        torch.where(vectors, second.s, first.s),
        torch.where(better, second.error, first.error),
        first.fallbacks,
    )


def fit_scales(targets: Tensor, u: Tensor, v: Tensor, rows: Metric, columns: Metric) -> Tensor:
    """The rank scales (b, r) of least weighted error to `targets`: solutions of linear systems.

    Args:
        targets: (b, h_out, h_in).
        u, v: (b, r, h_out) and (b, r, h_in), fixed; ranks of zeros get the scale 0.
        rows, columns: B and A.
    """
    weighed_u, weighed_v = rows.times(u), columns.times(v)
    system = (weighed_u @ u.mT) * (weighed_v @ v.mT)
    right = ((weighed_u @ targets) * weighed_v).sum(2)
    diagonal = system.diagonal(dim1=1, dim2=2)
    mean = mean_of_used(diagonal)
    diagonal += torch.where(diagonal == 0, mean, 1e-9 * mean)
    solved: Tensor = torch.linalg.solve(system, right)
    return solved


def _refit(
    targets: Tensor, start: Tensor, other: Tensor, metric: Metric, fallbacks: list[list[str]]
) -> Tensor:
    """The vectors (b, r, m) of least error to `targets` (b, m, n) for a fixed `other` (b, r, n).

    `metric` weights the n coordinates; a small ridge pulls towards `start`, so that directions
    without calibration inputs keep their values.
    """
    weighed = metric.times(other)
    system = weighed @ other.mT
    system = (system + system.mT) / 2
    diagonal = system.diagonal(dim1=1, dim2=2)
    ridge = RIDGE * mean_of_used(diagonal)
    right = weighed @ targets.mT + ridge[:, :, None] * start
    diagonal += ridge
    factor, info = torch.linalg.cholesky_ex(system)
    solved = torch.cholesky_solve(right, factor)
    failed = (info != 0).nonzero().flatten()
    if len(failed):
        values, vectors = torch.linalg.eigh(system[failed])
        inner = vectors.mT @ right[failed]
        solved[failed] = vectors @ (inner / values.clamp_min(ridge[failed])[:, :, None])
    for number in failed.tolist():
        if REFIT_FALLBACK not in fallbacks[number]:
            fallbacks[number].append(REFIT_FALLBACK)
    return solved
