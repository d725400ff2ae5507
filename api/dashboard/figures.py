"""A stored report, parsed for the pages."""

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Final, NamedTuple, Self

from pydantic import BaseModel, Field

NO_LAYER: Final = "–"
"""The layer of matrices outside all layers, such as an output head."""

_LAYER_NUMBER: Final = re.compile(r"(?:^|\.)(\d+)\.(?=.)")
SHOWN_SPECTRA: Final = 12
"""Projections whose singular values are drawn; mixtures of experts have hundreds."""
_LISTED_GROUPS: Final = 10
"""Groups of other tensors with a separate bar; the smaller ones are summed up."""


class RankFigures(NamedTuple):
    """A rank of a matrix: place from 1, singular value, widths of its two vectors; 0: dropped."""

    place: int
    value: float
    u_bits: int
    v_bits: int


class MatrixFigures(BaseModel):
    """One compressed matrix; see `deltadock.compression.report.MatrixReport`."""

    name: str
    shape: list[int] = Field(default_factory=list)
    kind: str = ""
    bytes: int = 0
    error: float | None = None
    rank: int = 0
    widths: dict[int, int] = Field(default_factory=dict)
    damping: float | None = None
    gap: float | None = None
    fallbacks: list[str] = Field(default_factory=list)
    spectrum: list[RankFigures] = Field(default_factory=list)

    @property
    def full_rank(self) -> int:
        """The maximum rank of a matrix of this shape."""
        return min(self.shape, default=0)

    @property
    def weights(self) -> int:
        """The number of weights."""
        return math.prod(self.shape) if self.shape else 0

    @property
    def bits(self) -> float:
        """Stored bits per weight."""
        return 8 * self.bytes / self.weights if self.weights else 0.0

    @property
    def kept(self) -> float:
        """Kept share of the full rank."""
        return self.rank / self.full_rank if self.full_rank else 0.0

    @property
    def widths_text(self) -> str:
        """Such as `6 x 4 bit, 18 x 3 bit`, widest first."""
        text = ", ".join(f"{n} × {w} bit" for w, n in sorted(self.widths.items(), reverse=True))
        # Where U and V differ in width, both factors' vectors are counted.
        return f"{text} in two factors" if sum(self.widths.values()) > self.rank else text


class TensorFigures(BaseModel):
    """A changed tensor that is not compressed by the method."""

    name: str
    kind: str = ""
    shape: list[int] = Field(default_factory=list)
    bytes: int = 0


class CalibrationFigures(BaseModel):
    """The calibration tokens."""

    sha256: str | None = None
    tokens: int | None = None
    seed: int | None = None


class MeasuredFigures(BaseModel):
    """A source of the text that the figures are measured on."""

    sha256: str | None
    tokens: int


class Place(NamedTuple):
    """A matrix's position in a chart: its projection and layer."""

    projection: str
    layer: str


@dataclass(frozen=True, slots=True)
class MatrixGrid:
    """Matrices by projection (rows) and layer (columns); cells may be missing."""

    projections: Sequence[str]
    layers: Sequence[str]
    cells: dict[Place, MatrixFigures]

    @classmethod
    def of(cls, matrices: Iterable[MatrixFigures]) -> Self:
        """Projections in order of appearance, layers by number, `NO_LAYER` last."""
        matrices = list(matrices)
        places = _places([matrix.name for matrix in matrices])
        cells = dict(zip(places, matrices, strict=True))
        layers = {place.layer for place in cells} - {NO_LAYER}
        return cls(
            projections=list(dict.fromkeys(place.projection for place in cells)),
            layers=[
                *sorted(layers, key=int),
                *({NO_LAYER} & {place.layer for place in cells}),
            ],
            cells=cells,
        )


class Spectra(NamedTuple):
    """Ranks of one projection's matrices in the first, a middle and the last layer."""

    projection: str
    by_layer: dict[str, list[RankFigures]]

    @property
    def has_dropped(self) -> bool:
        """Whether some ranks are not stored."""
        return any(rank.u_bits == 0 for ranks in self.by_layer.values() for rank in ranks)


class LayerBits(NamedTuple):
    """The bits per weight of one layer."""

    layer: str
    bits: float


class ByteShare(NamedTuple):
    """A part of the artifact; `style` is the CSS class of its colour."""

    label: str
    bytes: int
    style: str


