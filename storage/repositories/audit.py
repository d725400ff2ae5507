"""The audit log: every change with who made it, written in the change's transaction."""

from collections.abc import Iterable, Iterator, Sequence
from datetime import UTC, datetime
from typing import Any, Final

from sqlalchemy import Select, func, insert, select
from sqlalchemy.orm import Session

from deltadock.storage.actor import current_actor
from deltadock.storage.tables import AuditAction, AuditRow
from deltadock.storage.tenancy import Tenant, owned_by

DONE: Final = "done"


def record(
    session: Session,
    tenant_id: str,
    action: AuditAction,
    object_id: str,
    *,
    outcome: str = DONE,
    **details: Any,
) -> None:
    """Record a change by the current actor; it is stored when the session's transaction is.

    Args:
        session: that of the change.
        tenant_id: the tenant that the object belongs to.
        action: what was done.
        object_id: the object's id, or its name if it has none.
        outcome: `done`, or the code of the error.
        details: what else an auditor needs, as JSON; never a secret.
    """
    record_each(session, tenant_id, action, [object_id], outcome=outcome, **details)


def record_each(
    session: Session,
    tenant_id: str,
    action: AuditAction,
    object_ids: Iterable[str],
    *,
    outcome: str = DONE,
    **details: Any,
) -> None:
    """As `record`, the same change of each of these objects."""
    actor = current_actor()
    on_postgres = session.get_bind().dialect.name == "postgresql"
    one = {
        "tenant_id": tenant_id,
        "origin": actor.origin,
        "by_tenant_id": actor.tenant_id,
        "by_key_id": actor.key_id,
        "request_id": actor.request_id,
        "action": action,
        "outcome": outcome,
        "details": details or None,
    }
    if rows := [{**one, "object_id": object_id} for object_id in object_ids]:
        # The database's clock, without a statement of its own.
        now = func.clock_timestamp() if on_postgres else datetime.now(UTC)
        session.execute(insert(AuditRow).values(at=now), rows)


class AuditRepository:
    """The records of one tenant's objects, or of all."""

    def __init__(self, session: Session, tenant: Tenant) -> None:
        self.session = session
        self.tenant = tenant

    def page(
        self,
        *,
        limit: int,
        before: int | None = None,
        action: AuditAction | None = None,
        object_id: str | None = None,
        key_id: str | None = None,
    ) -> Sequence[AuditRow]:
        """Up to `limit` records, newest first, before the record `before`."""
        query = self._owned()
        if before is not None:
            query = query.where(AuditRow.id < before)
        if action is not None:
            query = query.where(AuditRow.action == action)
        if object_id is not None:
            query = query.where(AuditRow.object_id == object_id)
        if key_id is not None:
            query = query.where(AuditRow.by_key_id == key_id)
        return self.session.scalars(query.order_by(AuditRow.id.desc()).limit(limit)).all()

    def export(self, after: int = 0) -> Iterator[AuditRow]:
        """All records that follow the record `after`, oldest first, read in batches."""
        query = self._owned().where(AuditRow.id > after).order_by(AuditRow.id)
        return iter(self.session.scalars(query.execution_options(yield_per=1000)))

    def _owned(self) -> Select[AuditRow]:
        return select(AuditRow).where(owned_by(AuditRow.tenant_id, self.tenant))
