"""Symmetric mid-rise quantization with GPTQ error compensation.

A vector of width b has the values `step * (code - (2**b - 1) / 2)`: no zero point, so the step
folds into the factor that multiplies the vector, and one bit is a sign. Rounding errors are
compensated in the following coordinates as in GPTQ (Frantar et al., 2022), under any `Metric`.
"""

from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from deltadock.kernels.error_compensation import round_with_error_compensation

SHRINKS: Final = (1.0, 0.88, 0.78, 0.7, 0.62, 0.56, 0.5, 0.44, 0.39, 0.34, 0.29, 0.24, 0.19, 0.14)
"""Candidate steps, as fractions of the step whose grid spans the largest entry."""
SAMPLED: Final = 1024
"""Coordinates that the step is searched on."""


@dataclass(frozen=True, slots=True)
class MidriseCodes:
    """Quantized vectors, one per row: codes (r, n) uint8, bits (r,) int64, step (r,) float32.

    The grid has no zero, so the step of a vector of zeros is 0.
    """

    codes: Tensor
    bits: Tensor
    step: Tensor

    def units(self) -> Tensor:
        """Dequantize in units of the step, (r, n) float32: multiples of one half."""
        return self.codes.float() - (2.0 ** self.bits[:, None] - 1) / 2

    def decode(self) -> Tensor:
        """Dequantize, (r, n) float32."""
        return self.step[:, None] * self.units()


def quantize(values: Tensor, bits: Tensor, compensation: Tensor | None) -> MidriseCodes:
    """Quantize each row, compensating the error of one coordinate in those after it.

    Args:
        values: (r, n); row i is quantized to `bits[i]`, 1 to 8.
        bits: (r,) int64.
        compensation: `Metric.error_compensation()` of the metric, (n, n); None for a diagonal
            metric, which leaves nothing to compensate.
    """
    work = values.t().to(torch.float32, memory_format=torch.contiguous_format, copy=True)
    top = (2.0**bits - 1).float()
    step = _search_step(work, top)
    # In units of the step, a code is one floor away.
    work /= torch.where(step > 0, step, torch.ones_like(step))
    half = top / 2
    if compensation is None:
        codes = _codes(work, half, top)
        return MidriseCodes(codes.to(torch.uint8).t().contiguous(), bits, step)
    (codes,) = round_with_error_compensation(work[None], compensation[None], half, top)
    return MidriseCodes(codes.t().contiguous(), bits, step)


def _codes(values: Tensor, half: Tensor, top: Tensor) -> Tensor:
    """Nearest codes of values in units of the step."""
    return torch.minimum((values + half + 0.5).floor_().clamp_(min=0), top)


def _search_step(values: Tensor, top: Tensor) -> Tensor:
    """The step (r,) of least square error of each column of `values` (n, r); 0 for zeros."""
    half = top / 2
    peak = values.abs().amax(0) / half
    # A sample of the coordinates determines the step well enough.
    sample = values[:: max(1, len(values) // SAMPLED)]
    best = torch.full_like(peak, torch.inf)
    step = peak.clone()
    for shrink in SHRINKS:
        trial = peak * shrink
        scaled = sample / torch.where(trial > 0, trial, torch.ones_like(trial))
        # Relative to the peak, whose square may overflow float32.
        error = (_codes(scaled, half, top) - half - scaled).square_().sum(0) * shrink**2
        better = error < best
        best = torch.where(better, error, best)
        step = torch.where(better, trial, step)
    return step
