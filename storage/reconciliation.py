"""Whether rows, blobs and the tenants' totals agree."""

from collections.abc import Collection
from typing import NamedTuple

from deltadock.storage.blobs import BlobStore, StoredEntry
from deltadock.storage.database import Database
from deltadock.storage.repositories.blobs import BlobRepository, batches
from deltadock.storage.repositories.tenants import TenantRepository
from deltadock.storage.repositories.totals import TotalsRepository


def recount(database: Database) -> None:
    """Count anew what counts towards each tenant's quotas."""
    with database.read_scope() as session:
        tenants = TenantRepository(session).ids()
    for tenant_id in tenants:
        with database.session_scope() as session:
            TotalsRepository(session, tenant_id).recount()


class Differences(NamedTuple):
    """Where rows and blobs disagree."""

    missing: list[str]
    """Digests that rows refer to, and the store lacks."""
    unreferenced: list[StoredEntry]
    """Blobs that no row has ever referred to."""


def reconcile(database: Database, blobs: BlobStore) -> Differences:
    """Compare all rows with all blobs; changes nothing."""
    stored = {entry.key: entry for entry in blobs.entries("blobs")}
    missing = missing_blobs(database, blobs, stored)
    unreferenced = []
    for entries in batches(stored.values()):
        names = [entry.key for entry in entries]
        with database.read_scope() as session:
            repository = BlobRepository(session)
            known = repository.needed(names) | repository.once_needed(names)
        unreferenced += [entry for entry in entries if entry.key not in known]
    return Differences(missing, unreferenced)


def missing_blobs(
    database: Database, blobs: BlobStore, stored: Collection[str] | None = None
) -> list[str]:
    """Digests that rows refer to, and the store lacks; `stored` is a listing of the store."""
    stored = {entry.key for entry in blobs.entries("blobs")} if stored is None else stored
    with database.read_scope() as session:
        absent = [d for d in BlobRepository(session).referenced() if d not in stored]
    # What was stored after the listing is looked up.
    return sorted(digest for digest in absent if not blobs.exists(digest))