class ReportFigures(BaseModel):
    """All figures of one report; see `deltadock.compression.report.Report`."""

    nominal_bits: float | None = None
    true_bits: float | None = None
    artifact_bytes: int | None = None
    checkpoint_bytes: int | None = None
    parameters: int | None = None
    ratio: float | None = None
    kl: float | None = None
    kl_base: float | None = None
    agreement: float | None = None
    nll: float | None = None
    nll_finetuned: float | None = None
    nll_base: float | None = None
    base_digest: str | None = None
    calibration: CalibrationFigures | None = None
    measured_on: list[MeasuredFigures] = Field(default_factory=list)
    seconds: float | None = None
    notes: list[str] = Field(default_factory=list)
    matrices: list[MatrixFigures] = Field(default_factory=list)
    others: list[TensorFigures] = Field(default_factory=list, alias="other_tensors")

    @cached_property
    def grid(self) -> MatrixGrid:
        """The matrices by projection and layer."""
        return MatrixGrid.of(self.matrices)

    @cached_property
    def has_errors(self) -> bool:
        """Whether any matrix has an error: an exact method has none to show."""
        return any(matrix.error for matrix in self.matrices)

    @cached_property
    def bits_by_layer(self) -> list[LayerBits]:
        """Stored bits per weight of each layer's matrices; empty if no two layers differ."""
        layers: dict[str, list[MatrixFigures]] = {layer: [] for layer in self.grid.layers}
        for place, matrix in self.grid.cells.items():
            layers[place.layer].append(matrix)
        bits = [
            LayerBits(layer, 8 * sum(m.bytes for m in found) / sum(m.weights for m in found))
            for layer, found in layers.items()
            if any(m.weights for m in found)
        ]
        return bits if len({round(layer.bits, 3) for layer in bits}) > 1 else []

    @cached_property
    def spectra(self) -> list[Spectra]:
        """The ranks of the first `SHOWN_SPECTRA` projections whose methods decompose them."""
        found: dict[str, dict[str, list[RankFigures]]] = {}
        for layer in self.grid.layers:
            for projection in self.grid.projections:
                matrix = self.grid.cells.get(Place(projection, layer))
                if matrix is not None and len(matrix.spectrum) > 1:
                    found.setdefault(projection, {})[layer] = matrix.spectrum
        return [
            Spectra(projection, {layer: layers[layer] for layer in _ends_and_middle(list(layers))})
            for projection, layers in list(found.items())[:SHOWN_SPECTRA]
        ]

    @cached_property
    def widths(self) -> list[int]:
        """All widths in use, in bits, ascending."""
        return sorted({width for matrix in self.matrices for width in matrix.widths})

    @cached_property
    def fallbacks(self) -> list[MatrixFigures]:
        """Matrices for which a fallback was used."""
        return [matrix for matrix in self.matrices if matrix.fallbacks]

    @cached_property
    def shares(self) -> list[ByteShare]:
        """The artifact's bytes: matrices and other tensors by projection, and the remainder."""
        others = sorted(_by_projection(self.others, "base"), key=lambda share: -share.bytes)
        shares = [*_by_projection(self.matrices, "delta"), *others[:_LISTED_GROUPS]]
        if small := others[_LISTED_GROUPS:]:
            smaller = sum(share.bytes for share in small)
            shares.append(ByteShare("smaller tensors", smaller, "base"))
        remainder = (self.artifact_bytes or 0) - sum(share.bytes for share in shares)
        if remainder > 0:
            shares.append(ByteShare("header and manifest", remainder, "full"))
        return shares


def _ends_and_middle(layers: Sequence[str]) -> list[str]:
    return list(dict.fromkeys([layers[0], layers[len(layers) // 2], layers[-1]]))


def _by_projection(parts: Sequence[MatrixFigures | TensorFigures], style: str) -> list[ByteShare]:
    groups: dict[str, list[int]] = {}
    for place, part in zip(_places([part.name for part in parts]), parts, strict=True):
        groups.setdefault(place.projection, []).append(part.bytes)
    return [
        ByteShare(f"{name} × {len(sizes)}" if len(sizes) > 1 else name, sum(sizes), style)
        for name, sizes in groups.items()
    ]


def _places(names: Sequence[str]) -> list[Place]:
    """Each tensor's place; with several stacks of layers, projections include the stack's name."""
    plain = [name.removesuffix(".weight") for name in names]
    matches = [_LAYER_NUMBER.search(name) for name in plain]
    stacks = {match.string[: match.start()] for match in matches if match}
    places = []
    for name, match in zip(plain, matches, strict=True):
        if match is None:
            places.append(Place(name, NO_LAYER))
            continue
        projection = name[match.end() :]
        if len(stacks) > 1:
            projection = f"{name[: match.start()]}.*.{projection}".removeprefix(".")
        places.append(Place(projection, str(int(match[1]))))
    return places
