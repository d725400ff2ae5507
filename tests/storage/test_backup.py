"""A backup moves every row between databases; damaged, foreign and unsafe ones are refused."""

import errno
import json
import os
import zipfile
from collections.abc import Iterator
from pathlib import Path
from stat import S_ISDIR
from typing import IO, Any

import pytest
from sqlalchemy import Connection, select

from deltadock.errors import Conflict, InvalidInput
from deltadock.storage import backup as backup_module
from deltadock.storage.backup import backup, restore
from deltadock.storage.blobs.local import LocalBlobStore
from deltadock.storage.database import Database, migrate
from deltadock.storage.reconciliation import missing_blobs
from deltadock.storage.repositories import DeltaRepository, UploadRepository
from deltadock.storage.tables import AuditRow, DeltaRow, TableRow, UploadKind
from deltadock.storage.tenancy import LOCAL_TENANT
from tests import seed

Rows = dict[str, list[dict[str, Any]]]


@pytest.fixture(scope="module")
def blobs(tmp_path_factory: pytest.TempPathFactory) -> LocalBlobStore:
    blobs = LocalBlobStore(tmp_path_factory.mktemp("blobs"))
    blobs.prepare()
    return blobs


def seeded(url: str, blobs: LocalBlobStore) -> Database:
    """A database with seed data; a delta of it continues one whose id is higher."""
    migrate(url)
    database = Database(url)
    ready = sorted(seed.seed(database, blobs).ready)
    with database.session_scope() as session:
        lowest = DeltaRepository(session, LOCAL_TENANT).find(ready[0])
        assert lowest is not None
        lowest.parent_id = ready[-1]
    return database


@pytest.fixture(scope="module")
def on_sqlite(
    tmp_path_factory: pytest.TempPathFactory, blobs: LocalBlobStore
) -> Iterator[Database]:
    database = seeded(f"sqlite:///{tmp_path_factory.mktemp('source') / 'x.db'}", blobs)
    yield database
    database.dispose()


@pytest.fixture
def source(request: pytest.FixtureRequest, blobs: LocalBlobStore) -> Iterator[Database]:
    if request.param == "sqlite":
        yield request.getfixturevalue("on_sqlite")
        return
    database = seeded(request.getfixturevalue("postgres_database"), blobs)
    yield database
    database.dispose()


@pytest.fixture
def target_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'target' / 'new.db'}"
    url: str = request.getfixturevalue("postgres_database")
    return url


def rows_of(database: Database) -> Rows:
    with database.snapshot() as connection:
        return {
            table.name: [
                dict(row)
                for row in connection.execute(
                    select(table).order_by(*table.primary_key.columns)
                ).mappings()
            ]
            for table in TableRow.metadata.sorted_tables
        }


@pytest.mark.parametrize(
    ("source", "target_url"), [("sqlite", "postgres"), ("postgres", "sqlite")], indirect=True
)
def test_a_restored_database_has_the_same_rows(
    source: Database, target_url: str, tmp_path: Path, blobs: LocalBlobStore
) -> None:
    file = tmp_path / "registry.backup"
    counts = backup(source, file)
    assert file.stat().st_mode & 0o777 == 0o600
    assert restore(target_url, file) == counts
    target = Database(target_url)
    before, after = rows_of(source), rows_of(target)
    assert after["audit_log"].pop()["action"] == "database.restore"
    assert before == after
    assert len(before["deltas"]) == len(seed.READY) + 3
    assert any(row["parent_id"] for row in before["deltas"])

    with target.session_scope() as session:  # ids continue after the restored ones
        UploadRepository(session, LOCAL_TENANT).add(UploadKind.CHECKPOINT)
    with target.read_scope() as session:
        ids = session.scalars(select(AuditRow.id).order_by(AuditRow.id)).all()
        artifact = session.scalars(
            select(DeltaRow.artifact_digest).where(DeltaRow.artifact_digest.is_not(None))
        ).first()
    assert ids[-2] > before["audit_log"][-1]["id"]
    missing = missing_blobs(target, blobs)
    assert artifact is not None
    blobs.delete(artifact)
    assert set(missing_blobs(target, blobs)) == {*missing, artifact}
    target.dispose()


