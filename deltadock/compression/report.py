"""The report of a compression: what a reader may rely on, as JSON-able data."""

from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from deltadock.compression.quality import Quality


@dataclass(frozen=True, slots=True)
class MatrixReport:
    """One compressed matrix.

    Attributes:
        name: weight name.
        shape: [h_out, h_in].
        kind: how it is stored.
        bytes: in the artifact.
        error: `||(D - D_hat) X||^2 / ||D X||^2` on held-out tokens; of an embedding, under its
            metric. Of codes as they were quantized: distillation, which aims at the model's
            outputs and not at each matrix's, comes after.
        rank: ranks kept.
        widths: how many ranks have each width; where U and V have their own, how many vectors.
        damping: largest damping used, as a fraction of the Hessian's mean diagonal.
        gap: relative optimality gap of the allocation; 0 is proven optimal.
        fallbacks: what did not go as planned, in words.
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


@dataclass(frozen=True, slots=True)
class TensorReport:
    """One changed tensor that is stored in another way than by the method."""

    name: str
    kind: str
    shape: list[int]
    bytes: int


@dataclass(slots=True)
class Report:
    """What became of a fine-tune. KL and NLL are in nats per held-out calibration token.

    `ratio` and `true_bits` count every byte of the artifact against every weight of the
    checkpoint at bfloat16; `nominal_bits` is the budget, code bits per weight of a linear layer.
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
    kl: float | None = None
    kl_base: float | None = None
    agreement: float | None = None
    nll: float | None = None
    nll_finetuned: float | None = None
    nll_base: float | None = None
    seconds: float = 0.0

    @property
    def ratio(self) -> float:
        """Checkpoint bytes at bfloat16 over artifact bytes."""
        return self.checkpoint_bytes / self.artifact_bytes

    @property
    def true_bits(self) -> float:
        """Artifact bits per weight of the checkpoint."""
        return 8 * self.artifact_bytes / self.parameters

    def set_quality(self, quality: "Quality") -> None:
        """Take over the figures of the whole model."""
        self.kl = quality.kl
        self.kl_base = quality.kl_base
        self.agreement = quality.agreement
        self.nll = quality.nll
        self.nll_finetuned = quality.nll_finetuned
        self.nll_base = quality.nll_base

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form, with `ratio` and `true_bits`."""
        return {**asdict(self), "ratio": self.ratio, "true_bits": self.true_bits}
