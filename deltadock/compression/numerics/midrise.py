"""Symmetric mid-rise quantization with GPTQ error compensation.

A vector of width b has the values `step * (code - (2**b - 1) / 2)`: no zero point, so the step
folds into the factor that multiplies the vector, and one bit is a sign. Rounding errors are
compensated in the following coordinates as in GPTQ (Frantar et al., 2022), under any `Metric`.
"""

from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from deltadock.compression.numerics.gptq import SEARCH_ELEMENTS, columns_first
from deltadock.kernels.error_compensation import round_with_error_compensation

SHRINKS: Final = (1.0, 0.88, 0.78, 0.7, 0.62, 0.56, 0.5, 0.44, 0.39, 0.34, 0.29, 0.24, 0.19, 0.14)
"""Candidate steps, as fractions of the step whose grid spans the largest entry."""
SAMPLED: Final = 1024
"""Coordinates that the step is searched on."""


@dataclass(frozen=True, slots=True)
class MidriseCodes:
    """Quantized vectors of b matrices, one per row.

    Shapes: codes (b, r, n) uint8, bits (b, r) int64, step (b, r) float32. The grid has no zero, so
    the step of a vector of zeros is 0.
    """

    codes: Tensor
    bits: Tensor
    step: Tensor

    def units(self) -> Tensor:
        """Dequantize in units of the step, (b, r, n) float32: multiples of one half."""
        return self.codes.float() - (2.0 ** self.bits[..., None] - 1) / 2

    def decode(self) -> Tensor:
        """Dequantize, (b, r, n) float32."""
        return self.step[..., None] * self.units()


def quantize(values: Tensor, bits: Tensor, compensation: Tensor | None) -> MidriseCodes:
    """Quantize each row, compensating the error of one coordinate in those after it.

    Args:
        values: (b, r, n); row i of a matrix is quantized to its `bits[i]`, 1 to 8.
        bits: (b, r) int64.
        compensation: `Metric.error_compensation()` of the metric, (b, n, n); None for a diagonal
            metric, which leaves nothing to compensate.
    """
    values, top = values.float(), (2.0**bits - 1).float()
    step = _search_step(values, top)
    # In units of the step, a code is one floor away.
    work = columns_first(values).div_(torch.where(step > 0, step, 1.0)[:, None])
    top = top[:, None]
    if compensation is None:
        codes = _codes(work, top).to(torch.uint8)
    else:
        codes = round_with_error_compensation(work, compensation, top / 2, top)
    return MidriseCodes(codes.mT.contiguous(), bits, step)


def _codes(values: Tensor, top: Tensor) -> Tensor:
    """Nearest codes of values in units of the step."""
    return torch.minimum((values + (top + 1) / 2).floor_().clamp_(min=0), top)


def _search_step(values: Tensor, top: Tensor) -> Tensor:
    """The steps (b, r) of least square error of the rows of `values` (b, r, n); 0 for zeros."""
    most = top.flatten() / 2
    peak = values.abs().amax(2).flatten() / most
    # A sample of the coordinates determines the step well enough; the grid is symmetric.
    sample = values[:, :, :: max(1, values.shape[2] // SAMPLED)].abs().flatten(0, 1)
    shrinks = torch.tensor(SHRINKS, device=values.device)[:, None]
    candidates = len(SHRINKS) * sample.shape[1]
    count = max(1, SEARCH_ELEMENTS[values.device.type] // candidates)
    found = []
    for part, size, limit in zip(
        sample.split(count), peak.split(count), most.split(count), strict=True
    ):
        trial = shrinks * size
        exact = part / torch.where(trial > 0, trial, 1.0)[:, :, None]
        nearest = exact.floor().add_(0.5)
        torch.minimum(nearest, limit[:, None], out=nearest)
        error = torch.linalg.vector_norm(nearest.sub_(exact), dim=2)
        # Relative to the peak, whose square may overflow float32.
        best = (error * shrinks).argmin(0, keepdim=True)
        found.append(trial.gather(0, best)[0])
    return torch.cat(found).view_as(top)
