"""Totals over ready deltas, on both databases."""

from pathlib import Path

from deltadock.storage.blobs.local import LocalBlobStore
from deltadock.storage.database import Database
from deltadock.storage.repositories import DeltaRepository, TotalsRepository
from deltadock.storage.tenancy import LOCAL_TENANT
from tests import seed


def test_totals_of_an_empty_database_are_zero(database: Database) -> None:
    with database.session_scope() as session:
        assert TotalsRepository(session, LOCAL_TENANT).read() == (0, 0, 0, 0)


def test_counts_ready_deltas_and_shared_bytes_once(database: Database, tmp_path: Path) -> None:
    blobs = LocalBlobStore(tmp_path)
    blobs.prepare()
    huge = 2**40
    with database.session_scope() as session:
        deltas = DeltaRepository(session, LOCAL_TENANT)
        totals = TotalsRepository(session, LOCAL_TENANT)
        base = seed.add_base(session, "base", huge)
        first = seed.add_delta(session, base, "p/first", 1.0)
        second = seed.add_delta(session, base, "p/second", 1.0)
        for delta in (first, second):
            seed.finish(session, blobs, delta, {"artifact_bytes": 3 * 2**32})
        seed.fail(session, seed.add_delta(session, base, "p/failed", 1.0))
        assert totals.read() == (2, 6 * 2**32, 2 * huge, huge)
        twin = seed.add_delta(session, base, "p/twin", 1.0)
        found = deltas.find(first.id)
        assert found is not None
        deltas.share_result(twin, found)
        assert totals.read() == (3, 6 * 2**32, 3 * huge, huge)
        deltas.delete(second)
        assert totals.read() == (2, 3 * 2**32, 2 * huge, huge)
