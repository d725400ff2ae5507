"""A tenant's quotas, checked in the transaction that would exceed them, after its changes.

They hold under the lock of the tenant's totals, which the changes take: with a lock of their own,
two transactions could wait for each other.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final, NamedTuple

from sqlalchemy.orm import Session

from deltadock.errors import QuotaExceeded, RateLimited
from deltadock.storage.repositories import TenantRepository, TotalsRepository
from deltadock.storage.tables import TenantRow
from deltadock.words import counted, size

JOB_RETRY_SECONDS: Final = 300
"""What a job takes, roughly; clients of ours wait for less only, and so tell of the refusal."""


class Room(NamedTuple):
    """The bytes that a tenant may store, and those that it has."""

    limit: int
    used: int

    def check(self, more: int) -> None:
        """Check that it may store `more`.

        Raises:
            QuotaExceeded: it may not.
        """
        if self.used + more > self.limit:
            raise QuotaExceeded(
                f"Your tenant may store {size(self.limit)} and has {size(self.used)}: "
                f"there is no room for {size(more)} more. Delete deltas or uploads, or ask "
                "the operator for a larger quota."
            )


def room_of(session: Session, tenant_id: str) -> Room | None:
    """What the tenant may store, and has stored, announced and to be imported; None: no limit."""
    limit = session.get_one(TenantRow, tenant_id).max_bytes
    if limit is None:
        return None
    return Room(limit, TenantRepository(session).stored_bytes(tenant_id))


@contextmanager
def within_bytes(session: Session, tenant_id: str) -> Iterator[None]:
    """Check that the tenant may store what the block adds.

    Raises:
        QuotaExceeded: it may not.
    """
    before = room_of(session, tenant_id)
    yield
    if before is not None:
        TotalsRepository(session, tenant_id).lock()
        used = TenantRepository(session).stored_bytes(tenant_id)
        # Others may have stored something since.
        Room(before.limit, min(before.used, used)).check(max(0, used - before.used))


def check_delta(session: Session, tenant_id: str, *, starts_job: bool, more: int = 0) -> None:
    """Check that the tenant may have the deltas that it has now, and `more`, and run their jobs.

    Raises:
        QuotaExceeded: it may not.
        RateLimited: as `check_job`.
    """
    limit = session.get_one(TenantRow, tenant_id).max_deltas
    if limit is not None:
        TotalsRepository(session, tenant_id).lock()
        count = TenantRepository(session).delta_count(tenant_id)
        if count + more > limit:
            raise QuotaExceeded(
                f"Your tenant may have {counted(limit, 'delta')} and has {count + more - 1}. "
                "Delete one, or ask the operator for more."
            )
    if starts_job:
        check_job(session, tenant_id, more)


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
            f"Your tenant may run {counted(limit, 'job')} at once. Try again when one has ended, "
            "or cancel one.",
            headers={"Retry-After": str(JOB_RETRY_SECONDS)},
        )
