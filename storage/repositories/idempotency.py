"""First answers to requests with an Idempotency-Key."""

from datetime import timedelta
from typing import Any, Final

from sqlalchemy import delete
from sqlalchemy.orm import Session

from deltadock.storage.database import database_now, lock_key
from deltadock.storage.tables import IdempotencyRow
from deltadock.storage.tenancy import Tenant, owner_of

KEPT: Final = timedelta(hours=24)


class IdempotencyRepository:
    """A tenant's keys; other tenants may use the same ones."""

    def __init__(self, session: Session, tenant: Tenant) -> None:
        self.session = session
        self.tenant = tenant

    def find(self, key: str) -> IdempotencyRow | None:
        """The first answer under this key, or None; locks the key until the transaction ends."""
        owner = owner_of(self.tenant)
        lock_key(self.session, "idempotency", owner, key)
        found = self.session.get(IdempotencyRow, (owner, key), populate_existing=True)
        if found is not None and found.created_at <= database_now(self.session) - KEPT:
            self.session.delete(found)
            self.session.flush()
            return None
        return found

    def add(
        self,
        key: str,
        *,
        fingerprint: str,
        status: int | None,
        location: str | None,
        body: dict[str, Any],
    ) -> None:
        """Store the first answer under a key that `find` has locked."""
        self.session.add(
            IdempotencyRow(
                tenant_id=owner_of(self.tenant),
                key=key,
                fingerprint=fingerprint,
                status=status,
                location=location,
                body=body,
                created_at=database_now(self.session),
            )
        )
        self.session.flush()

    def drop_old(self) -> None:
        """Delete the answers of all tenants that are no longer kept."""
        before = database_now(self.session) - KEPT
        self.session.execute(delete(IdempotencyRow).where(IdempotencyRow.created_at <= before))
