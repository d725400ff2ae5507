"""Report of a compression, as JSON-able data."""

import math
from dataclasses import asdict, dataclass, field
from typing import Any, Final

from deltadock.errors import InvalidInput

POOR: Final = 0.5
"""Fraction of the base's KL from which on a report says that a delta is far from its fine-tune."""

LEAST_POOR: Final = 1e-4
"""KL in nats per token below which no delta is far from its fine-tune, however near the base is."""

UNRELATED: Final = (
    "Is this the base that was fine-tuned? Its weights and the fine-tune's point in directions as "
    "different as those of unrelated models."
)
"""The note of a pair whose weights have little in common."""

FIGURES: Final = ("kl", "kl_base", "agreement", "nll", "nll_finetuned", "nll_base")
"""Of `Quality`, those in a report's JSON; null if nothing was measured."""

Rank = tuple[int, float, int, int]
"""Of a decomposed matrix: place from 1, singular value, bits of U's vector and of V's, 0 if
dropped."""


@dataclass(frozen=True, slots=True)
class Quality:
    """Figures of a delta against its fine-tune and its base.

    Attributes:
        kl: KL(fine-tuned || delta).
        kl_base: KL(fine-tuned || base), the KL of storing no delta at all.
        agreement: fraction of positions with the same most likely token.
        nll, nll_finetuned, nll_base: of the text's next tokens.
        tokens: positions measured.
        kl_error: standard error of `kl` as that of other text of this kind, of tokens that are
            independent.
        kl_max: KL of the position where it is largest.
    """

    kl: float
    kl_base: float
    agreement: float
    nll: float
    nll_finetuned: float
    nll_base: float
    tokens: int
    kl_error: float
    kl_max: float

    @property
    def is_far(self) -> bool:
        """Whether the delta is far from its fine-tune: see `POOR`. Without a finite KL it is."""
        return not math.isfinite(self.kl) or self.kl > max(POOR * self.kl_base, LEAST_POOR)


def not_measured(error: InvalidInput) -> str:
    """The note of a report whose figures are missing."""
    return f"KL, agreement and loss are not measured. {error.message}"


@dataclass(frozen=True, slots=True)
class MatrixReport:
    """One compressed matrix.

    Attributes:
        name: weight name.
        shape: [h_out, h_in].
        kind: encoding in the artifact.
        bytes: size in the artifact.
        error: relative output error `||(D - D_hat) X||^2 / ||D X||^2` on the reporting windows; of
            an embedding, under its metric. Measured before distillation.
        rank: ranks kept.
        widths: number of ranks of each width; of vectors, where U and V have separate widths.
        damping: largest damping used, as a fraction of the Hessian's mean diagonal.
        gap: relative optimality gap of the allocation; 0 is proven optimal.
        fallbacks: deviations from the method, in words.
        spectrum: some of the ranks that the method chose from, and of those dropped; empty for
            methods without a decomposition.
    """

    name: str
    shape: list[int]
    kind: str
    bytes: int
    error: float
    rank: int
    widths: dict[str, int]
    damping: float
    gap: float
    fallbacks: list[str]
    spectrum: list[Rank] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class TensorReport:
    """One changed tensor that the method did not compress."""

    name: str
    kind: str
    shape: list[int]
    bytes: int


@dataclass(slots=True)
class Report:
    """Result of a compression. KL and NLL are in nats per token of the reporting windows, which
    have decided nothing before but whether a bound is kept.

    `ratio` and `true_bits` count every byte of the artifact against every weight of the
    checkpoint at bfloat16; `nominal_bits` is the budget in code bits per compressed weight.
    """

    method: str
    nominal_bits: float | None
    artifact_bytes: int
    checkpoint_bytes: int
    parameters: int
    base_digest: str
    calibration: dict[str, Any] | None
    matrices: list[MatrixReport] = field(default_factory=list)
    other_tensors: list[TensorReport] = field(default_factory=list)
    distillation: dict[str, float] | None = None
    """KL on the choosing windows `before` and `after`; 1 or 0: whether it was `kept`, and whether
    both models stayed on the device (`resident`)."""
    bound_reached: float | None = None
    """KL or agreement on the choosing windows at the worse end of its interval: what the search for
    a bound went by."""
    quality: Quality | None = None
    """None: not measured; a note says why."""
    measured_on: list[dict[str, Any]] = field(default_factory=list)
    """The text of the figures: `kind` (text, conversations, sampled), `sha256` of the file (None if
    sampled from the fine-tune) and `tokens` of each source; empty if nothing was measured."""
    seconds: float = 0.0
    notes: list[str] = field(default_factory=list)
    """What was not taken from the fine-tune's folder, and why figures are missing or poor, in
    words."""

    @property
    def ratio(self) -> float:
        """Checkpoint bytes at bfloat16 over artifact bytes."""
        return self.checkpoint_bytes / self.artifact_bytes

    @property
    def true_bits(self) -> float:
        """Artifact bits per weight of the checkpoint."""
        return 8 * self.artifact_bytes / self.parameters

    def set_quality(self, quality: Quality, measured_on: list[dict[str, Any]]) -> None:
        """Take the figures of the whole model, describe their text, and say if they are poor."""
        self.quality, self.measured_on = quality, measured_on
        if quality.is_far:
            figures = (
                f"its KL is {quality.kl:.3g}, that of the bare base {quality.kl_base:.3g}"
                if math.isfinite(quality.kl)
                else "its outputs hold NaN or an infinity"
            )
            far = f"The delta is far from its fine-tune: {figures}."
            advice = (
                " Is this the base that was fine-tuned? If so, allow more bits, or take another "
                "method or text."
            )
            self.notes.append(far if UNRELATED in self.notes else far + advice)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form, with `FIGURES`, `is_far`, `ratio` and `true_bits`.

        JSON has no NaN and no infinity: such a figure is None, and the whole model's have a note.
        """
        whole = asdict(self)
        del whole["quality"]
        whole |= {name: getattr(self.quality, name, None) for name in FIGURES}
        whole |= {
            "is_far": self.quality is not None and self.quality.is_far,
            "ratio": self.ratio,
            "true_bits": self.true_bits,
        }
        lost = [
            name for name, value in whole.items() if value is not None and _json_able(value) is None
        ]
        document: dict[str, Any] = _json_able(whole)
        if lost:
            document["notes"].append(f"Not finite, and so left out: {', '.join(lost)}.")
        return document


def _json_able(value: Any) -> Any:
    """The value, with None in place of NaN and infinities."""
    if isinstance(value, dict):
        return {key: _json_able(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_json_able(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
