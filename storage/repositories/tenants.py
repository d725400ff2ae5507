"""Tenants with their usage, and API keys."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from datetime import datetime, timedelta
from typing import Any, NamedTuple

from sqlalchemy import Select, func, or_, select, tuple_, update
from sqlalchemy.orm import Session, joinedload

from deltadock.errors import Conflict, InvalidInput
from deltadock.storage.api_keys import hmac_of, new_key, prefix_of
from deltadock.storage.database import database_now, lock_key, unindexed
from deltadock.storage.ids import new_id
from deltadock.storage.repositories.audit import record
from deltadock.storage.repositories.totals import TotalsRepository
from deltadock.storage.repositories.uploads import UploadRepository
from deltadock.storage.tables import (
    RUNNING_ORDER,
    ApiKeyRow,
    AuditAction,
    JobRow,
    Scope,
    TenantRow,
)
from deltadock.storage.tenancy import Tenant, owned_by, owner_of


class Usage(NamedTuple):
    """What a tenant uses of its quotas."""

    bytes: int
    """Of its uploaded files and artifacts, equal ones counted once, and of each file that is
    announced or to be imported."""
    deltas: int
    jobs: int
    """Unfinished ones."""


class TenantRepository:
    """All tenants."""

    def __init__(self, session: Session) -> None:
        self.session = session

    def find(self, id_or_name: str) -> TenantRow | None:
        """The tenant with this id or else this name, or None."""
        found = self.session.scalars(
            select(TenantRow).where(or_(TenantRow.id == id_or_name, TenantRow.name == id_or_name))
        ).all()
        return max(found, key=lambda tenant: tenant.id == id_or_name, default=None)

    def ids(self) -> Sequence[str]:
        """The ids of all tenants."""
        return self.session.scalars(select(TenantRow.id)).all()

    def page(self, *, limit: int, after: str | None = None) -> Sequence[TenantRow]:
        """Up to `limit` tenants by name, which follow the name `after`."""
        query = select(TenantRow)
        if after is not None:
            query = query.where(TenantRow.name > after)
        return self.session.scalars(query.order_by(TenantRow.name).limit(limit)).all()

    def add(self, name: str) -> TenantRow:
        """Insert a tenant without limits.

        Raises:
            Conflict: the name is taken.
        """
        lock_key(self.session, "tenant", name)
        if self.session.scalar(select(TenantRow.id).where(TenantRow.name == name)):
            raise Conflict(f"There is a tenant {name!r} already. Choose another name.")
        tenant = TenantRow(id=new_id("ten"), name=name)
        self.session.add(tenant)
        self.session.flush()
        record(self.session, tenant.id, AuditAction.TENANT_CREATE, tenant.id, name=name)
        return tenant

    def set_limits(self, tenant: TenantRow, limits: Mapping[str, int | None]) -> None:
        """Set these limits, by the names of their columns; the others stay."""
        for name, value in limits.items():
            setattr(tenant, name, value)
        record(self.session, tenant.id, AuditAction.TENANT_CHANGE, tenant.id, limits=dict(limits))

    def usage(self, tenant_id: str) -> Usage:
        """What the tenant uses now."""
        return Usage(
            self.stored_bytes(tenant_id), self.delta_count(tenant_id), self.job_count(tenant_id)
        )

    def stored_bytes(self, tenant_id: str) -> int:
        """Bytes of the tenant's uploaded files and artifacts, equal ones counted once, and of each
        file that is announced or to be imported.
        """
        stored = TotalsRepository(self.session, tenant_id).quota().bytes
        uploads = UploadRepository(self.session, tenant_id)
        return stored + uploads.bytes_to_arrive() + uploads.bytes_to_import()

    def delta_count(self, tenant_id: str) -> int:
        """How many deltas the tenant has."""
        return TotalsRepository(self.session, tenant_id).quota().deltas

    def job_count(self, tenant_id: str) -> int:
        """How many of the tenant's jobs are unfinished; reads only an index of these."""
        query = select(func.count()).where(
            JobRow.tenant_id == tenant_id, JobRow.state.in_(RUNNING_ORDER)
        )
        return self.session.scalar(query) or 0


