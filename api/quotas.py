"""A tenant's quotas, checked in the transaction that would exceed them, after its changes.

They hold under the lock of the tenant's totals, which the changes take: with a lock of their own,
two transactions could wait for each other.
"""

from typing import Final

from sqlalchemy.orm import Session

from deltadock.errors import QuotaExceeded, RateLimited
from deltadock.storage.models import TenantRow
from deltadock.storage.repositories import TenantRepository, TotalsRepository

JOB_RETRY_SECONDS: Final = 30


def remaining_bytes(session: Session, tenant_id: str) -> int | None:
    """How many more bytes the tenant may store; None: any number."""
    limit = session.get_one(TenantRow, tenant_id).max_bytes
    if limit is None:
        return None
    return max(0, limit - TenantRepository(session).stored_bytes(tenant_id))


def check_bytes(session: Session, tenant_id: str) -> None:
    """Check that what is stored, announced and to be imported is within the quota.

    Raises:
        QuotaExceeded: they are not.
    """
    limit = session.get_one(TenantRow, tenant_id).max_bytes
    if limit is None:
        return
    TotalsRepository(session, tenant_id).lock()
    if TenantRepository(session).stored_bytes(tenant_id) > limit:
        raise over_bytes()


def over_bytes() -> QuotaExceeded:
    """The error for more bytes than a tenant may store."""
    return QuotaExceeded(
        "This is more than your tenant may store. Delete deltas or uploads, or ask the "
        "operator for a larger quota."
    )


def check_delta(session: Session, tenant_id: str, *, starts_job: bool) -> None:
    """Check that the tenant may have the deltas that it has now, and run a new one's job.

    Raises:
        QuotaExceeded: it may not.
        RateLimited: as `check_job`.
    """
    limit = session.get_one(TenantRow, tenant_id).max_deltas
    if limit is not None:
        TotalsRepository(session, tenant_id).lock()
        if TenantRepository(session).delta_count(tenant_id) > limit:
            raise QuotaExceeded(
                f"Your tenant may have {limit} deltas. Delete one, or ask the operator for more."
            )
    if starts_job:
        check_job(session, tenant_id)


def check_job(session: Session, tenant_id: str, more: int = 0) -> None:
    """Check that the tenant may run the jobs that are unfinished now, and `more`.

    Raises:
        RateLimited: it may not.
    """
    limit = session.get_one(TenantRow, tenant_id).max_jobs
    if limit is None:
        return
    TotalsRepository(session, tenant_id).lock()
    if TenantRepository(session).job_count(tenant_id) + more > limit:
        raise RateLimited(
            f"Your tenant may run {limit} jobs at once. Try again when one has ended, or cancel "
            "one.",
            headers={"Retry-After": str(JOB_RETRY_SECONDS)},
        )
