"""Registering and finding bases."""

from sqlalchemy.orm import Session

from deltadock.api.bases.schemas import BaseIn
from deltadock.artifacts.checkpoint import ADAPTER_TYPE, CheckpointManifest
from deltadock.errors import InvalidInput, NotFound
from deltadock.storage.blobs import BlobStore
from deltadock.storage.cache import MANIFEST_BYTES
from deltadock.storage.models import BaseRow, CheckpointRow
from deltadock.storage.repositories import BaseRepository, CheckpointRepository


def get_checkpoint(session: Session, digest: str) -> CheckpointRow:
    """The checkpoint with this digest.

    Raises:
        NotFound: no upload has become it.
    """
    checkpoint = CheckpointRepository(session).find(digest)
    if checkpoint is None:
        raise NotFound(f"There is no checkpoint {digest}; upload and complete it first.")
    return checkpoint


def read_manifest(blobs: BlobStore, digest: str) -> CheckpointManifest:
    """The manifest of a stored checkpoint."""
    return CheckpointManifest.from_json(blobs.read(digest, MANIFEST_BYTES))


def get_base(session: Session, id_or_name: str) -> BaseRow:
    """The base with this id or name.

    Raises:
        NotFound: there is none.
    """
    base = BaseRepository(session).find(id_or_name)
    if base is None:
        raise NotFound(f"There is no base {id_or_name!r}; GET /v1/bases lists them.")
    return base


def register_base(session: Session, body: BaseIn) -> tuple[BaseRow, bool]:
    """Name a checkpoint a base: the base, and whether it is new.

    Raises:
        NotFound: there is no such checkpoint.
        InvalidInput: it is an adapter.
        Conflict: the name stands for another one.
    """
    checkpoint = get_checkpoint(session, body.checkpoint)
    if checkpoint.model_type == ADAPTER_TYPE:
        raise InvalidInput(
            "This is a PEFT adapter and no whole model. Upload the base that it was trained on."
        )
    return BaseRepository(session).add(body.name, checkpoint)
