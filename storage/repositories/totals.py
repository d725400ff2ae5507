"""Totals of a tenant, kept up to date in the transaction of each change: never a whole table."""

from collections.abc import Iterable
from typing import Any, Final, NamedTuple

from sqlalchemy import (
    ColumnElement,
    Select,
    and_,
    delete,
    exists,
    func,
    insert,
    literal,
    select,
    update,
)
from sqlalchemy.orm import InstrumentedAttribute, Session

from deltadock.storage.database import lock_key
from deltadock.storage.tables import (
    BaseRow,
    BlobUseRow,
    CheckpointRow,
    DeltaRow,
    TotalsRow,
    UploadFileRow,
    UploadRow,
    UploadState,
)

GONE: Final = (UploadState.ABORTED, UploadState.DROPPED)
"""States of uploads whose bytes do not count."""


class Totals(NamedTuple):
    """Ready deltas and bytes; shared artifacts and checkpoints are counted once."""

    deltas: int
    artifact_bytes: int
    checkpoint_bytes: int
    base_bytes: int


class Quota(NamedTuple):
    """What counts towards a tenant's quotas."""

    deltas: int
    """In any state."""
    bytes: int
    """Of uploaded files and artifacts, equal ones counted once."""


class TotalsRepository:
    """The totals of one tenant.

    Changes lock them until the transaction ends; a transaction locks nothing else after that, so
    that none waits for another one in a circle.
    """

    def __init__(self, session: Session, tenant_id: str) -> None:
        self.session = session
        self.tenant_id = tenant_id

    def read(self) -> Totals:
        """The current totals."""
        row = self.session.get(TotalsRow, self.tenant_id)
        if row is None:
            return Totals(0, 0, 0, 0)
        return Totals(row.deltas, row.artifact_bytes, row.checkpoint_bytes, row.base_bytes)

    def quota(self) -> Quota:
        """What counts towards the tenant's quotas now."""
        row = self.session.get(TotalsRow, self.tenant_id, populate_existing=True)
        return Quota(0, 0) if row is None else Quota(row.all_deltas, row.stored_bytes)

    def count_any_delta(self, sign: int) -> None:
        """Add (`sign` 1) or subtract (-1) a delta in any state."""
        self.lock()
        self._add(all_deltas=sign)

    def count_blobs(self, blobs: Iterable[tuple[str, int]], sign: int) -> None:
        """Add (`sign` 1) or subtract (-1) a use of each of these blobs (SHA-256, size)."""
        self.lock()
        for digest, size in blobs:
            used = self.session.get(
                BlobUseRow, (self.tenant_id, digest, size), populate_existing=True
            )
            if used is None and sign < 0:
                continue  # a release without these totals added it
            if used is None:
                used = BlobUseRow(tenant_id=self.tenant_id, digest=digest, size=size, uses=0)
                self.session.add(used)
                self._add(stored_bytes=size)
            used.uses += sign
            if not used.uses:
                self.session.delete(used)
                self._add(stored_bytes=-size)
        self.session.flush()

    def recount(self) -> None:
        """Count what `quota` answers anew, such as after an upgrade from a release without it."""
        self.lock()
        self._add()
        owner = self.tenant_id
        files = (
            select(UploadFileRow.sha256.label("digest"), UploadFileRow.size)
            .join(UploadRow, UploadRow.id == UploadFileRow.upload_id)
            .where(UploadRow.tenant_id == owner, UploadRow.state.not_in(GONE))
        )
        own_deltas = and_(DeltaRow.tenant_id == owner, DeltaRow.deleted_at.is_(None))
        artifacts = select(DeltaRow.artifact_digest, DeltaRow.artifact_bytes).where(
            own_deltas, DeltaRow.artifact_digest.is_not(None)
        )
        used = files.union_all(artifacts).subquery()
        self.session.execute(delete(BlobUseRow).where(BlobUseRow.tenant_id == owner))
        self.session.execute(
            insert(BlobUseRow).from_select(
                ["tenant_id", "digest", "size", "uses"],
                select(literal(owner), used.c.digest, used.c.size, func.count()).group_by(
                    used.c.digest, used.c.size
                ),
            )
        )
        size = func.coalesce(func.sum(BlobUseRow.size), 0)
        self.session.execute(
            update(TotalsRow)
            .where(TotalsRow.tenant_id == owner)
            .values(
                all_deltas=select(func.count()).where(own_deltas).scalar_subquery(),
                stored_bytes=select(size).where(BlobUseRow.tenant_id == owner).scalar_subquery(),
            ),
            execution_options={"synchronize_session": False},
        )

    def count_delta(self, delta: DeltaRow, sign: int) -> None:
        """Add (`sign` 1) or subtract (-1) a ready delta; bytes count if no other one has them."""
        self.lock()
        artifact = 0
        if not self._shared(delta, DeltaRow.artifact_digest):
            artifact = delta.artifact_bytes or 0
        checkpoint = 0
        if not self._shared(delta, DeltaRow.checkpoint_digest):
            checkpoint = self._checkpoint_bytes(delta.checkpoint_digest)
        self._add(deltas=sign, artifact_bytes=sign * artifact, checkpoint_bytes=sign * checkpoint)
        assert delta.artifact_digest is not None
        self.count_blobs([(delta.artifact_digest, delta.artifact_bytes or 0)], sign)

    def count_base(self, base: BaseRow, sign: int) -> None:
        """Add (`sign` 1) or subtract (-1) a base; its bytes count if no other one has them."""
        self.lock()
        is_shared = exists().where(
            BaseRow.checkpoint_digest == base.checkpoint_digest,
            BaseRow.tenant_id == self.tenant_id,
            BaseRow.id != base.id,
            BaseRow.deleted_at.is_(None),
        )
        if not self.session.scalar(select(is_shared)):
            self._add(base_bytes=sign * self._checkpoint_bytes(base.checkpoint_digest))

    def _shared(self, delta: DeltaRow, column: InstrumentedAttribute[Any]) -> bool:
        others: ColumnElement[bool] = exists().where(
            column == getattr(delta, column.key),
            DeltaRow.tenant_id == self.tenant_id,
            DeltaRow.id != delta.id,
            DeltaRow.deleted_at.is_(None),
            DeltaRow.artifact_digest.is_not(None),
        )
        return bool(self.session.scalar(select(others)))

    def _checkpoint_bytes(self, digest: str) -> int:
        found: Select[int] = select(CheckpointRow.total_bytes).where(CheckpointRow.digest == digest)
        return self.session.scalar(found) or 0

    def lock(self) -> None:
        """Lock the totals until the transaction ends: after models, bases, uploads and blobs, and
        before jobs.
        """
        lock_key(self.session, "totals", self.tenant_id)

    def _add(self, **amounts: int) -> None:
        row = self.session.get(TotalsRow, self.tenant_id)
        if row is None:
            self.session.add(TotalsRow(tenant_id=self.tenant_id, **amounts))
        elif amounts:
            changes = {name: getattr(TotalsRow, name) + value for name, value in amounts.items()}
            self.session.execute(
                update(TotalsRow).where(TotalsRow.tenant_id == self.tenant_id).values(changes),
                execution_options={"synchronize_session": "fetch"},
            )
        self.session.flush()
