"""A tenant's quotas, checked in the transaction that would exceed them."""

from typing import Final

from sqlalchemy.orm import Session

from deltadock.errors import QuotaExceeded, RateLimited
from deltadock.storage.models import TenantRow
from deltadock.storage.repositories import TenantRepository

JOB_RETRY_SECONDS: Final = 30


def remaining_bytes(session: Session, tenant_id: str) -> int | None:
    """How many more bytes the tenant may store; None: any number."""
    limit = session.get_one(TenantRow, tenant_id).max_bytes
    if limit is None:
        return None
    return max(0, limit - TenantRepository(session).stored_bytes(tenant_id))


def check_bytes(session: Session, tenant_id: str, more: int = 0) -> None:
    """Check that what is stored and announced, and `more` bytes, are within the quota.

    Raises:
        QuotaExceeded: they are not.
    """
    limit = session.get_one(TenantRow, tenant_id).max_bytes
    if limit is None:
        return
    tenants = TenantRepository(session)
    tenants.lock(tenant_id)
    if tenants.stored_bytes(tenant_id) + more > limit:
        raise over_bytes()


def over_bytes() -> QuotaExceeded:
    """The error for more bytes than a tenant may store."""
    return QuotaExceeded(
        "This is more than your tenant may store. Abort uploads or delete deltas, or ask the "
        "operator for a larger quota."
    )


def check_delta(session: Session, tenant_id: str, *, starts_job: bool) -> None:
    """Check that the tenant may have one delta more, and run its job.

    Raises:
        QuotaExceeded: it has as many deltas as it may.
        RateLimited: as `check_job`.
    """
    limit = session.get_one(TenantRow, tenant_id).max_deltas
    if limit is not None:
        tenants = TenantRepository(session)
        tenants.lock(tenant_id)
        if tenants.delta_count(tenant_id) >= limit:
            raise QuotaExceeded(
                f"Your tenant may have {limit} deltas. Delete one, or ask the operator for more."
            )
    if starts_job:
        check_job(session, tenant_id)


def check_job(session: Session, tenant_id: str) -> None:
    """Check that the tenant may run one job more.

    Raises:
        RateLimited: as many of its jobs are unfinished as may be.
    """
    limit = session.get_one(TenantRow, tenant_id).max_jobs
    if limit is None:
        return
    tenants = TenantRepository(session)
    tenants.lock(tenant_id)
    if tenants.job_count(tenant_id) >= limit:
        raise RateLimited(
            f"Your tenant may run {limit} jobs at once. Try again when one has ended, or cancel "
            "one.",
            headers={"Retry-After": str(JOB_RETRY_SECONDS)},
        )