def test_a_database_that_is_not_empty_is_left_alone(on_sqlite: Database, tmp_path: Path) -> None:
    backup(on_sqlite, tmp_path / "x")
    before = rows_of(on_sqlite)
    with pytest.raises(Conflict, match=r"not empty: \w+ has rows"):
        restore(on_sqlite.engine.url.render_as_string(), tmp_path / "x")
    assert rows_of(on_sqlite) == before


def test_no_file_is_overwritten(on_sqlite: Database, tmp_path: Path) -> None:
    (tmp_path / "x").write_text("mine")
    with pytest.raises(Conflict, match="exists already"):
        backup(on_sqlite, tmp_path / "x")
    assert (tmp_path / "x").read_text() == "mine"


@pytest.mark.parametrize("links", [True, False])
def test_of_two_backups_to_one_name_the_one_that_is_reported_stays(
    on_sqlite: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, links: bool
) -> None:
    file = tmp_path / "x"
    write = backup_module._write
    seen: list[bytes] = []

    def write_slowly(connection: Connection, stream: IO[bytes]) -> dict[str, Any]:
        """While it runs, a whole backup is made."""
        monkeypatch.setattr(backup_module, "_write", write)
        backup(on_sqlite, file)
        seen.append(file.read_bytes())
        return write(connection, stream)

    def refuse(*_: object) -> None:
        raise OSError(errno.EPERM, "no hard links")

    if not links:
        monkeypatch.setattr(os, "link", refuse)
    monkeypatch.setattr(backup_module, "_write", write_slowly)
    with pytest.raises(Conflict, match="exists already"):
        backup(on_sqlite, file)
    assert [file.read_bytes()] == seen
    assert [path.name for path in tmp_path.iterdir()] == ["x"]
    assert restore(f"sqlite:///{tmp_path / 'new.db'}", file)


def test_a_backup_is_on_the_disk_before_it_has_its_name(
    on_sqlite: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "x"
    synced: list[tuple[bool, int, bool]] = []
    fsync = os.fsync

    def spy(descriptor: int) -> None:
        status = os.fstat(descriptor)
        synced.append((S_ISDIR(status.st_mode), status.st_size, file.exists()))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", spy)
    backup(on_sqlite, file)
    (of_file, size, named), (of_folder, _, was_named) = synced
    assert (of_file, size, named) == (False, file.stat().st_size, False)
    assert (of_folder, was_named) == (True, True)


def test_a_database_of_another_revision_is_not_backed_up(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'old.db'}"
    migrate(url, "0001")
    database = Database(url)
    with pytest.raises(Conflict, match="revision 0001"):
        backup(database, tmp_path / "x")
    database.dispose()
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("cut", "cut off"),
        ("byte", "damaged"),
        ("row", "deltas has another SHA-256"),
        ("table", "damaged"),
        ("revision", "is of revision 0001"),
        ("format", "has format 2"),
        ("text", "is not a backup"),
    ],
)
def test_a_damaged_or_foreign_file_is_refused(
    on_sqlite: Database, tmp_path: Path, damage: str, message: str
) -> None:
    file = tmp_path / "x"
    backup(on_sqlite, file)
    data = file.read_bytes()
    if damage == "cut":
        file.write_bytes(data[: len(data) // 2])
    elif damage == "byte":
        middle = len(data) // 2
        file.write_bytes(data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :])
    elif damage == "text":
        file.write_text("a backup")
    else:
        rewrite(file, damage)
    with pytest.raises(InvalidInput, match=message):
        restore(f"sqlite:///{tmp_path / 'new.db'}", file)
    assert not (tmp_path / "new.db").exists()


def rewrite(file: Path, damage: str) -> None:
    """Write the archive again with a row or table less, or another revision or format."""
    with zipfile.ZipFile(file) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    if damage == "row":
        entries["deltas.ndjson"] = entries["deltas.ndjson"].partition(b"\n")[2]
    elif damage == "table":
        del entries["deltas.ndjson"]
    else:
        manifest = json.loads(entries["manifest.json"])
        manifest |= {"revision": "0001"} if damage == "revision" else {"format": 2}
        entries["manifest.json"] = json.dumps(manifest).encode()
    with zipfile.ZipFile(file, "w") as archive:
        for name, content in entries.items():
            archive.writestr(name, content)
