"""Checkpoints by digest, and bases by id or name."""

from collections.abc import Sequence
from functools import partial

from sqlalchemy import Select, exists, or_, select
from sqlalchemy.orm import Session, joinedload

from deltadock.errors import Conflict
from deltadock.storage.database import lock_key
from deltadock.storage.ids import new_id
from deltadock.storage.models import BaseRow, CheckpointRow, UploadRow, UploadState
from deltadock.storage.tenancy import Tenant, owned_by, owner_of


class CheckpointRepository:
    """Checkpoints are immutable: rows are added and read, never updated.

    Equal checkpoints of several tenants are one row; a tenant sees those that it uploaded.
    """

    def __init__(self, session: Session, tenant: Tenant) -> None:
        self.session = session
        self.tenant = tenant

    def find(self, digest: str) -> CheckpointRow | None:
        """The checkpoint with this digest, if the tenant has uploaded it; else None."""
        uploaded = exists().where(
            UploadRow.checkpoint_digest == CheckpointRow.digest,
            UploadRow.state == UploadState.COMPLETE,
            owned_by(UploadRow.tenant_id, self.tenant),
        )
        return self.session.scalars(
            select(CheckpointRow).where(CheckpointRow.digest == digest, uploaded)
        ).one_or_none()

    def add(self, checkpoint: CheckpointRow) -> CheckpointRow:
        """The stored row with this digest; `checkpoint` is inserted if there was none."""
        lock_key(self.session, "checkpoint", checkpoint.digest)
        if found := self.session.get(CheckpointRow, checkpoint.digest):
            return found
        self.session.add(checkpoint)
        self.session.flush()
        return checkpoint


class BaseRepository:
    """Bases are loaded with their checkpoint; a tenant sees its own and the shared ones."""

    def __init__(self, session: Session, tenant: Tenant) -> None:
        self.session = session
        self.tenant = tenant

    def _visible(self) -> Select[BaseRow]:
        return (
            select(BaseRow)
            .options(joinedload(BaseRow.checkpoint))
            .where(or_(owned_by(BaseRow.tenant_id, self.tenant), BaseRow.shared))
        )

    def find(self, id_or_name: str) -> BaseRow | None:
        """The base with this id or else this name, the tenant's own before shared ones; or None."""
        found = self.session.scalars(
            self._visible()
            .where(or_(BaseRow.id == id_or_name, BaseRow.name == id_or_name))
            .order_by(BaseRow.created_at)
        ).all()
        return max(found, key=partial(self._precedence, id_or_name), default=None)

    def _precedence(self, id_or_name: str, base: BaseRow) -> tuple[bool, bool]:
        return base.id == id_or_name, base.tenant_id == self.tenant

    def all(self) -> Sequence[BaseRow]:
        """All bases, ordered by name."""
        return self.session.scalars(self._visible().order_by(BaseRow.name, BaseRow.id)).all()

    def add(self, name: str, checkpoint: CheckpointRow) -> tuple[BaseRow, bool]:
        """Register `checkpoint` as the base `name`; returns its row and whether it is new.

        Raises:
            Conflict: the name belongs to another checkpoint.
        """
        owner = owner_of(self.tenant)
        lock_key(self.session, "base", owner, name)
        found = self.session.scalars(
            self._visible().where(BaseRow.tenant_id == owner, BaseRow.name == name)
        ).one_or_none()
        if found is None:
            base = BaseRow(id=new_id("base"), tenant_id=owner, name=name, checkpoint=checkpoint)
            self.session.add(base)
            self.session.flush()
            return base, True
        if found.checkpoint_digest != checkpoint.digest:
            raise Conflict(
                f"The name {name!r} already belongs to checkpoint {found.checkpoint_digest}; "
                "names are never reused for other bytes. Choose another one."
            )
        return found, False
