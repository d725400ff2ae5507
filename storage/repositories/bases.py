"""Bases by id or name."""

from collections.abc import Sequence

from sqlalchemy import or_, select
from sqlalchemy.orm import Session, joinedload

from deltadock.errors import Conflict
from deltadock.storage.ids import new_id
from deltadock.storage.models import BaseRow, CheckpointRow
from deltadock.storage.repositories.locks import take_turn


class BaseRepository:
    """Bases come with their checkpoint loaded."""

    def __init__(self, session: Session) -> None:
        self.session = session

    def find(self, id_or_name: str) -> BaseRow | None:
        """The base with this id or, failing that, this name."""
        found = self.session.scalars(
            select(BaseRow)
            .options(joinedload(BaseRow.checkpoint))
            .where(or_(BaseRow.id == id_or_name, BaseRow.name == id_or_name))
        ).all()
        return max(found, key=lambda base: base.id == id_or_name, default=None)

    def all(self) -> Sequence[BaseRow]:
        """Every base, by name."""
        return self.session.scalars(
            select(BaseRow).options(joinedload(BaseRow.checkpoint)).order_by(BaseRow.name)
        ).all()

    def add(self, name: str, checkpoint: CheckpointRow) -> tuple[BaseRow, bool]:
        """Name `checkpoint` a base: its row, and whether it is new.

        Raises:
            Conflict: the name stands for another checkpoint.
        """
        take_turn(self.session, "base", name)
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
                f"The name {name!r} already stands for checkpoint {found.checkpoint_digest}; "
                "a name is never given to other bytes. Choose another one."
            )
        return found, False
