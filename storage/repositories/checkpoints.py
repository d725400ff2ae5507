"""Checkpoints by digest, and bases by id or name."""

from collections.abc import Collection, Sequence
from functools import partial

from sqlalchemy import ColumnElement, and_, exists, func, or_, select, tuple_, union
from sqlalchemy.orm import Session, joinedload

from deltadock.errors import Conflict, NotFound
from deltadock.storage.database import database_now, lock_key, unindexed
from deltadock.storage.ids import new_id
from deltadock.storage.repositories.audit import record
from deltadock.storage.repositories.totals import TotalsRepository
from deltadock.storage.tables import (
    AuditAction,
    BaseRow,
    CheckpointRow,
    DeltaRow,
    UploadRow,
    UploadState,
)
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

    def chat_templates(self, digests: Collection[str]) -> dict[str, bool | None]:
        """Whether checkpoints of deltas and bases that the tenant sees have a chat template."""
        found = select(CheckpointRow.digest, CheckpointRow.has_chat_template).where(
            CheckpointRow.digest.in_(digests)
        )
        return dict(self.session.execute(found).all())

    def add(self, checkpoint: CheckpointRow) -> CheckpointRow:
        """The stored row with this digest; `checkpoint` is inserted if there was none."""
        lock_key(self.session, "checkpoint", checkpoint.digest)
        if found := self.session.get(CheckpointRow, checkpoint.digest):
            return found
        self.session.add(checkpoint)
        self.session.flush()
        return checkpoint


def is_of_type(model_types: Collection[str]) -> ColumnElement[bool]:
    """Whether a base's model is of one of these types."""
    return BaseRow.checkpoint.has(CheckpointRow.model_type.in_(model_types))


class BaseRepository:
    """Bases are loaded with their checkpoint; a tenant sees its own and the shared ones.

    Deleted ones are excluded.
    """

    def __init__(self, session: Session, tenant: Tenant) -> None:
        self.session = session
        self.tenant = tenant

    def _visible(self) -> ColumnElement[bool]:
        # Hidden from the planner, which would walk all the tenant's bases.
        seen = or_(owned_by(unindexed(BaseRow.tenant_id), self.tenant), BaseRow.shared)
        return and_(BaseRow.deleted_at.is_(None), seen)

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

    def page(
        self,
        *,
        limit: int,
        after: Sequence[str] | None = None,
        model_types: Collection[str] | None = None,
    ) -> Sequence[BaseRow]:
        """Up to `limit` bases by name and id, that follow the place `after`."""
        place = tuple_(BaseRow.name, BaseRow.id)
        each = (
            select(BaseRow.id, BaseRow.name)
            .where(
                visible,
                BaseRow.deleted_at.is_(None),
                *([] if after is None else [place > tuple(after)]),
                *([] if model_types is None else [is_of_type(model_types)]),
            )
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

        A deleted base of that name and checkpoint is restored.

        Raises:
            Conflict: the name belongs to another checkpoint.
        """
        owner = owner_of(self.tenant)
        lock_key(self.session, "base", owner, name)
        found = self.named(name, {checkpoint.digest})
        if found is None:
            base = BaseRow(id=new_id("base"), tenant_id=owner, name=name, checkpoint=checkpoint)
            self.session.add(base)
            self.session.flush()
            TotalsRepository(self.session, owner).count_base(base, 1)
            record(
                self.session, owner, AuditAction.BASE_CREATE, base.id,
                name=name, checkpoint=checkpoint.digest,
            )  # fmt: skip
            return base, True
        if found.deleted_at is not None:
            self._restore(found)
        return found, False

    def named(self, name: str, checkpoints: Collection[str]) -> BaseRow | None:
        """The tenant's own base of this name, also a deleted one; None if there is none.

        Raises:
            Conflict: it is of none of these checkpoints.
        """
        found = self.session.scalars(
            select(BaseRow)
            .options(joinedload(BaseRow.checkpoint))
            .where(BaseRow.tenant_id == owner_of(self.tenant), BaseRow.name == name)
        ).one_or_none()
        if found is not None and found.checkpoint_digest not in checkpoints:
            raise Conflict(
                f"The name {name!r} belongs to another checkpoint, {found.checkpoint_digest}; "
                "names are never reused for other bytes. Choose another one."
            )
        return found

    def hold(self, base: BaseRow) -> None:
        """Keep the base from being deleted until the transaction ends.

        Raises:
            NotFound: it was deleted.
        """
        lock_key(self.session, "base in use", base.id)
        self.session.refresh(base, ["deleted_at"])
        if base.deleted_at is not None:
            raise NotFound(
                f"The base {base.name!r} was deleted; bring it back first: "
                f"POST /v1/bases/{base.name}/restore."
            )

    def delete(self, base: BaseRow) -> None:
        """Mark the base as deleted; its row keeps the name.

        Raises:
            NotFound: it was deleted meanwhile.
            Conflict: deltas are compressed against it.
        """
        self.hold(base)
        needed_by = self.session.scalar(
            select(func.count()).where(DeltaRow.base_id == base.id, DeltaRow.deleted_at.is_(None))
        )
        if needed_by:
            raise Conflict(
                f"{needed_by} {'delta needs' if needed_by == 1 else 'deltas need'} the base "
                f"{base.name!r}. Delete them first: GET /v1/deltas?base={base.name} lists your "
                "tenant's."
            )
        base.deleted_at = database_now(self.session)
        self.session.flush()
        TotalsRepository(self.session, base.tenant_id).count_base(base, -1)
        record(self.session, base.tenant_id, AuditAction.BASE_DELETE, base.id, name=base.name)

    def find_deleted(self, id_or_name: str) -> BaseRow | None:
        """The tenant's deleted base with this id or name, or None."""
        return self.session.scalars(
            select(BaseRow)
            .options(joinedload(BaseRow.checkpoint))
            .where(
                or_(BaseRow.id == id_or_name, BaseRow.name == id_or_name),
                owned_by(BaseRow.tenant_id, self.tenant),
                BaseRow.deleted_at.is_not(None),
            )
            .order_by(BaseRow.id != id_or_name)
            .limit(1)
        ).one_or_none()

    def restore(self, base: BaseRow) -> None:
        """Undo the deletion of a base whose checkpoint is still there."""
        lock_key(self.session, "base in use", base.id)
        self.session.refresh(base, ["deleted_at"])
        if base.deleted_at is not None:
            self._restore(base)

    def _restore(self, base: BaseRow) -> None:
        base.deleted_at = None
        self.session.flush()
        TotalsRepository(self.session, base.tenant_id).count_base(base, 1)
        record(self.session, base.tenant_id, AuditAction.BASE_RESTORE, base.id, name=base.name)

    def share(self, base: BaseRow, shared: bool) -> None:
        """Let every tenant read the base and compress against it, or end that."""
        if base.shared != shared:
            base.shared = shared
            record(self.session, base.tenant_id, AuditAction.BASE_CHANGE, base.id, shared=shared)
