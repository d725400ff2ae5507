"""A stored report as the pages draw it."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Final, NamedTuple, Self

from pydantic import BaseModel, Field

OUTSIDE: Final = "–"
"""The layer of a matrix that belongs to none, such as an output head."""

_IN_LAYER: Final = re.compile(r"(?:^|\.)(\d+)\.(?=.)")
_LARGEST: Final = 10
"""Groups of other tensors that get a line of their own."""


class Matrix(BaseModel):
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

    @property
    def full_rank(self) -> int:
        """The most ranks that a matrix of this shape can have."""
        return min(self.shape, default=0)

    @property
    def kept(self) -> float:
        """Share of the full rank that has codes."""
        return self.rank / self.full_rank if self.full_rank else 0.0

    @property
    def widths_text(self) -> str:
        """Such as `6 x 4 bit, 18 x 3 bit`, widest first."""
        told = ", ".join(f"{n} × {w} bit" for w, n in sorted(self.widths.items(), reverse=True))
        # U and V have widths of their own: these are both factors' vectors.
        return f"{told} in two factors" if sum(self.widths.values()) > self.rank else told


class Tensor(BaseModel):
    """One changed tensor that is stored in another way than by the method."""

    name: str
    kind: str = ""
    shape: list[int] = Field(default_factory=list)
    bytes: int = 0


class Calibration(BaseModel):
    """What the errors were weighed with."""

    sha256: str | None = None
    tokens: int | None = None
    seed: int | None = None


class Summary(BaseModel):
    """The figures of the whole model; see `deltadock.compression.report.Report`."""

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
    calibration: Calibration | None = None
    seconds: float | None = None


class Place(NamedTuple):
    """Where a matrix stands in a drawing: which projection of which layer."""

    projection: str
    layer: str


@dataclass(frozen=True, slots=True)
class Grid:
    """Matrices by projection (rows) and layer (columns); a place may be empty."""

    projections: Sequence[str]
    layers: Sequence[str]
    cells: dict[Place, Matrix]

    @classmethod
    def of(cls, matrices: Iterable[Matrix]) -> Self:
        """Projections as they first appear, layers by number, what is in no layer last."""
        matrices = list(matrices)
        places = _places([matrix.name for matrix in matrices])
        cells = dict(zip(places, matrices, strict=True))
        layers = {place.layer for place in cells} - {OUTSIDE}
        return cls(
            projections=list(dict.fromkeys(place.projection for place in cells)),
            layers=[
                *sorted(layers, key=int),
                *({OUTSIDE} & {place.layer for place in cells}),
            ],
            cells=cells,
        )


class Share(NamedTuple):
    """A part of the artifact; `style` is its colour's class."""

    label: str
    bytes: int
    style: str


@dataclass(frozen=True, slots=True)
class Figures:
    """Everything that one report holds."""

    summary: Summary
    matrices: list[Matrix]
    others: list[Tensor]

    @classmethod
    def of(cls, report: dict[str, Any]) -> Self:
        """Read a report as it is stored."""
        return cls(
            summary=Summary.model_validate(report),
            matrices=[Matrix.model_validate(row) for row in report.get("matrices", [])],
            others=[Tensor.model_validate(row) for row in report.get("other_tensors", [])],
        )

    @property
    def grid(self) -> Grid:
        """The matrices, to be drawn."""
        return Grid.of(self.matrices)

    @property
    def widths(self) -> list[int]:
        """Every width in use, in bits, rising."""
        return sorted({width for matrix in self.matrices for width in matrix.widths})

    @property
    def fallbacks(self) -> list[Matrix]:
        """Matrices where something did not go as planned."""
        return [matrix for matrix in self.matrices if matrix.fallbacks]

    @property
    def shares(self) -> list[Share]:
        """The artifact's bytes: matrices by projection, other tensors likewise, all the rest."""
        others = sorted(_by_projection(self.others, "base"), key=lambda share: -share.bytes)
        shares = [*_by_projection(self.matrices, "delta"), *others[:_LARGEST]]
        if small := others[_LARGEST:]:
            shares.append(Share("smaller tensors", sum(share.bytes for share in small), "base"))
        rest = (self.summary.artifact_bytes or 0) - sum(share.bytes for share in shares)
        if rest > 0:
            shares.append(Share("header and manifest", rest, "full"))
        return shares


def _by_projection(parts: Sequence[Matrix | Tensor], style: str) -> list[Share]:
    groups: dict[str, list[int]] = {}
    for place, part in zip(_places([part.name for part in parts]), parts, strict=True):
        groups.setdefault(place.projection, []).append(part.bytes)
    return [
        Share(f"{name} × {len(sizes)}" if len(sizes) > 1 else name, sum(sizes), style)
        for name, sizes in groups.items()
    ]


def _places(names: Sequence[str]) -> list[Place]:
    """Where each goes. Stacks of layers are told apart by what stands before the layer's number."""
    plain = [name.removesuffix(".weight") for name in names]
    matches = [_IN_LAYER.search(name) for name in plain]
    stacks = {match.string[: match.start()] for match in matches if match}
    places = []
    for name, match in zip(plain, matches, strict=True):
        if match is None:
            places.append(Place(name, OUTSIDE))
            continue
        projection = name[match.end() :]
        if len(stacks) > 1:
            projection = f"{name[: match.start()]}.*.{projection}".removeprefix(".")
        places.append(Place(projection, str(int(match[1]))))
    return places
