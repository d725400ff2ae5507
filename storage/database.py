"""Engines, sessions, locks, the clock, the planner and migrations, on SQLite and Postgres alike.

The caller owns the unit of work: `with database.session_scope() as session:` commits once, when
the block ends; repositories never commit.
"""

import hashlib
import math
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, cast

from sqlalchemy import (
    ColumnElement,
    Connection,
    CursorResult,
    Engine,
    Result,
    create_engine,
    event,
    make_url,
    select,
    text,
)
from sqlalchemy.engine import URL
from sqlalchemy.exc import DataError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError
from sqlalchemy.orm import InstrumentedAttribute, Session
from sqlalchemy.pool import QueuePool

from deltadock.errors import Conflict, InvalidInput, StorageFull, Unavailable

if TYPE_CHECKING:
    from alembic.config import Config

BUSY_TIMEOUT_SECONDS: Final = 30
VANISHED: Final = {
    "tcp_user_timeout": 30_000,
    "keepalives_idle": 15,
    "keepalives_interval": 5,
    "keepalives_count": 3,
}
"""A machine that vanished closes no connection: libpq's settings notice it within half a minute,
instead of the system's quarter of an hour."""
READ_ONLY: Final = "deltadock_read_only"
"""Execution option of read-only connections."""
FULL: Final = frozenset({"SQLITE_FULL", "53100"})
"""SQLite's name and Postgres's code of a full disk."""
DISK_FULL: Final = "The database's disk is full. Free space there, then try again."
FULL_SECONDS: Final = 30.0
"""After a write that found the disk full, nodes' heartbeats at the latest would have found room."""
READ_ONLY_FILE: Final = ("SQLITE_READONLY", "SQLITE_CANTOPEN")


class Database:
    """One process's connection pool; connects lazily."""

    def __init__(self, url: str, silent_seconds: float | None = None) -> None:
        """Args: as of `make_engine`."""
        self.engine = make_engine(url, silent_seconds)
        self._full_at = -math.inf
        self._reading = self.engine.execution_options(
            **{READ_ONLY: True, "postgresql_readonly": True}
        )

    def check_room(self) -> None:
        """Check that none of this process's writes has found the disk full a moment ago.

        Raises:
            StorageFull: one has.
        """
        if time.monotonic() - self._full_at < FULL_SECONDS:
            raise StorageFull(DISK_FULL)

    @property
    def is_file(self) -> bool:
        """Whether it is a file, in which the end of a read-only transaction does not wait."""
        return self.engine.dialect.name == "sqlite"

    @contextmanager
    def session_scope(self) -> Iterator[Session]:
        """A session that commits when the block ends and rolls back if it raises.

        Raises:
            Unavailable: the database does not answer.
            InvalidInput: the database cannot store a value, such as a NUL character.
        """
        with self._domain_errors(), Session(self.engine, expire_on_commit=False) as session:
            yield session
            session.commit()

    @contextmanager
    def read_scope(self) -> Iterator[Session]:
        """A read-only session; on SQLite it never waits for a writer.

        Raises:
            Unavailable: the database does not answer.
            InvalidInput: the database cannot compare with a value, such as a NUL character.
        """
        with self._domain_errors(), Session(self._reading, expire_on_commit=False) as session:
            yield session

    @contextmanager
    def snapshot(self) -> Iterator[Connection]:
        """A read-only connection whose statements all see the database at one moment.

        Raises:
            Unavailable: the database does not answer.
        """
        engine = self._reading
        if engine.dialect.name == "postgresql":
            engine = engine.execution_options(isolation_level="REPEATABLE READ")
        with self._domain_errors(), engine.connect() as connection:
            yield connection

    def dispose(self) -> None:
        """Close every pooled connection."""
        self.engine.dispose()

    @contextmanager
    def _domain_errors(self) -> Iterator[None]:
        try:
            yield
        except OperationalError as error:
            names = (getattr(error.orig, name, None) for name in ("sqlite_errorname", "sqlstate"))
            reason: str = next(filter(None, names), "")
            if reason in FULL:
                self._full_at = time.monotonic()
                raise StorageFull(DISK_FULL) from error
            if reason.startswith(READ_ONLY_FILE):
                raise Unavailable(
                    "The database's file cannot be written: it or its folder is read-only, or "
                    "belongs to another user. Check its mount and its permissions, then try again."
                ) from error
            raise Unavailable("The database does not answer; try again shortly.") from error
        except PoolTimeoutError as error:
            raise Unavailable(
                "All of this process's connections to the database are in use; try again shortly."
            ) from error
        except DataError as error:
            raise InvalidInput(
                "The database cannot store or compare one of the values: it may contain a NUL "
                "character or a number that is out of range."
            ) from error


def database_now(session: Session) -> datetime:
    """The database's clock (UTC), which all workers share and leases are compared with.

    On Postgres `clock_timestamp()`, since `now()` is constant within a transaction; SQLite runs
    on this machine and uses its clock.
    """
    if session.get_bind().dialect.name == "postgresql":
        moment: datetime = session.execute(select(text("clock_timestamp()"))).scalar_one()
        return moment.astimezone(UTC)
    return datetime.now(UTC)


def changed_rows(result: Result[Any]) -> bool:
    """Whether an UPDATE changed a row."""
    return cast(CursorResult[Any], result).rowcount > 0


