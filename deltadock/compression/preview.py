"""Artifact sizes predicted from tensor names and shapes, before any work.

Plain Python, so that the api can use it. Linear layers are recognized by name here, and from the
modelling code in a real compression: for a family with unusual names the prediction is off by the
weights of these tensors. Widths that an allocation will choose and zlib's ratios are estimates as
well; tests compare them with real artifacts.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from types import MappingProxyType
from typing import Any, Final, NamedTuple

from deltadock import words
from deltadock.artifacts.checkpoint import CheckpointManifest, FileEntry
from deltadock.artifacts.compatibility import differing_files
from deltadock.artifacts.container import DTYPE_BITS
from deltadock.artifacts.manifest import DEFLATED_FROM
from deltadock.compression.options import METHODS, Goal, rank_budget
from deltadock.compression.shapes import ROLES, Role, TensorShape
from deltadock.errors import InvalidGoal

OVERESTIMATES: Final[Mapping[str, float]] = MappingProxyType({"optimix": 2.0, "delta-zip": 1.5})
OVERESTIMATE: Final = 1.1
"""Factor by which sizes are overestimated at most: those of small models, what zlib leaves, and by
the other methods."""

RUNS_PADDING: Final = 680
"""Bytes of alignment per matrix, as measured."""


class TensorKind(NamedTuple):
    """What a tensor's stored size depends on: a model has few kinds, and up to 100,000 tensors."""

    role: Role
    dtype: str
    shape: tuple[int, ...]

    @property
    def weights(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def matrices(self) -> tuple[int, int, int]:
        """Number of stacked matrices (a mixture's experts), and their h_out and h_in."""
        *stacked, h_out, h_in = self.shape
        return math.prod(stacked), h_out, h_in


class StoredSize(NamedTuple):
    """Size of one tensor: bytes of data, and number of segments."""

    bytes: float
    segments: int


MatrixEstimate = Callable[[int, int, float], StoredSize | None]
"""Size of a (h_out, h_in) matrix under a budget; None: the budget is too small for any code."""

SizeEstimate = Callable[[TensorKind, float | None], StoredSize]
"""Size of a tensor under a budget."""


def _exact(tensor: TensorKind, bits: float | None) -> StoredSize:
    return StoredSize(tensor.weights * DTYPE_BITS[tensor.dtype] / 8, 1)


def _rows(tensor: TensorKind, bits: float) -> StoredSize:
    """Row-wise codes of `bits` and a float16 scale per row."""
    return StoredSize(tensor.weights * bits / 8 + 2 * tensor.weights / tensor.shape[-1], 2)


def _local(matrix: MatrixEstimate) -> SizeEstimate:
    """The same budget for every matrix, and 4 bits per weight for embeddings."""

    def estimate(tensor: TensorKind, bits: float | None) -> StoredSize:
        role = tensor.role
        if role == "other tensors":
            return _exact(tensor, None)
        if role == "embeddings":
            return _rows(tensor, 4)
        count, h_out, h_in = tensor.matrices
        one = matrix(h_out, h_in, bits or 0.0)
        if one is None:
            return _exact(tensor, None)
        return StoredSize(count * one.bytes, count * one.segments)

    return estimate


def _decomposed(mean_width: float) -> MatrixEstimate:
    """Codes of U and V of `mean_width` bits on average, and 8 bytes of scales per rank."""

    def matrix(h_out: int, h_in: int, bits: float) -> StoredSize | None:
        budget = rank_budget(bits, h_out, h_in)
        codes = budget * (h_out + h_in) / 8
        return StoredSize(codes + 8 * budget / mean_width, 5) if budget >= 2 else None

    return matrix


def _fixed(*leading: tuple[int, int], rest: int = 2) -> MatrixEstimate:
    """The same with widths by rank: (width, number of ranks), then `rest` within the budget."""

    def matrix(h_out: int, h_in: int, bits: float) -> StoredSize | None:
        left = budget = rank_budget(bits, h_out, h_in)
        ranks, spent = 0, 0
        for width, most in (*leading, (rest, budget)):
            count = min(most, left // width, min(h_out, h_in) - ranks)
            ranks, spent, left = ranks + count, spent + count * width, left - count * width
        return StoredSize(spent * (h_out + h_in) / 8 + 8 * ranks, 5) if budget >= 2 else None

    return matrix


def _low_rank(h_out: int, h_in: int, bits: float) -> StoredSize:
    return StoredSize(2 * int(bits * h_out * h_in / (16 * (h_out + h_in))) * (h_out + h_in), 2)


def _sign(h_out: int, h_in: int, bits: float) -> StoredSize:
    return StoredSize(h_out * h_in / 8 + 4, 2)


def _two_of_four(h_out: int, h_in: int, bits: float) -> StoredSize:
    """Two codes of 2 bits, or 4 from 2.0 on, for every four columns; after zlib, as measured."""
    return StoredSize(h_out * h_in * (2.65 if bits >= 2 else 1.76) / 8, 3)


def _one_in_twenty(h_out: int, h_in: int, bits: float) -> StoredSize:
    """A bitmap and 2-bit codes of 5 % of the entries, after zlib, as measured; a scale per row."""
    return StoredSize(h_out * h_in * 0.42 / 8 + 2 * h_out, 3)


def _global(tensor: TensorKind, bits: float | None) -> StoredSize:
    """One budget for all compressed tensors, scales included.

    A matrix has about ten runs of ranks of equal widths, whose alignment comes on top.
    """
    if tensor.role == "other tensors":
        return _exact(tensor, None)
    count = tensor.matrices[0]
    return StoredSize(tensor.weights * (bits or 0.0) / 8 + RUNS_PADDING * count, 5 * count)


SIZE_ESTIMATES: Final[Mapping[str, SizeEstimate]] = MappingProxyType(
    {
        "optimix": _global,
        "adamix": _local(_decomposed(2.5)),
        "delta-come": _local(_fixed((8, 2), (3, 32))),
        "topk-2": _local(_fixed((8, 2))),
        "topk-32": _local(_fixed((8, 32))),
        "low-rank": _local(_low_rank),
        "bitdelta": _local(_sign),
        "bitdelta-distilled": _local(_sign),
        "delta-zip": _local(_two_of_four),
        "gpt-zip": _local(_one_in_twenty),
        "lora": _exact,
        "exact": _exact,
    }
)
"""Size estimate of each method."""


MANIFEST_PART: Final = "manifest"

HEAD_BYTES: Final = 1_000
"""The manifest's top-level fields and the file's alignment."""
RECORD_BYTES: Final = 105
SEGMENT_BYTES: Final = 205
NOTES_BYTES: Final = 150
"""Bytes of a tensor, of each of its segments, and of a matrix's report in header and manifest."""
ESCAPED: Final = 1.5
DEFLATED: Final = 0.3
ENCODED: Final = 4 / 3
"""Bytes in the manifest per byte of a carried file: of a text as an escaped string, or deflated in
base64, and of a binary one in base64."""


@dataclass(frozen=True, slots=True)
class PreviewPart:
    """One role of tensors in the artifact; `bytes` exclude the manifest."""

    kind: str
    tensors: int
    weights: int
    bytes: int


@dataclass(frozen=True, slots=True)
class SizePreview:
    """The predicted size of a compression.

    Attributes:
        method: its name.
        bits: the budget, as given or as the size goal requires; None for methods without one.
        artifact_bytes: of the whole file.
        checkpoint_bytes: of the fine-tune at two bytes a weight.
        parameters: its weights.
        parts: changed tensors by role, then the manifest with the carried files.
    """

    method: str
    bits: float | None
    artifact_bytes: int
    checkpoint_bytes: int
    parameters: int
    parts: list[PreviewPart]

    @property
    def ratio(self) -> float:
        """Checkpoint bytes at bfloat16 per artifact byte."""
        return self.checkpoint_bytes / self.artifact_bytes

    @property
    def true_bits(self) -> float:
        """Artifact bits per weight of the checkpoint."""
        return 8 * self.artifact_bytes / self.parameters

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form, with `ratio` and `true_bits`."""
        return {**asdict(self), "ratio": self.ratio, "true_bits": self.true_bits}


def carried_bytes(finetuned: CheckpointManifest, base: CheckpointManifest | None = None) -> int:
    """Bytes in the artifact of config and tokenizer files that differ from the base's; 0 without a
    base.
    """
    if base is None:
        return 0
    return round(sum(_carried(file) for file in differing_files(base, finetuned).values() if file))


def _carried(file: FileEntry) -> float:
    if file.path.endswith(".model"):  # SentencePiece's, which is not text
        return file.size * ENCODED
    return file.size * (ESCAPED if file.size < DEFLATED_FROM else DEFLATED)


def preview_size(
    tensors: Iterable[TensorShape], method: str, goal: Goal | None, *, carried: int = 0
) -> SizePreview:
    """Predict the size of the artifact.

    Args:
        tensors: of the fine-tune.
        method: a name of `METHODS`.
        goal: the result of `deltadock.compression.options.goal_for` for this method.
        carried: bytes of the files carried in the manifest.

    Raises:
        InvalidGoal: the size depends on measurements, or is less than this method can make, by more
            than the prediction may be off. (Where it is less than predicted, and may still be
            reached, the smallest is returned.)
    """
    info = METHODS[method]
    if goal is not None and goal.is_bound:
        raise InvalidGoal(
            f"How small {goal.kind} lets the artifact be is only known after the work. Preview "
            "bits, target_bytes or ratio."
        )
    tensors = list(tensors)
    parameters = sum(tensor.weights for tensor in tensors if not tensor.added)
    changed = [tensor for tensor in tensors if tensor.changed and tensor.weights]
    kinds, certain = (
        Counter(TensorKind(tensor.role, tensor.dtype, tensor.shape) for tensor in found)
        for found in (changed, [tensor for tensor in changed if not tensor.recast])
    )

    def at(bits: float | None) -> SizePreview:
        return _preview(kinds, method, bits, parameters, carried)

    if goal is None or goal.kind == "bits":
        return at(goal.value if goal else None)
    assert info.bits_min is not None, "a method without a budget has no goal"
    assert info.bits_max is not None
    low, high = info.bits_min, info.bits_max
    target = goal.value if goal.kind == "target_bytes" else 2 * parameters / goal.value
    least = at(low)
    surely = _preview(certain, method, low, parameters, carried)
    if surely.artifact_bytes > OVERESTIMATES.get(method, OVERESTIMATE) * target:
        raise InvalidGoal(
            f"{goal} cannot be reached by {method!r}: its smallest artifact of this model takes "
            f"about {words.size(surely.artifact_bytes)}, a ratio of {surely.ratio:.3g}."
        )
    if least.artifact_bytes > target:
        return least
    most = at(high)
    if most.artifact_bytes <= target:
        return most
    if info.budgets:
        found = [at(bits) for bits in sorted(info.budgets)]
        return [size for size in found if size.artifact_bytes <= target][-1]
    for _ in range(40):
        middle = (low + high) / 2
        size = at(middle)
        if size.artifact_bytes <= target:
            low, least = middle, size
        else:
            high = middle
    return least


def _preview(
    kinds: Mapping[TensorKind, int], method: str, bits: float | None, parameters: int, carried: int
) -> SizePreview:
    """The size with this budget, from the number of changed tensors of each kind."""
    estimate = SIZE_ESTIMATES[method]
    manifest = float(HEAD_BYTES + carried)
    parts = []
    for role in ROLES:
        members = [(kind, count) for kind, count in kinds.items() if kind.role == role]
        stored = [(estimate(kind, bits), count) for kind, count in members]
        parts.append(
            PreviewPart(
                role,
                sum(count for _, count in members),
                sum(count * kind.weights for kind, count in members),
                round(sum(count * one.bytes for one, count in stored)),
            )
        )
        manifest += sum(
            count * (RECORD_BYTES + one.segments * SEGMENT_BYTES) for one, count in stored
        )
        if not METHODS[method].is_lossless and role in ("linear layers", "output head"):
            manifest += NOTES_BYTES * sum(count * kind.matrices[0] for kind, count in members)
    parts.append(PreviewPart(MANIFEST_PART, 0, 0, round(manifest)))
    return SizePreview(
        method, bits, sum(part.bytes for part in parts), 2 * parameters, parameters,
        [part for part in parts if part.bytes],
    )  # fmt: skip
