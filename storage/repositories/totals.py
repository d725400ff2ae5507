"""Totals of a tenant, kept up to date in the transaction of each change: never a whole table."""

from typing import Any, NamedTuple

from sqlalchemy import ColumnElement, Select, exists, select, update
from sqlalchemy.orm import InstrumentedAttribute, Session

from deltadock.storage.database import lock_key
from deltadock.storage.models import BaseRow, CheckpointRow, DeltaRow, TotalsRow


class Totals(NamedTuple):
    """Ready deltas and bytes; shared artifacts and checkpoints are counted once."""

    deltas: int
    artifact_bytes: int
    checkpoint_bytes: int
    base_bytes: int


class TotalsRepository:
    """The totals of one tenant."""

    def __init__(self, session: Session, tenant_id: str) -> None:
        self.session = session
        self.tenant_id = tenant_id

    def read(self) -> Totals:
        """The current totals."""
        row = self.session.get(TotalsRow, self.tenant_id)
        if row is None:
            return Totals(0, 0, 0, 0)
        return Totals(row.deltas, row.artifact_bytes, row.checkpoint_bytes, row.base_bytes)

    def count_delta(self, delta: DeltaRow, sign: int) -> None:
        """Add (`sign` 1) or subtract (-1) a ready delta; bytes count if no other one has them."""
        self._lock()
        artifact = 0
        if not self._shared(delta, DeltaRow.artifact_digest):
            artifact = delta.artifact_bytes or 0
        checkpoint = 0
        if not self._shared(delta, DeltaRow.checkpoint_digest):
            checkpoint = self._checkpoint_bytes(delta.checkpoint_digest)
        self._add(deltas=sign, artifact_bytes=sign * artifact, checkpoint_bytes=sign * checkpoint)

    def count_base(self, base: BaseRow) -> None:
        """Add a new base."""
        self._lock()
        is_shared = exists().where(
            BaseRow.checkpoint_digest == base.checkpoint_digest,
            BaseRow.tenant_id == self.tenant_id,
            BaseRow.id != base.id,
        )
        if not self.session.scalar(select(is_shared)):
            self._add(base_bytes=self._checkpoint_bytes(base.checkpoint_digest))

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

    def _lock(self) -> None:
        lock_key(self.session, "totals", self.tenant_id)

    def _add(self, **amounts: int) -> None:
        row = self.session.get(TotalsRow, self.tenant_id)
        if row is None:
            self.session.add(TotalsRow(tenant_id=self.tenant_id, **amounts))
        else:
            changes = {name: getattr(TotalsRow, name) + value for name, value in amounts.items()}
            self.session.execute(
                update(TotalsRow).where(TotalsRow.tenant_id == self.tenant_id).values(changes),
                execution_options={"synchronize_session": "fetch"},
            )
        self.session.flush()