def lock_key(session: Session, *key: str) -> None:
    """Hold an advisory lock on `key` until the transaction ends.

    For check-then-insert sequences that a unique constraint alone does not protect. A no-op on
    SQLite, where write transactions are serialised already.
    """
    lock_keys(session, [key])


def lock_keys(session: Session, keys: Iterable[tuple[str, ...]]) -> None:
    """As `lock_key` for each of `keys`, in their order."""
    if session.get_bind().dialect.name == "postgresql":
        hashes = [hashlib.sha256("\0".join(key).encode()).digest()[:8] for key in keys]
        numbers = [int.from_bytes(number, "big", signed=True) for number in hashes]
        session.execute(
            text("SELECT pg_advisory_xact_lock(key) FROM unnest(CAST(:keys AS bigint[])) AS key"),
            {"keys": numbers},
        )


def unindexed(column: InstrumentedAttribute[Any]) -> ColumnElement[str]:
    """The column, hidden from the planner.

    Without it, SQLite reads rows of more than a few ids by walking all rows of their tenant.
    """
    return column.concat("")


def make_engine(url: str, silent_seconds: float | None = None) -> Engine:
    """An engine for a SQLite or Postgres URL; `postgresql://` selects psycopg 3.

    Args:
        url: of the database.
        silent_seconds: a Postgres that sends nothing for so long is given up, as one that is
            frozen; None: statements may take any time.
    """
    target = normalise_url(url)
    if target.get_backend_name() != "sqlite":
        engine = create_engine(
            target,
            pool_size=20,
            max_overflow=20,
            pool_pre_ping=True,
            connect_args={"connect_timeout": 5, **VANISHED},
        )
        if silent_seconds is not None:
            from deltadock.storage.silence import give_up_silent

            give_up_silent(engine, silent_seconds)
        return engine
    # As many connections as threads: those that wait for the write lock keep theirs.
    engine = create_engine(
        target,
        poolclass=QueuePool,
        pool_size=20,
        max_overflow=20,
        connect_args={"timeout": BUSY_TIMEOUT_SECONDS},
    )
    event.listen(engine, "connect", _configure_sqlite)
    event.listen(engine, "begin", _begin_sqlite)
    return engine


def normalise_url(url: str) -> URL:
    """The URL with an explicit Postgres driver."""
    target = make_url(url)
    if target.drivername in {"postgresql", "postgres"}:
        return target.set(drivername="postgresql+psycopg")
    return target


def migrate(url: str, revision: str = "head") -> str | None:
    """Upgrade the database at `url` to `revision`, creating a SQLite file's folder if needed.

    A SQLite file can be read by its owner only afterwards, since it holds webhooks' secrets.
    Returns the resulting revision; None if it precedes the first one.
    Safe to call from several processes at once: migrations are serialised.

    Raises:
        Conflict: the database is at a revision that this version does not know.
    """
    from alembic import command  # slow to import, and only needed here
    from alembic.util import CommandError

    target = normalise_url(url)
    if target.get_backend_name() == "sqlite" and target.database:
        _make_private(Path(target.database))
    engine = make_engine(url)
    try:
        command.upgrade(alembic_config(engine), revision)
        return current_revision(engine)
    except CommandError as error:
        raise Conflict(
            f"The database is at revision {current_revision(engine)}, which this version of "
            f"Deltadock does not know ({error}). Use the newer version that it belongs to."
        ) from error
    finally:
        engine.dispose()


def _make_private(file: Path) -> None:
    """Take a SQLite file's rights from all but its owner; SQLite gives new logs those of the file.

    A folder that is made here is private too. One that there is may hold what others need.
    """
    file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    file.touch(mode=0o600)
    for name in (file.name, f"{file.name}-wal", f"{file.name}-shm"):
        path = file.with_name(name)
        with suppress(FileNotFoundError, PermissionError):  # not open, or another user's
            path.chmod(path.stat().st_mode & 0o700)


def current_revision(engine: Engine) -> str | None:
    """The revision of the database's schema; None before the first one."""
    from alembic.migration import MigrationContext

    with engine.connect() as connection:
        return MigrationContext.configure(connection).get_current_revision()


def head_revision() -> str | None:
    """The revision of this version's schema."""
    from alembic.script import ScriptDirectory

    return ScriptDirectory(str(files("deltadock.migrations"))).get_current_head()


def alembic_config(engine: Engine) -> "Config":
    """Alembic's configuration for the packaged migrations on `engine`."""
    from alembic.config import Config

    config = Config(attributes={"engine": engine})
    config.set_main_option("script_location", str(files("deltadock.migrations")).replace("%", "%%"))
    config.set_main_option("path_separator", "os")
    return config


def _configure_sqlite(connection: Any, _record: object) -> None:
    # Disable the driver's implicit BEGIN, which would start every transaction as a reader.
    connection.isolation_level = None
    cursor = connection.cursor()
    cursor.execute("PRAGMA journal_mode = WAL")
    cursor.execute("PRAGMA synchronous = FULL")  # an acknowledged commit survives a power cut
    cursor.execute("PRAGMA foreign_keys = ON")
    cursor.close()


def _begin_sqlite(connection: Connection) -> None:
    # A transaction that upgrades from reader to writer fails immediately if another has written
    # since, regardless of the busy timeout; BEGIN IMMEDIATE waits for the write lock instead.
    read_only = connection.get_execution_options().get(READ_ONLY, False)
    connection.exec_driver_sql("BEGIN" if read_only else "BEGIN IMMEDIATE")
