"""Optimix: the ranks of all matrices compete for one bit budget by their cost in nats per token.

Deltadock's own method (docs/optimix.md):
1. `profile`: the deltas' weighted SVD under both metrics (see `numerics.two_sided`), and the loss
   of each rank at each width of U and of V.
2. `numerics.global_allocation.allocate` chooses the widths of every rank of every matrix.
3. `compress`: codes of 1 to 8 bits on symmetric grids without zero points, U and V alternately
   refitted to the full delta.
The scales are trained end to end afterwards (`deltadock.compression.distillation`).
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Self

import numpy as np
import torch
from torch import Tensor

from deltadock.artifacts.encodings import SvdMatrix, Vectors, encode_svd
from deltadock.compression.methods.base import (
    MatrixResult,
    fill,
    matrix_result,
    sample_spectrum,
    stacked,
)
from deltadock.compression.numerics.global_allocation import RankProfile, RankWidths
from deltadock.compression.numerics.metric import Metric
from deltadock.compression.numerics.two_sided import (
    TINY,
    Side,
    Spectrum,
    quantize_factors,
    weighted_svd,
    width_losses,
)
from deltadock.compression.report import Rank

DROPPED: Final = "the budget gives it no rank, so its delta is dropped"

SCALED_RANKS: Final = 400
"""Rank-bits at one bit per weight from which row and column scales reduce the error."""

STORED: Final = ("u", "s", "v", "row_scale", "column_scale")


@dataclass(frozen=True, slots=True)
class DecomposedMatrix:
    """A matrix that can be quantized at any widths.

    Attributes:
        u, s, v: its r ranks, (r, h_out), (r,) and (r, h_in), see `Spectrum`.
        row_scale, column_scale: (h_out,) and (h_in,), if it has them.
    """

    u: Tensor
    s: Tensor
    v: Tensor
    row_scale: Tensor | None
    column_scale: Tensor | None

    def tensors(self) -> dict[str, Tensor]:
        """The tensors by the names of `STORED`, vectors in float32."""
        values = self.u.float(), self.s, self.v.float(), self.row_scale, self.column_scale
        return {k: v for k, v in zip(STORED, values, strict=True) if v is not None}

    @classmethod
    def from_tensors(cls, stored: Mapping[str, Tensor]) -> Self:
        """Restore from the result of `tensors`."""
        scales = stored.get("row_scale"), stored.get("column_scale")
        return cls(stored["u"].double(), stored["s"], stored["v"].double(), *scales)


def profile(
    deltas: Tensor, rows: Metric, columns: Metric
) -> list[tuple[DecomposedMatrix, RankProfile]]:
    """Decompose deltas (b, h_out, h_in) under B (`rows`) and A (`columns`); profile their ranks."""
    spectrum = weighted_svd(deltas, rows, columns)
    u_side, v_side = Side(rows), Side(columns)
    h_out, h_in = deltas.shape[1:]
    wide = h_out * h_in >= SCALED_RANKS * (h_out + h_in)
    weights = spectrum.s / spectrum.s.sum(1, keepdim=True).clamp_min(TINY)
    overhead = 0
    if _scale_pays(rows, wide):
        u_side = u_side.with_scale(spectrum.u, weights)
        overhead += 16 * h_out
    if _scale_pays(columns, wide):
        v_side = v_side.with_scale(spectrum.v, weights)
        overhead += 16 * h_in
    u_losses, v_losses = width_losses(u_side, spectrum.u), width_losses(v_side, spectrum.v)
    made = []
    for number, count in enumerate((spectrum.s > 0).sum(1).tolist()):
        ranks = number, slice(count)
        scales = (None if side.scale is None else side.scale[number] for side in (u_side, v_side))
        u, s, v = spectrum.u[ranks], spectrum.s[ranks], spectrum.v[ranks]
        losses = u_losses[ranks], v_losses[ranks]
        made.append(
            (DecomposedMatrix(u, s, v, *scales), RankProfile((h_out, h_in), s, *losses, overhead))
        )
    return made


def _scale_pays(metric: Metric, wide: bool) -> bool:
    """A diagonal metric has no error compensation, so a scale pays for small matrices too."""
    return wide or metric.diagonal


def compress(
    deltas: Tensor,
    decomposed: Sequence[DecomposedMatrix],
    widths: Sequence[RankWidths],
    rows: Metric,
    columns: Metric,
    dtypes: Sequence[str],
    gap: float = 0.0,
) -> list[MatrixResult]:
    """Quantize and encode the ranks that `widths` keep of deltas (b, h_out, h_in); maybe none.

    `gap` is the allocation's, for the report.
    """
    device = deltas.device
    most = max(1, *(len(one.kept) for one in widths))
    kept = [one.kept.to(device) for one in widths]
    pairs = list(zip(decomposed, kept, strict=True))
    chosen = Spectrum(
        stacked([fill(one.u[index], most) for one, index in pairs]),
        stacked([fill(one.s[index], most) for one, index in pairs]),
        stacked([fill(one.v[index], most) for one, index in pairs]),
    )
    bits = (
        stacked([fill(one.u, most) for one in widths]).clamp_min(1).to(device),
        stacked([fill(one.v, most) for one in widths]).clamp_min(1).to(device),
    )
    sides = (
        Side(rows, _stacked_scales([one.row_scale for one in decomposed])),
        Side(columns, _stacked_scales([one.column_scale for one in decomposed])),
    )
    coded = quantize_factors(deltas, chosen, sides, bits)
    s, u_codes, v_codes = (x.cpu() for x in (coded.s.float(), coded.u.codes, coded.v.codes))
    results = []
    for number, (one, matrix) in enumerate(zip(widths, decomposed, strict=True)):
        ranks = number, slice(len(one.kept))
        encoded = encode_svd(
            SvdMatrix(
                Vectors(u_codes[ranks].numpy(), one.u.numpy(), None),
                s[ranks].numpy(),
                Vectors(v_codes[ranks].numpy(), one.v.numpy(), None),
            ),
            dtypes[number],
            {},
            row_scale=_array(matrix.row_scale),
            column_scale=_array(matrix.column_scale),
        )
        results.append(
            matrix_result(
                encoded,
                device=device,
                rank=len(one.kept),
                widths=_count(torch.cat([one.u, one.v])),
                damping=max(rows.damping[number], columns.damping[number]),
                gap=gap,
                fallbacks=coded.fallbacks[number] if len(one.kept) else [DROPPED],
                spectrum=_spectrum(matrix, one),
            )
        )
    return results


def _spectrum(matrix: DecomposedMatrix, widths: RankWidths) -> list[Rank]:
    """Some of the matrix's ranks, and of those dropped."""
    u_bits, v_bits = torch.zeros((2, len(matrix.s)), dtype=widths.u.dtype)
    u_bits[widths.kept], v_bits[widths.kept] = widths.u, widths.v
    return sample_spectrum(matrix.s, u_bits, v_bits)


def _stacked_scales(scales: Sequence[Tensor | None]) -> Tensor | None:
    """The scales (b, n); matrices of equal shape all have one, or none has."""
    found = [scale for scale in scales if scale is not None]
    return stacked(found) if found else None


def _array(scale: Tensor | None) -> np.ndarray[Any, np.dtype[np.float32]] | None:
    return None if scale is None else scale.float().cpu().numpy()


def _count(widths: Tensor) -> dict[str, int]:
    """Vectors of each width, both sides together, widest first."""
    counted = Counter(widths.tolist())
    return {str(width): counted[width] for width in sorted(counted, reverse=True)}