class KeyRepository:
    """The tenant's API keys, loaded with their tenant."""

    def __init__(self, session: Session, tenant: Tenant) -> None:
        self.session = session
        self.tenant = tenant

    def issue(
        self,
        secret: str,
        *,
        name: str,
        scopes: Iterable[Scope],
        expires_at: datetime | None = None,
    ) -> tuple[ApiKeyRow, str]:
        """Make a key; returns its row and the key itself, which is not stored.

        Raises:
            InvalidInput: it would have expired.
        """
        if expires_at is not None and expires_at <= database_now(self.session):
            raise InvalidInput("The key would have expired already: let it expire later, or never.")
        row, key = self._make(secret, name=name, scopes=scopes, expires_at=expires_at)
        self._record(AuditAction.KEY_CREATE, row, name=name, scopes=row.scopes)
        return row, key

    def _make(
        self, secret: str, *, name: str, scopes: Iterable[Scope], expires_at: datetime | None
    ) -> tuple[ApiKeyRow, str]:
        key = new_key()
        row = ApiKeyRow(
            id=new_id("key"),
            tenant=self.session.get_one(TenantRow, owner_of(self.tenant)),
            name=name,
            prefix=prefix_of(key),
            hmac=hmac_of(key, secret),
            scopes=sorted(set(scopes), key=list(Scope).index),
            created_at=database_now(self.session),
            expires_at=expires_at,
        )
        self.session.add(row)
        self.session.flush()
        return row, key

    def _record(self, action: AuditAction, key: ApiKeyRow, **details: Any) -> None:
        record(self.session, key.tenant_id, action, key.id, prefix=key.prefix, **details)

    def rotate(self, secret: str, old: ApiKeyRow, grace: timedelta) -> tuple[ApiKeyRow, str]:
        """Make a key like `old`, which expires after `grace`; one that expires lives as long again.

        Raises:
            Conflict: the old key was revoked or has expired.
        """
        if not self.is_active(old):
            raise Conflict(f"The key {old.prefix} is no longer valid. Make a new one.")
        now = database_now(self.session)
        expires_at = None if old.expires_at is None else now + (old.expires_at - old.created_at)
        row, key = KeyRepository(self.session, old.tenant_id)._make(
            secret, name=old.name, scopes=map(Scope, old.scopes), expires_at=expires_at
        )
        old.expires_at = min(old.expires_at or now + grace, now + grace)
        self.session.flush()
        self._record(AuditAction.KEY_ROTATE, old, made=row.id)
        return row, key

    def all(self) -> Sequence[ApiKeyRow]:
        """All keys, revoked and expired ones too, newest first."""
        return self.session.scalars(self._newest_first()).all()

    def page(self, *, limit: int, after: tuple[datetime, str] | None = None) -> Sequence[ApiKeyRow]:
        """Up to `limit` keys, newest first, which follow the time and id `after`."""
        query = self._newest_first()
        if after is not None:
            query = query.where(tuple_(ApiKeyRow.created_at, ApiKeyRow.id) < after)
        return self.session.scalars(query.limit(limit)).all()

    def find(self, key_id: str) -> ApiKeyRow | None:
        """The key with this id, or None."""
        return self.session.scalars(self._owned().where(ApiKeyRow.id == key_id)).one_or_none()

    def find_prefix(self, prefix: str) -> ApiKeyRow | None:
        """The key with this prefix, or None."""
        return self.session.scalars(self._owned().where(ApiKeyRow.prefix == prefix)).one_or_none()

    def names(self, key_ids: Collection[str]) -> dict[str, str]:
        """The names of those of these keys that the tenant has."""
        query = select(ApiKeyRow.id, ApiKeyRow.name).where(
            ApiKeyRow.id.in_(key_ids), owned_by(unindexed(ApiKeyRow.tenant_id), self.tenant)
        )
        return {key.id: key.name for key in self.session.execute(query)}

    def _owned(self) -> Select[ApiKeyRow]:
        return (
            select(ApiKeyRow)
            .options(joinedload(ApiKeyRow.tenant))
            .where(owned_by(ApiKeyRow.tenant_id, self.tenant))
        )

    def _newest_first(self) -> Select[ApiKeyRow]:
        return self._owned().order_by(ApiKeyRow.created_at.desc(), ApiKeyRow.id.desc())

    def is_active(self, key: ApiKeyRow) -> bool:
        """Whether the key is neither revoked nor expired."""
        expired = key.expires_at is not None and key.expires_at <= database_now(self.session)
        return key.revoked_at is None and not expired

    def revoke(self, key: ApiKeyRow) -> None:
        """Revoke the key, unless it is revoked already."""
        if key.revoked_at is None:
            key.revoked_at = database_now(self.session)
            self.session.flush()
            self._record(AuditAction.KEY_REVOKE, key)

    def mark_used(self, key_ids: Iterable[str]) -> None:
        """Record that these keys were used just now."""
        self.session.execute(
            update(ApiKeyRow)
            .where(ApiKeyRow.id.in_(list(key_ids)), owned_by(ApiKeyRow.tenant_id, self.tenant))
            .values(last_used_at=database_now(self.session)),
            execution_options={"synchronize_session": False},
        )
