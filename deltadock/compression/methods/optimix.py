"""Optimix: the ranks of all matrices compete for one bit budget by their cost in nats per token.

Deltadock's own method (docs/optimix.md):
1. `profile`: the delta's weighted SVD under both metrics (see `numerics.two_sided`), and the loss
   of each rank at each width of U and of V.
2. `numerics.global_allocation.allocate` chooses the widths of every rank of every matrix.
3. `compress`: codes of 1 to 8 bits on symmetric grids without zero points, U and V alternately
   refitted to the full delta.
The scales are trained end to end afterwards (`deltadock.compression.distillation`).
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, Self

import numpy as np
import torch
from torch import Tensor

from deltadock.artifacts.encodings import SvdMatrix, Vectors, encode_svd
from deltadock.compression.methods.base import MatrixResult, decoded_delta, sample_spectrum
from deltadock.compression.numerics.global_allocation import RankProfile, RankWidths
from deltadock.compression.numerics.metric import Metric
from deltadock.compression.numerics.midrise import MidriseCodes
from deltadock.compression.numerics.two_sided import (
    Side,
    Spectrum,
    quantize_factors,
    weighted_svd,
    width_losses,
)

DROPPED: Final = "the budget gives it no rank, so its delta is dropped"

SCALED_RANKS: Final = 400
"""Rank-bits at one bit per weight from which row and column scales reduce the error."""


STORED: Final = ("u", "s", "v", "row_scale", "column_scale")


@dataclass(frozen=True, slots=True)
class DecomposedMatrix:
    """A matrix that can be quantized at any widths: its spectrum, and its sides' scales if any."""

    spectrum: Spectrum
    row_scale: Tensor | None
    column_scale: Tensor | None

    def tensors(self) -> dict[str, Tensor]:
        """The tensors by the names of `STORED`, vectors in float32."""
        values = (
            self.spectrum.u.float(), self.spectrum.s, self.spectrum.v.float(),
            self.row_scale, self.column_scale,
        )  # fmt: skip
        return {k: v for k, v in zip(STORED, values, strict=True) if v is not None}

    @classmethod
    def from_tensors(cls, stored: Mapping[str, Tensor]) -> Self:
        """Restore from the result of `tensors`."""
        spectrum = Spectrum(stored["u"].double(), stored["s"], stored["v"].double())
        return cls(spectrum, stored.get("row_scale"), stored.get("column_scale"))


def profile(delta: Tensor, rows: Metric, columns: Metric) -> tuple[DecomposedMatrix, RankProfile]:
    """Decompose a delta (h_out, h_in) under B (`rows`) and A (`columns`), and profile its ranks."""
    spectrum = weighted_svd(delta, rows, columns)
    u_side, v_side = Side(rows), Side(columns)
    h_out, h_in = delta.shape
    wide = h_out * h_in >= SCALED_RANKS * (h_out + h_in)
    weights = spectrum.s / spectrum.s.sum()
    overhead = 0
    if _scale_pays(rows, wide):
        u_side = u_side.with_scale(spectrum.u, weights)
        overhead += 16 * h_out
    if _scale_pays(columns, wide):
        v_side = v_side.with_scale(spectrum.v, weights)
        overhead += 16 * h_in
    return (
        DecomposedMatrix(spectrum, u_side.scale, v_side.scale),
        RankProfile(
            (h_out, h_in),
            spectrum.s.cpu(),
            width_losses(u_side, spectrum.u).cpu(),
            width_losses(v_side, spectrum.v).cpu(),
            overhead,
        ),
    )


def _scale_pays(metric: Metric, wide: bool) -> bool:
    """A diagonal metric has no error compensation, so a scale pays for small matrices too."""
    return wide or metric.diagonal


def compress(
    delta: Tensor,
    decomposed: DecomposedMatrix,
    widths: RankWidths,
    rows: Metric,
    columns: Metric,
    dtype: str,
) -> MatrixResult:
    """Quantize and encode the ranks that `widths` keeps; there may be none."""
    kept = widths.kept.to(delta.device)
    spectrum = decomposed.spectrum
    sides = Side(rows, decomposed.row_scale), Side(columns, decomposed.column_scale)
    chosen = Spectrum(spectrum.u[kept], spectrum.s[kept], spectrum.v[kept])
    coded = quantize_factors(
        delta, chosen, sides, (widths.u.to(delta.device), widths.v.to(delta.device))
    )
    encoded = encode_svd(
        SvdMatrix(_vectors(coded.u), coded.s.float().cpu().numpy(), _vectors(coded.v)),
        dtype,
        {},
        row_scale=_array(decomposed.row_scale),
        column_scale=_array(decomposed.column_scale),
    )
    notes: dict[str, Any] = {
        "rank": len(kept),
        "widths": _count(torch.cat([widths.u, widths.v])),
        "damping": max(rows.damping, columns.damping),
        "fallbacks": coded.fallbacks if len(kept) else [DROPPED],
        "spectrum": sample_spectrum(chosen.s, widths.u, widths.v),
    }
    return MatrixResult(encoded, decoded_delta(encoded, delta.device), notes)


def _vectors(codes: MidriseCodes) -> Vectors:
    return Vectors(codes.codes.cpu().numpy(), codes.bits.cpu().numpy(), None)


def _array(scale: Tensor | None) -> np.ndarray[Any, np.dtype[np.float32]] | None:
    return None if scale is None else scale.float().cpu().numpy()


def _count(widths: Tensor) -> dict[str, int]:
    """Vectors of each width, both sides together, widest first."""
    counted = Counter(widths.tolist())
    return {str(width): counted[width] for width in sorted(counted, reverse=True)}
