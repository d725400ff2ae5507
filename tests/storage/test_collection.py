"""Collection beside pushes, deletions and restorations: no row ever loses its blob."""

import os
from collections.abc import Iterator
from datetime import timedelta
from itertools import permutations
from pathlib import Path
from typing import Final

import pytest
from sqlalchemy import delete, event, select, update
from sqlalchemy.orm import Session

from deltadock.errors import Unavailable
from deltadock.settings import Settings
from deltadock.storage import collection
from deltadock.storage.blobs import StoredEntry
from deltadock.storage.blobs.local import LocalBlobStore
from deltadock.storage.collection import Collector
from deltadock.storage.database import Database, database_now
from deltadock.storage.documents import DeltaOptions
from deltadock.storage.repositories import (
    BaseRepository,
    CheckpointRepository,
    DeltaRepository,
    JobRepository,
    UploadRepository,
)
from deltadock.storage.repositories.audit import AuditRepository
from deltadock.storage.repositories.blobs import BlobRepository
from deltadock.storage.tables import (
    CheckpointRow,
    DeltaRow,
    JobState,
    NodeSampleRow,
    TableRow,
    TenantRow,
    UploadFileRow,
    UploadKind,
)
from deltadock.storage.tenancy import EVERY_TENANT, LOCAL_TENANT
from deltadock.workers.lease import Lease

ORDERS = sorted(o for o in set(permutations("PPDDCC")) if o.index("D") < o.index("C"))
"""Orders of the steps of a push, a deletion that is undone, and a collection that finds it."""

OPTIONS: Final[DeltaOptions] = {"seed": 0, "solver": "exact", "goal": None, "calibration": None}


@pytest.fixture
def old_blobs(monkeypatch: pytest.MonkeyPatch) -> None:
    """No blob is too young to be collected."""
    monkeypatch.setattr(collection, "YOUNG", timedelta(seconds=-60))


class Scene:
    """A ready delta, and another job that has made an artifact of the same bytes.

    P: a worker stores the artifact; its row is written.
    D: the first delta is deleted; it is restored, if it still can be.
    C: deleted deltas are given up and unneeded blobs listed; they are removed.
    """

    def __init__(
        self, database: Database, blobs: LocalBlobStore, collector: Collector, content: bytes
    ) -> None:
        self.database, self.blobs, self.collector = database, blobs, collector
        self.content = content
        self.first, job = self._new_delta("first")
        self.second, self.job = self._new_delta("second")
        digest = blobs.put_bytes(content)
        Lease(database, job, "worker", 1e6).complete(blobs, digest, len(content), {})
        self.digest = digest
        self.found: list[tuple[str, StoredEntry]] = []
        self.steps: dict[str, Iterator[None]] = {
            "P": self.push(),
            "D": self.delete_and_restore(),
            "C": self.collect(),
        }

    def _new_delta(self, name: str) -> tuple[str, str]:
        with self.database.session_scope() as session:
            base = BaseRepository(session, LOCAL_TENANT).find("base")
            assert base is not None
            delta = DeltaRepository(session, LOCAL_TENANT).add(
                name=f"{self.content.decode()}/{name}", base=base, checkpoint_digest="c",
                method="exact", bits=None, options=OPTIONS, fingerprint="f",
            )  # fmt: skip
            ids = delta.id, delta.job.id
            assert JobRepository(session, LOCAL_TENANT).acquire(ids[1], "worker", 1e6)
            return ids

    def push(self) -> Iterator[None]:
        self.blobs.put_bytes(self.content)
        yield
        lease = Lease(self.database, self.job, "worker", 1e6)
        try:
            lease.complete(self.blobs, self.digest, len(self.content), {})
        except Unavailable:  # collected in between: another attempt stores it again
            self.blobs.put_bytes(self.content)
            lease.complete(self.blobs, self.digest, len(self.content), {})
        yield

    def delete_and_restore(self) -> Iterator[None]:
        with self.database.session_scope() as session:
            deltas = DeltaRepository(session, LOCAL_TENANT)
            found = deltas.find(self.first)
            assert found is not None
            deltas.delete(found)
        yield
        with self.database.session_scope() as session:
            DeltaRepository(session, LOCAL_TENANT).restore(self.first)
        yield

    def collect(self) -> Iterator[None]:
        self.collector.give_up_deltas()
        self.found = list(self.collector.unneeded_blobs())
        yield
        self.collector.remove(self.found)
        yield

    def check(self) -> None:
        with self.database.read_scope() as session:
            needed = BlobRepository(session).needed([self.digest])
            kept = session.get(DeltaRow, self.second)
        assert not needed or self.blobs.exists(self.digest)
        assert kept is not None
        assert (kept.artifact_digest is None) or self.blobs.exists(self.digest)


