"""Optimix: ranks of all matrices compete for one budget in the model's own unit, nats per token.

Ours. One matrix at a time:
1. `profile`: the delta's spectrum under both metrics (see `numerics.two_sided`), and what each rank
   loses at each width of U and of V.
2. `numerics.budget.share` then gives every rank of every matrix its widths.
3. `encode`: codes on symmetric grids without zero points, one bit allowed, both sides refitted to
   the full delta in turn.
The scales are trained end to end afterwards (`deltadock.compression.distillation.training`).
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, Self

import numpy as np
import torch
from torch import Tensor

from deltadock.artifacts.encodings import SvdMatrix, Vectors, decode_dense, encode_svd
from deltadock.compression.methods.base import MatrixResult
from deltadock.compression.numerics.budget import Profile, Widths
from deltadock.compression.numerics.metric import Metric
from deltadock.compression.numerics.midrise import Midrise
from deltadock.compression.numerics.two_sided import Side, Spectrum, decompose, encode, losses

DROPPED: Final = "the budget gives it no rank, so its delta is dropped"

SCALED_RANKS: Final = 400
"""Rank-bits that one bit a weight must give before scales of rows and columns pay."""


STORED: Final = ("u", "s", "v", "row_scale", "column_scale")


@dataclass(frozen=True, slots=True)
class Prepared:
    """A matrix ready to be quantized at any widths: its spectrum, and its sides' scales if any."""

    spectrum: Spectrum
    row_scale: Tensor | None
    column_scale: Tensor | None

    def tensors(self) -> dict[str, Tensor]:
        """What there is under the names of `STORED`, to be set aside; vectors in float32."""
        values = (
            self.spectrum.u.float(), self.spectrum.s, self.spectrum.v.float(),
            self.row_scale, self.column_scale,
        )  # fmt: skip
        return {k: v for k, v in zip(STORED, values, strict=True) if v is not None}

    @classmethod
    def from_tensors(cls, stored: Mapping[str, Tensor]) -> Self:
        """What `tensors` gave."""
        spectrum = Spectrum(stored["u"].double(), stored["s"], stored["v"].double())
        return cls(spectrum, stored.get("row_scale"), stored.get("column_scale"))


def profile(delta: Tensor, rows: Metric, columns: Metric) -> tuple[Prepared, Profile]:
    """What each rank of a delta (h_out, h_in) is worth under B (`rows`) and A (`columns`)."""
    spectrum = decompose(delta, rows, columns)
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
        Prepared(spectrum, u_side.scale, v_side.scale),
        Profile(
            (h_out, h_in),
            spectrum.s.cpu(),
            losses(u_side, spectrum.u).cpu(),
            losses(v_side, spectrum.v).cpu(),
            overhead,
        ),
    )


def _scale_pays(metric: Metric, wide: bool) -> bool:
    """Coordinates that are weighted one by one pass no errors on: a scale does it for them."""
    return wide or metric.diagonal


def compress(
    delta: Tensor, prepared: Prepared, widths: Widths, rows: Metric, columns: Metric, dtype: str
) -> MatrixResult:
    """Encode the ranks that `widths` keeps, perhaps none."""
    kept = widths.kept.to(delta.device)
    spectrum = prepared.spectrum
    sides = Side(rows, prepared.row_scale), Side(columns, prepared.column_scale)
    chosen = Spectrum(spectrum.u[kept], spectrum.s[kept], spectrum.v[kept])
    coded = encode(delta, chosen, sides, (widths.u.to(delta.device), widths.v.to(delta.device)))
    encoded = encode_svd(
        SvdMatrix(_vectors(coded.u), coded.s.float().cpu().numpy(), _vectors(coded.v)),
        dtype,
        {},
        row_scale=_array(prepared.row_scale),
        column_scale=_array(prepared.column_scale),
    )
    notes: dict[str, Any] = {
        "rank": len(kept),
        "widths": _count(torch.cat([widths.u, widths.v])),
        "damping": max(rows.damping, columns.damping),
        "fallbacks": coded.fallbacks if len(kept) else [DROPPED],
    }
    return MatrixResult(encoded, torch.from_numpy(decode_dense(encoded)), notes)


def _vectors(codes: Midrise) -> Vectors:
    return Vectors(codes.codes.cpu().numpy(), codes.bits.cpu().numpy(), None)


def _array(scale: Tensor | None) -> np.ndarray[Any, np.dtype[np.float32]] | None:
    return None if scale is None else scale.float().cpu().numpy()


def _count(widths: Tensor) -> dict[str, int]:
    """Vectors of each width, both sides together, widest first."""
    counted = Counter(widths.tolist())
    return {str(width): counted[width] for width in sorted(counted, reverse=True)}
