"""What a fine-tune changes of its base, by their manifests.

With 100,000 tensors that takes seconds of one core and hundreds of megabytes: endpoints run it in
threads of `Resources.comparing`, a few at a time, and in no transaction.
"""

from deltadock.artifacts.checkpoint import CheckpointManifest
from deltadock.artifacts.compatibility import check_differs, check_structure
from deltadock.compression.preview import TensorShape, carried_bytes, shapes_of
from deltadock.errors import refused_by_state
from deltadock.storage.blobs import BlobStore
from deltadock.storage.cache import MANIFEST_BYTES


def compare(blobs: BlobStore, base: str, finetuned: str) -> tuple[list[TensorShape], int]:
    """The tensors, and the bytes of carried files, of the checkpoints with these digests.

    Raises:
        ArchitectureMismatch, InvalidCheckpoint, UnsupportedModel: as `match_tensors`; with 409.
        UnchangedCheckpoint: the fine-tune equals the base.
    """
    before, after = (
        CheckpointManifest.from_json(blobs.read(digest, MANIFEST_BYTES))
        for digest in (base, finetuned)
    )
    with refused_by_state():
        shapes = shapes_of(after, before)
        check_structure(before.config, after.config)
        check_differs(before, after)
        return shapes, carried_bytes(after, before)
