"""Checkpoints by digest, and bases by id or name."""

from collections.abc import Sequence

from sqlalchemy import or_, select
from sqlalchemy.orm import Session, joinedload

from deltadock.errors import Conflict
from deltadock.storage.database import lock_key
from deltadock.storage.ids import new_id
from deltadock.storage.models import BaseRow, CheckpointRow


class CheckpointRepository:
    """Checkpoints are immutable: rows are added and read, never updated."""

    def __init__(self, session: Session) -> None:
        self.session = session

    def find(self, digest: str) -> CheckpointRow | None:
        """The checkpoint with this digest, or None."""
        return self.session.get(CheckpointRow, digest)

    def add(self, checkpoint: CheckpointRow) -> CheckpointRow:
        """The stored row with this digest; `checkpoint` is inserted if there was none."""
        lock_key(self.session, "checkpoint", checkpoint.digest)
        if found := self.find(checkpoint.digest):
            return found
        self.session.add(checkpoint)
        self.session.flush()
        return checkpoint


class BaseRepository:
    """Bases are loaded with their checkpoint."""

    def __init__(self, session: Session) -> None:
        self.session = session

    def find(self, id_or_name: str) -> BaseRow | None:
        """The base with this id or else this name, or None."""
        found = self.session.scalars(
            select(BaseRow)
            .options(joinedload(BaseRow.checkpoint))
            .where(or_(BaseRow.id == id_or_name, BaseRow.name == id_or_name))
        ).all()
        return max(found, key=lambda base: base.id == id_or_name, default=None)

    def all(self) -> Sequence[BaseRow]:
        """All bases, ordered by name."""
        return self.session.scalars(
            select(BaseRow).options(joinedload(BaseRow.checkpoint)).order_by(BaseRow.name)
        ).all()

    def add(self, name: str, checkpoint: CheckpointRow) -> tuple[BaseRow, bool]:
        """Register `checkpoint` as the base `name`; returns its row and whether it is new.

        Raises:
            Conflict: the name belongs to another checkpoint.
        """
        lock_key(self.session, "base", name)
        found = self.session.scalars(
            select(BaseRow).options(joinedload(BaseRow.checkpoint)).where(BaseRow.name == name)
        ).one_or_none()
        if found is None:
            base = BaseRow(id=new_id("base"), name=name, checkpoint=checkpoint)
            self.session.add(base)
            self.session.flush()
            return base, True
        if found.checkpoint_digest != checkpoint.digest:
            raise Conflict(
                f"The name {name!r} already belongs to checkpoint {found.checkpoint_digest}; "
                "names are never reused for other bytes. Choose another one."
            )
        return found, False
