"""Checkpoints by digest, and bases by id or name."""

from collections.abc import Collection, Sequence
from functools import partial

from sqlalchemy import ColumnElement, exists, or_, select, tuple_, union
from sqlalchemy.orm import Session, joinedload

from deltadock.errors import Conflict
from deltadock.storage.database import lock_key
from deltadock.storage.ids import new_id
from deltadock.storage.models import (
    AuditAction,
    BaseRow,
    CheckpointRow,
    UploadRow,
    UploadState,
)
from deltadock.storage.repositories.audit import record
from deltadock.storage.repositories.models import unindexed
from deltadock.storage.repositories.totals import TotalsRepository
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

    def _visible(self) -> ColumnElement[bool]:
        # Hidden from the planner, which would walk all the tenant's bases.
        return or_(owned_by(unindexed(BaseRow.tenant_id), self.tenant), BaseRow.shared)

    def find(self, id_or_name: str) -> BaseRow | None:
        """The base with this id or else this name, the tenant's own before shared ones; or None."""
        # One index each.
        ids = union(
            select(BaseRow.id).where(BaseRow.id == id_or_name),
            select(BaseRow.id).where(
                owned_by(BaseRow.tenant_id, self.tenant), BaseRow.name == id_or_name
            ),
            select(BaseRow.id).where(BaseRow.shared, BaseRow.name == id_or_name),
        )
        found = self.session.scalars(
            select(BaseRow)
            .options(joinedload(BaseRow.checkpoint))
            .where(BaseRow.id.in_(ids), self._visible())
            .order_by(BaseRow.created_at)
        ).all()
        return max(found, key=partial(self._precedence, id_or_name), default=None)

    def _precedence(self, id_or_name: str, base: BaseRow) -> tuple[bool, bool]:
        return base.id == id_or_name, base.tenant_id == self.tenant

    def page(self, *, limit: int, after: Sequence[str] | None = None) -> Sequence[BaseRow]:
        """Up to `limit` bases by name and id, that follow the place `after`."""
        place = tuple_(BaseRow.name, BaseRow.id)
        each = (
            select(BaseRow.id, BaseRow.name)
            .where(visible, *([] if after is None else [place > tuple(after)]))
            .order_by(BaseRow.name, BaseRow.id)
            .limit(limit)
            .subquery()
            for visible in (owned_by(BaseRow.tenant_id, self.tenant), BaseRow.shared)
        )
        ids = union(*(select(walk.c.id) for walk in each))
        return self.session.scalars(
            select(BaseRow)
            .options(joinedload(BaseRow.checkpoint))
            .where(BaseRow.id.in_(ids))
            .order_by(BaseRow.name, BaseRow.id)
            .limit(limit)
        ).all()

    def with_checkpoints(self, digests: Collection[str]) -> Sequence[BaseRow]:
        """The visible bases with these checkpoints, without the checkpoint's row."""
        return self.session.scalars(
            select(BaseRow).where(BaseRow.checkpoint_digest.in_(digests), self._visible())
        ).all()

    def add(self, name: str, checkpoint: CheckpointRow) -> tuple[BaseRow, bool]:
        """Register `checkpoint` as the base `name`; returns its row and whether it is new.

        Raises:
            Conflict: the name belongs to another checkpoint.
        """
        owner = owner_of(self.tenant)
        lock_key(self.session, "base", owner, name)
        found = self.session.scalars(
            select(BaseRow)
            .options(joinedload(BaseRow.checkpoint))
            .where(BaseRow.tenant_id == owner, BaseRow.name == name)
        ).one_or_none()
        if found is None:
            base = BaseRow(id=new_id("base"), tenant_id=owner, name=name, checkpoint=checkpoint)
            self.session.add(base)
            self.session.flush()
            TotalsRepository(self.session, owner).count_base(base)
            record(
                self.session, owner, AuditAction.BASE_CREATE, base.id,
                name=name, checkpoint=checkpoint.digest,
            )  # fmt: skip
            return base, True
        if found.checkpoint_digest != checkpoint.digest:
            raise Conflict(
                f"The name {name!r} already belongs to checkpoint {found.checkpoint_digest}; "
                "names are never reused for other bytes. Choose another one."
            )
        return found, False

    def share(self, base: BaseRow, shared: bool) -> None:
        """Let every tenant read the base and compress against it, or end that."""
        if base.shared != shared:
            base.shared = shared
            record(self.session, base.tenant_id, AuditAction.BASE_CHANGE, base.id, shared=shared)
