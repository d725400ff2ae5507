"""Session scopes, on both databases."""

import os
import signal
import socket
import stat
import threading
import time
from contextlib import ExitStack
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path

import psycopg
import pytest
from sqlalchemy import select, text
from sqlalchemy.exc import DBAPIError, StatementError

from deltadock.errors import InvalidInput, StorageFull, Unavailable
from deltadock.storage.database import Database, database_now, migrate
from deltadock.storage.repositories import UploadRepository
from deltadock.storage.tables import UploadKind, UploadRow
from deltadock.storage.tenancy import LOCAL_TENANT


def count_uploads(database: Database) -> int:
    with database.read_scope() as session:
        return len(session.scalars(select(UploadRow)).all())


def test_a_scope_commits_on_exit(database: Database) -> None:
    with database.session_scope() as session:
        UploadRepository(session, LOCAL_TENANT).add(UploadKind.CHECKPOINT)
    assert count_uploads(database) == 1


def test_a_scope_that_raises_rolls_back(database: Database) -> None:
    def fail() -> None:
        with database.session_scope() as session:
            UploadRepository(session, LOCAL_TENANT).add(UploadKind.CHECKPOINT)
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert count_uploads(database) == 0


def test_concurrent_read_then_write_scopes_wait_for_each_other(database: Database) -> None:
    """On SQLite a deferred transaction could not be upgraded to a write here."""
    with database.session_scope() as session:
        upload_id = UploadRepository(session, LOCAL_TENANT).add(UploadKind.CHECKPOINT).id
    start = threading.Barrier(4)
    failures: list[BaseException] = []

    def touch() -> None:
        try:
            start.wait()
            for _ in range(5):
                with database.session_scope() as session:
                    upload = UploadRepository(session, LOCAL_TENANT).find(upload_id, lock=True)
                    assert upload is not None
                    upload.updated_at = upload.updated_at + timedelta(seconds=1)
        except BaseException as error:  # noqa: BLE001 - reported by the main thread
            failures.append(error)

    with database.read_scope() as session:
        before = session.get_one(UploadRow, upload_id).updated_at
    threads = [threading.Thread(target=touch) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    with database.read_scope() as session:
        after = session.get_one(UploadRow, upload_id).updated_at
    assert after - before == timedelta(seconds=20)


def test_readers_do_not_wait_for_a_writer(database: Database) -> None:
    with database.session_scope() as session:
        UploadRepository(session, LOCAL_TENANT).add(UploadKind.CHECKPOINT)
        assert count_uploads(database) == 0


def test_a_full_or_read_only_disk_is_named(tmp_path: Path) -> None:
    """By SQLite's own limit on the file's pages, and a connection that may only read."""
    url = f"sqlite:///{tmp_path / 'deltadock.db'}"
    migrate(url)
    database = Database(url)

    def fill() -> None:
        with database.session_scope() as session:
            session.execute(text("PRAGMA max_page_count = 1"))
            for _ in range(200):
                UploadRepository(session, LOCAL_TENANT).add(UploadKind.CHECKPOINT)

    database.check_room()
    with pytest.raises(StorageFull, match="Free space"):
        fill()
    with pytest.raises(StorageFull, match="Free space"):
        database.check_room()
    database.dispose()
    reader = Database(f"sqlite:///file:{tmp_path / 'deltadock.db'}?mode=ro&uri=true")
    with pytest.raises(Unavailable, match="read-only"), reader.session_scope() as session:
        UploadRepository(session, LOCAL_TENANT).add(UploadKind.CHECKPOINT)
    reader.dispose()


def test_a_reading_scope_cannot_write(postgres_url: str) -> None:
    """Enforced by Postgres; SQLite has no read-only transactions."""
    migrate(postgres_url)
    database = Database(postgres_url)
    with pytest.raises(DBAPIError, match="read-only"), database.read_scope() as session:
        UploadRepository(session, LOCAL_TENANT).add(UploadKind.CHECKPOINT)
    database.dispose()


def test_times_are_returned_in_utc(database: Database) -> None:
    elsewhere = datetime(2026, 11, 22, 18, 0, tzinfo=timezone(timedelta(hours=5, minutes=30)))
    with database.session_scope() as session:
        upload = UploadRepository(session, LOCAL_TENANT).add(UploadKind.CHECKPOINT)
        upload.created_at = elsewhere
    with database.read_scope() as session:
        stored = session.get_one(UploadRow, upload.id).created_at
    assert stored == elsewhere
    assert stored.tzinfo is UTC


def test_naive_times_are_rejected(database: Database) -> None:
    with pytest.raises(StatementError, match="time zone"), database.session_scope() as session:
        UploadRepository(session, LOCAL_TENANT).add(UploadKind.CHECKPOINT).created_at = datetime(
            2026, 1, 1
        )


def test_the_database_clock_advances_within_a_transaction(database: Database) -> None:
    with database.read_scope() as session:
        first = database_now(session)
        assert database_now(session) > first


def test_a_value_that_postgres_cannot_hold_is_invalid_input(postgres_database: str) -> None:
    database = Database(postgres_database)
    migrate(postgres_database)
    with pytest.raises(InvalidInput, match="NUL"), database.read_scope() as session:
        UploadRepository(session, LOCAL_TENANT).find("a\0b")
    database.dispose()


def test_a_database_whose_machine_vanished_is_noticed_soon(postgres_url: str) -> None:
    database = Database(postgres_url)
    with database.snapshot() as connection:
        driver = connection.connection.dbapi_connection
        assert isinstance(driver, psycopg.Connection)
        with socket.socket(fileno=os.dup(driver.fileno())) as duplicate:
            options = [
                duplicate.getsockopt(level, option)
                for level, option in (
                    (socket.SOL_SOCKET, socket.SO_KEEPALIVE),
                    (socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT),
                    (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE),
                )
            ]
    database.dispose()
    assert options == [1, 30_000, 15]


def test_a_frozen_postgres_is_given_up(postgres_url: str) -> None:
    database = Database(postgres_url, silent_seconds=1.0)
    with database.read_scope() as session:
        session.execute(text("SELECT pg_sleep(0.5)"))
        frozen = session.execute(text("SELECT pg_backend_pid()")).scalar_one()
    os.kill(frozen, signal.SIGSTOP)
    try:
        began = time.monotonic()
        # The pool finds out when it hands the connection out, and makes another one.
        with database.read_scope() as session:
            assert session.execute(text("SELECT pg_backend_pid()")).scalar_one() != frozen
        assert 1.0 < time.monotonic() - began < 20.0  # a busy machine
    finally:
        os.kill(frozen, signal.SIGCONT)
    with pytest.raises(Unavailable, match="does not answer"), database.read_scope() as session:
        session.execute(text("SELECT pg_sleep(9)"))
    database.dispose()


def test_migrate_returns_the_revision(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'deltadock.db'}"
    revision = migrate(url)
    assert revision
    assert migrate(url) == revision


def test_a_sqlite_file_is_its_owners_alone(tmp_path: Path) -> None:
    folder = tmp_path / "home"
    file = folder / "deltadock.db"
    migrate(f"sqlite:///{file}")
    assert (stat.S_IMODE(folder.stat().st_mode), stat.S_IMODE(file.stat().st_mode)) == (
        0o700,
        0o600,
    )
    folder.chmod(0o755)  # as an earlier version made them
    file.chmod(0o644)
    database = Database(f"sqlite:///{file}")
    with database.session_scope() as session:  # its log is there while it is open
        UploadRepository(session, LOCAL_TENANT).add(UploadKind.CHECKPOINT)
    migrate(f"sqlite:///{file}")
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()}
    database.dispose()
    assert modes == dict.fromkeys(("deltadock.db", "deltadock.db-wal", "deltadock.db-shm"), 0o600)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o755


def test_an_unreachable_database_is_unavailable() -> None:
    database = Database("postgresql://nobody:secret@127.0.0.1:1/none")
    with pytest.raises(Unavailable) as caught, database.read_scope() as session:
        session.scalars(select(UploadRow)).all()
    assert "secret" not in str(caught.value)


def test_too_few_connections_are_unavailable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    database = Database(f"sqlite:///{tmp_path / 'deltadock.db'}")
    monkeypatch.setattr(database.engine.pool, "_timeout", 0.01)
    with ExitStack() as held:
        for _ in range(40):
            held.enter_context(database.engine.connect())
        with pytest.raises(Unavailable, match="connections"), database.read_scope() as session:
            session.execute(text("SELECT 1"))
    database.dispose()
