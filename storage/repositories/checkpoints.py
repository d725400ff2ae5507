"""Checkpoints by their manifest's digest."""

from sqlalchemy.orm import Session

from deltadock.storage.models import CheckpointRow
from deltadock.storage.repositories.locks import take_turn


class CheckpointRepository:
    """Checkpoints are immutable: they are found or added, never changed."""

    def __init__(self, session: Session) -> None:
        self.session = session

    def find(self, digest: str) -> CheckpointRow | None:
        """The checkpoint with this digest."""
        return self.session.get(CheckpointRow, digest)

    def add(self, checkpoint: CheckpointRow) -> CheckpointRow:
        """The stored row of this digest, which is `checkpoint` itself if there was none."""
        take_turn(self.session, "checkpoint", checkpoint.digest)
        if found := self.find(checkpoint.digest):
            return found
        self.session.add(checkpoint)
        self.session.flush()
        return checkpoint
