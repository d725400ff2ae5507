"""How large an artifact will be, told from names and shapes alone, before any work.

Plain Python, so that the api can tell it.
"""

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from deltadock.artifacts.checkpoint import CheckpointManifest
from deltadock.artifacts.container import header_length, parse_header
from deltadock.compression.catalogue import METHODS
from deltadock.compression.goal import SIZES, Goal
from deltadock.compression.layouts import LAYOUTS, ROLES, Shape
from deltadock.errors import InvalidCheckpoint, InvalidGoal, InvalidInput

REST: Final = "manifest"

HEAD_BYTES: Final = 1_000
"""The manifest's own fields and the file's alignment."""
RECORD_BYTES: Final = 105
SEGMENT_BYTES: Final = 205
NOTES_BYTES: Final = 150
"""What a tensor, each of its segments, and a matrix's report take in header and manifest."""
FILE_GROWTH: Final = 1.5
"""A JSON file travels as a string within a string."""


@dataclass(frozen=True, slots=True)
class Part:
    """One kind of tensor in the artifact; `bytes` are without the manifest's."""

    kind: str
    tensors: int
    weights: int
    bytes: int


@dataclass(frozen=True, slots=True)
class SizePreview:
    """What a compression will come to.

    Attributes:
        method: its name.
        bits: the budget, as given or as the size asks for; None for methods without one.
        artifact_bytes: of the whole file.
        checkpoint_bytes: of the fine-tune at two bytes a weight.
        parameters: its weights.
        parts: changed tensors by kind, then the manifest with the files that travel in it.
    """

    method: str
    bits: float | None
    artifact_bytes: int
    checkpoint_bytes: int
    parameters: int
    parts: list[Part]

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


def read_shapes(folder: Path) -> list[Shape]:
    """The tensors of a checkpoint folder from its files' headers; all are taken as changed.

    Raises:
        InvalidCheckpoint: there are no safetensors files, or one is malformed.
    """
    shapes = []
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as stream:
            header = parse_header(stream.read(header_length(stream.read(8))))
        shapes += [Shape(spec.name, spec.dtype, spec.shape) for spec in header.tensors]
    if not shapes:
        raise InvalidCheckpoint(f"{folder} holds no .safetensors file with weights.")
    return shapes


def shapes_of(finetuned: CheckpointManifest, base: CheckpointManifest | None = None) -> list[Shape]:
    """The fine-tune's tensors; without a base, all of them are taken as changed."""
    before = {} if base is None else {t.name: (t.dtype, t.shape, t.sha256) for t in base.tensors}
    return [
        Shape(t.name, t.dtype, t.shape, before.get(t.name) != (t.dtype, t.shape, t.sha256))
        for t in finetuned.tensors
    ]


def carried_bytes(finetuned: CheckpointManifest, base: CheckpointManifest | None = None) -> int:
    """Bytes of the config and tokenizer files that differ from the base's, as the artifact has
    them; none where there is no base to differ from.
    """
    if base is None:
        return 0
    before = {file.path: file.sha256 for file in base.files}
    changed = [
        file.size
        for file in finetuned.files
        if not file.path.endswith((".safetensors", ".safetensors.index.json"))
        and before.get(file.path) != file.sha256
    ]
    return round(FILE_GROWTH * sum(changed))


def preview(
    tensors: Iterable[Shape], method: str, goal: Goal | None, *, carried: int = 0
) -> SizePreview:
    """Predict the size of the artifact.

    Args:
        tensors: of the fine-tune.
        method: a name of the catalogue.
        goal: what `deltadock.compression.goal.goal_for` made of the wish for this method.
        carried: bytes of files that travel in the manifest.

    Raises:
        InvalidGoal: the size follows from what the work will measure, or is below the least that
            this method can make.
        InvalidInput: the method imports an adapter.
    """
    tensors = list(tensors)
    info = METHODS[method]
    if info.imports_adapter:
        raise InvalidInput(
            f"The method {method!r} keeps an adapter as it is: the artifact is about as large as "
            "the adapter file."
        )
    if goal is None:
        return _preview(tensors, method, None, carried)
    if goal.kind not in SIZES:
        raise InvalidGoal(
            f"How small {goal.kind} lets the artifact be is only known after the work. Preview "
            "bits, target_bytes or ratio."
        )
    if goal.kind == "bits":
        return _preview(tensors, method, goal.value, carried)
    assert info.bits_min is not None, "a method without a budget has no goal"
    assert info.bits_max is not None
    low, high = info.bits_min, info.bits_max
    parameters = sum(tensor.weights for tensor in tensors)
    target = goal.value if goal.kind == "target_bytes" else 2 * parameters / goal.value
    least = _preview(tensors, method, low, carried)
    if least.artifact_bytes > target:
        raise InvalidGoal(
            f"{goal} cannot be reached by {method!r}: its smallest artifact of this model takes "
            f"about {least.artifact_bytes} bytes, a ratio of {least.ratio:.1f}."
        )
    most = _preview(tensors, method, high, carried)
    if most.artifact_bytes <= target:
        return most
    if info.budgets:
        found = [_preview(tensors, method, bits, carried) for bits in sorted(info.budgets)]
        return [size for size in found if size.artifact_bytes <= target][-1]
    for _ in range(40):
        middle = (low + high) / 2
        size = _preview(tensors, method, middle, carried)
        if size.artifact_bytes <= target:
            low, least = middle, size
        else:
            high = middle
    return least


def _preview(tensors: list[Shape], method: str, bits: float | None, carried: int) -> SizePreview:
    layout = LAYOUTS.get(method, LAYOUTS["optimix"])
    changed = [tensor for tensor in tensors if tensor.changed and tensor.weights]
    manifest = float(HEAD_BYTES + carried)
    parts = []
    for role in ROLES:
        members = [tensor for tensor in changed if tensor.role == role]
        stored = [layout(tensor, bits) for tensor in members]
        parts.append(
            Part(
                role,
                len(members),
                sum(tensor.weights for tensor in members),
                round(sum(one.bytes for one in stored)),
            )
        )
        manifest += sum(RECORD_BYTES + one.segments * SEGMENT_BYTES for one in stored)
        if method != "exact" and role in ("linear layers", "output head"):
            manifest += NOTES_BYTES * sum(tensor.matrices[0] for tensor in members)
    parts.append(Part(REST, 0, 0, round(manifest)))
    parameters = sum(tensor.weights for tensor in tensors)
    return SizePreview(
        method, bits, sum(part.bytes for part in parts), 2 * parameters, parameters,
        [part for part in parts if part.bytes],
    )  # fmt: skip
