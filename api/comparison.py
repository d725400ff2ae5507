"""What a fine-tune changes of its base, by their manifests.

With 100,000 tensors that takes seconds of one core and hundreds of megabytes: endpoints run it in
threads of `Resources.comparing`, a few at a time, and in no transaction.
"""

from typing import Final

from deltadock.artifacts.checkpoint import CheckpointManifest
from deltadock.artifacts.compatibility import check_differs, check_structure
from deltadock.compression.checks import check_compressible
from deltadock.compression.options import Goal, MethodInfo
from deltadock.compression.preview import carried_bytes
from deltadock.compression.shapes import TensorShape, shapes_of
from deltadock.errors import (
    ArchitectureMismatch,
    InvalidAdapter,
    InvalidGoal,
    InvalidInput,
    UnchangedCheckpoint,
    UnsupportedModel,
    refused_by_state,
)
from deltadock.storage.blobs import BlobStore
from deltadock.storage.cache import MANIFEST_BYTES

REFUSED_COMPARISONS: Final[tuple[type[InvalidInput], ...]] = (
    ArchitectureMismatch,
    InvalidAdapter,
    InvalidGoal,
    UnchangedCheckpoint,
    UnsupportedModel,
)
"""What two stored checkpoints are refused for, with 409, by `compare` and a preview of the size."""


def compare(
    blobs: BlobStore,
    base: str,
    finetuned: str,
    method: MethodInfo,
    goal: Goal | None,
    *,
    has_text: bool = False,
) -> tuple[list[TensorShape], int]:
    """The tensors, and the bytes of carried files, of a fine-tune or adapter and its base.

    Args:
        blobs: has their manifests.
        base, finetuned: the checkpoints' digests.
        method, goal, has_text: as for `check_compressible`.

    Raises:
        Conflict, InvalidAdapter, UnsupportedModel: as `check_compressible`; with 409.
        ArchitectureMismatch, InvalidCheckpoint, UnsupportedModel: as `match_tensors`; with 409.
        UnchangedCheckpoint: the fine-tune equals the base.
    """
    before, after = (
        CheckpointManifest.from_json(blobs.read(digest, MANIFEST_BYTES))
        for digest in (base, finetuned)
    )
    with refused_by_state():
        check_compressible(before.config, after.config, method, goal, has_text=has_text)
        shapes = shapes_of(after, before)
        if not method.imports_adapter:
            check_structure(before.config, after.config)
            check_differs(before, after)
        return shapes, carried_bytes(after, before)
