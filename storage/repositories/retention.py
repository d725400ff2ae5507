"""Projects' retention rules."""

from sqlalchemy import delete
from sqlalchemy.orm import Session

from deltadock.storage.models import AuditAction, RetentionRow
from deltadock.storage.repositories.audit import record
from deltadock.storage.tenancy import Tenant, owner_of


class RetentionRepository:
    """The rules of a tenant's projects."""

    def __init__(self, session: Session, tenant: Tenant) -> None:
        self.session = session
        self.tenant = tenant

    def find(self, project: str) -> str | None:
        """The project's rule, or None."""
        found = self.session.get(RetentionRow, (owner_of(self.tenant), project))
        return None if found is None else found.rule

    def put(self, project: str, rule: str) -> None:
        """Set the project's rule."""
        row = RetentionRow(tenant_id=owner_of(self.tenant), project=project, rule=rule)
        self.session.merge(row)
        self.session.flush()
        self._record(project, rule)

    def delete(self, project: str) -> None:
        """Remove the project's rule, if it has one."""
        self.session.execute(
            delete(RetentionRow).where(
                RetentionRow.tenant_id == owner_of(self.tenant), RetentionRow.project == project
            )
        )
        self._record(project, None)

    def _record(self, project: str, rule: str | None) -> None:
        owner = owner_of(self.tenant)
        record(self.session, owner, AuditAction.RETENTION_CHANGE, project, rule=rule)
