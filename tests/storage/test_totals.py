"""Totals over ready deltas, on both databases."""

from pathlib import Path

from sqlalchemy import delete

from deltadock.storage.blobs.local import LocalBlobStore
from deltadock.storage.database import Database
from deltadock.storage.repositories import (
    DeltaRepository,
    TenantRepository,
    TotalsRepository,
    UploadRepository,
)
from deltadock.storage.tables import BlobUseRow, UploadFileRow, UploadKind
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


def test_quotas_count_equal_files_and_artifacts_of_a_tenant_once(
    database: Database, tmp_path: Path
) -> None:
    blobs = LocalBlobStore(tmp_path)
    blobs.prepare()

    def file(path: str, text: str, size: int) -> UploadFileRow:
        return UploadFileRow(path=path, sha256=seed.digest_of(text), size=size, tensors=[])

    with database.session_scope() as session:
        deltas = DeltaRepository(session, LOCAL_TENANT)
        uploads = UploadRepository(session, LOCAL_TENANT)
        totals = TotalsRepository(session, LOCAL_TENANT)
        first = uploads.add(UploadKind.CHECKPOINT, [file("a", "one", 10), file("b", "two", 5)])
        second = uploads.add(UploadKind.CHECKPOINT, [file("a", "one", 10)])
        assert totals.quota() == (0, 15)
        uploads.put_file(second, file("a", "three", 100))
        uploads.put_file(second, file("a", "three", 100))
        assert totals.quota() == (0, 115), "the file was replaced, and then sent again"
        uploads.abort(first)
        uploads.abort(first)
        assert totals.quota() == (0, 100)
        base = seed.add_base(session, "base", 2**30)
        delta, waiting = (seed.add_delta(session, base, name, 1.0) for name in ("p/a", "p/b"))
        seed.finish(session, blobs, delta, {"artifact_bytes": 7})
        twin = seed.add_delta(session, base, "p/twin", 1.0)
        deltas.share_result(twin, delta)
        assert totals.quota() == (3, 107)
        for gone in (waiting, twin):
            deltas.delete(gone)
        assert totals.quota() == (1, 107)
        deltas.delete(delta)
        assert totals.quota() == (0, 100)
        deltas.restore(delta.id)
        assert totals.quota() == (1, 107)
        totals.recount()
        assert totals.quota() == (1, 107)
        session.execute(delete(BlobUseRow))
        uploads.abort(second)
        assert totals.quota() == (1, 107), "what was added without being counted is not subtracted"
        totals.recount()
        assert totals.quota() == (1, 7)


def test_quotas_count_each_announced_file_until_it_is_stored(database: Database) -> None:
    def file(path: str, text: str, *, stored: bool) -> UploadFileRow:
        digest = seed.digest_of(text)
        return UploadFileRow(path=path, sha256=digest, size=100, stored=stored, tensors=[])

    with database.session_scope() as session:
        uploads = UploadRepository(session, LOCAL_TENANT)
        tenants = TenantRepository(session)
        waiting = [file(path, "one", stored=False) for path in "abc"]
        first = uploads.add(UploadKind.CHECKPOINT, waiting)
        second = uploads.add(UploadKind.CHECKPOINT, [file("a", "one", stored=False)])
        assert tenants.stored_bytes(LOCAL_TENANT) == 400, "each may have its own place in the store"
        uploads.put_file(first, file("a", "one", stored=True))
        assert tenants.stored_bytes(LOCAL_TENANT) == 400
        uploads.put_file(first, file("b", "one", stored=True))
        assert tenants.stored_bytes(LOCAL_TENANT) == 300, "two are one blob"
        uploads.put_file(first, file("c", "two", stored=True))
        assert tenants.stored_bytes(LOCAL_TENANT) == 300
        uploads.abort(second)
        assert tenants.stored_bytes(LOCAL_TENANT) == 200
        uploads.abort(first)
        assert tenants.stored_bytes(LOCAL_TENANT) == 0