def test_no_order_of_a_push_a_deletion_and_a_collection_loses_a_needed_blob(
    tmp_path: Path, old_blobs: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "fsync", lambda _: None)
    database = Database("sqlite://")
    TableRow.metadata.create_all(database.engine)
    with database.session_scope() as session:
        session.add(TenantRow(id=LOCAL_TENANT, name="local", is_operator=True))
        session.flush()
        add_base(session)
    removed = restored = 0
    for number, order in enumerate(ORDERS):
        blobs = LocalBlobStore(tmp_path / str(number))
        collector = Collector(database, blobs, Settings(home=tmp_path, undo_days=0.0))
        scene = Scene(database, blobs, collector, f"artifact-{number}".encode())
        for step in order:
            next(scene.steps[step])
        scene.check()
        with database.read_scope() as session:
            first = session.get(DeltaRow, scene.first)
        assert first is not None
        restored += first.deleted_at is None
        removed += scene.digest in [entry.key for _, entry in scene.found]
    assert removed, "in some orders the blob was listed for removal"
    assert 0 < restored < len(ORDERS)
    database.dispose()


@pytest.mark.parametrize("migrated", ["sqlite"], indirect=True)
def test_others_write_between_the_transactions_of_a_collection(
    database: Database, tmp_path: Path, old_blobs: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    blobs = LocalBlobStore(tmp_path / "store")
    for number in range(3):
        blobs.put_bytes(f"nobody's {number}".encode())
    pauses: list[float] = []

    def write_meanwhile(seconds: float) -> None:
        with database.session_scope() as other:
            other.execute(delete(NodeSampleRow))
        pauses.append(seconds)

    monkeypatch.setattr(collection, "REMOVED_AT_ONCE", 1)
    monkeypatch.setattr(collection.time, "sleep", write_meanwhile)
    told: list[collection.Usage] = []
    collected = Collector(database, blobs, Settings(home=tmp_path)).run(told.append)
    assert collected.total == told[-1] == (3, 3 * len("nobody's 0"))
    assert [usage.files for usage in told] == [1, 2, 3]
    assert pauses == [collection.PAUSE_SECONDS] * 3


def test_blobs_are_removed_in_as_many_statements_however_many_they_are(
    database: Database, tmp_path: Path, old_blobs: None
) -> None:
    blobs = LocalBlobStore(tmp_path / "store")
    statements: list[str] = []

    def note(_c: object, _cursor: object, sql: str, *_: object) -> None:
        statements.append(sql)

    counts = []
    for number in (1, 30):
        digests = {blobs.put_bytes(f"{number} {one}".encode()) for one in range(number)}
        event.listen(database.engine, "before_cursor_execute", note)
        assert Collector(database, blobs, Settings(home=tmp_path)).run().total.files == number
        event.remove(database.engine, "before_cursor_execute", note)
        counts.append(len(statements))
        statements.clear()
        with database.read_scope() as session:
            newest = AuditRepository(session, EVERY_TENANT).page(limit=number)
        assert {record.object_id for record in newest} == digests
    assert counts[0] == counts[1]


@pytest.mark.parametrize("error", [Unavailable("The store refuses one."), KeyboardInterrupt()])
def test_what_a_removal_that_ends_half_way_has_removed_is_recorded(
    database: Database,
    tmp_path: Path,
    old_blobs: None,
    monkeypatch: pytest.MonkeyPatch,
    error: BaseException,
) -> None:
    blobs = LocalBlobStore(tmp_path / "store")
    every = {blobs.put_bytes(f"nobody's {number}".encode()) for number in range(5)}
    delete_all = blobs.delete

    def delete_some(*digests: str) -> None:
        delete_all(*digests[:3])
        raise error

    def newest(number: int) -> set[str]:
        with database.read_scope() as session:
            audit = AuditRepository(session, EVERY_TENANT)
            return {record.object_id for record in audit.page(limit=number)}

    collector = Collector(database, blobs, Settings(home=tmp_path))
    monkeypatch.setattr(blobs, "delete", delete_some)
    with pytest.raises(type(error)):
        collector.run()
    left = {entry.key for entry in blobs.entries("blobs")}
    assert len(left) == 2
    assert newest(3) == every - left
    monkeypatch.setattr(blobs, "delete", delete_all)
    collector.run()
    assert newest(2) == left


def test_deleted_deltas_are_given_up_in_few_transactions(
    database: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(collection, "HOLD_SECONDS", 60.0)
    with database.session_scope() as session:
        add_base(session)
        add_finetunes(session, range(30), state=JobState.READY)
        long_ago = database_now(session) - timedelta(days=99)
        session.execute(update(DeltaRow).values(deleted_at=long_ago))
    commits: list[object] = []

    def note(connection: object) -> None:
        commits.append(connection)

    event.listen(database.engine, "commit", note)
    Collector(database, LocalBlobStore(tmp_path), Settings(home=tmp_path)).give_up_deltas()
    event.remove(database.engine, "commit", note)
    assert len(commits) == 1
    with database.read_scope() as session:
        given_up = session.scalars(select(DeltaRow.id).where(DeltaRow.collected_at.is_not(None)))
        assert len(given_up.all()) == 30


def add_base(session: Session) -> None:
    checkpoint = CheckpointRepository(session, LOCAL_TENANT).add(
        CheckpointRow(digest="c", weights_digest="w", model_type="llama", total_bytes=1)
    )
    BaseRepository(session, LOCAL_TENANT).add("base", checkpoint)


def add_finetunes(session: Session, numbers: range, *, state: JobState) -> None:
    """Complete uploads with a delta each, whose jobs have ended in this state."""
    base = BaseRepository(session, LOCAL_TENANT).find("base")
    assert base is not None
    for number in numbers:
        digest = f"{number:064x}"
        row = CheckpointRow(digest=digest, weights_digest=digest, model_type="llama", total_bytes=1)
        file = UploadFileRow(
            path="config.json", size=1, sha256=digest[::-1], stored=True, tensors=[]
        )
        uploads = UploadRepository(session, LOCAL_TENANT)
        upload = uploads.add(UploadKind.CHECKPOINT, [file])
        upload.checkpoint = CheckpointRepository(session, LOCAL_TENANT).add(row)
        uploads.complete(upload)
        delta = DeltaRepository(session, LOCAL_TENANT).add(
            name=f"p/{number}", base=base, checkpoint_digest=digest,
            method="exact", bits=None, options=OPTIONS, fingerprint="f",
        )  # fmt: skip
        delta.job.state, delta.job.finished_at = state, database_now(session)


def test_a_collection_asks_once_for_however_many_fine_tunes_and_stops_no_writer(
    database: Database, tmp_path: Path
) -> None:
    blobs = LocalBlobStore(tmp_path)
    blobs.prepare()
    collector = Collector(database, blobs, Settings(home=tmp_path, retention="ready"))
    statements: list[str] = []

    def record(_c: object, _cursor: object, sql: str, *_: object) -> None:
        statements.append(sql)

    with database.session_scope() as session:
        add_base(session)
    counts = []
    for numbers in (range(1, 3), range(3, 20)):
        with database.session_scope() as session:
            add_finetunes(session, numbers, state=JobState.FAILED)
        with database.session_scope() as other:
            other.execute(delete(NodeSampleRow))  # in SQLite, no other transaction may write now
            event.listen(database.engine, "before_cursor_execute", record)
            assert collector.run().usage == {}
            event.remove(database.engine, "before_cursor_execute", record)
        counts.append(len(statements))
        statements.clear()
    assert counts[0] == counts[1]


def test_a_trial_counts_what_two_give_up_together(
    database: Database, tmp_path: Path, old_blobs: None
) -> None:
    blobs = LocalBlobStore(tmp_path)
    shared = blobs.put_bytes(b"tokenizer")
    with database.session_scope() as session:
        add_base(session)
        add_finetunes(session, range(3), state=JobState.READY)
        session.execute(update(UploadFileRow).values(sha256=shared))
    one, both = (
        Collector(database, blobs, Settings(home=tmp_path, retention=rule))
        for rule in ("30", "ready")
    )
    assert one.try_run().usage == {}
    tried = both.try_run()
    assert dict(tried.usage) == {"checkpoints": (1, 9)}
    assert blobs.exists(shared), "a trial removes nothing"
    assert both.run() == tried
    assert not blobs.exists(shared)


def test_a_young_blob_stays_and_a_trial_removes_nothing(database: Database, tmp_path: Path) -> None:
    blobs = LocalBlobStore(tmp_path)
    young, old = blobs.put_bytes(b"young"), blobs.put_bytes(b"old")
    os.utime(blobs.path(old), (0, 0))
    collector = Collector(database, blobs, Settings(home=tmp_path))
    tried = collector.try_run()
    assert dict(tried.usage) == {"unreferenced": (1, 3)}
    assert blobs.exists(old)
    assert collector.run().usage == tried.usage
    assert (blobs.exists(young), blobs.exists(old)) == (True, False)
